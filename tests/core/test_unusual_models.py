"""Models and losses that are out of the ordinary: they work as their own code says, or are refused by name."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_altmin import AltMin, CurvatureCodes, GradientCodes, LocalGradient
from lightning_altmin.losses import local_loss
from tests.core.written_out import batch, network


def test_an_optimizer_must_hold_every_parameter() -> None:
    """Catches a factory that drops layers, which would silently never be trained, or returns nothing."""
    module = network(5, 7, 6, 4)
    partly = LocalGradient(lambda groups: torch.optim.SGD(list(groups)[:1], lr=0.1))
    with pytest.raises(ValueError, match=r"not all parameters of stages \['2', '4'\]"):
        AltMin(module, nn.CrossEntropyLoss(), weights=partly)
    nothing: Any = LocalGradient(lambda groups: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match="must return a torch optimizer, got None"):
        AltMin(module, nn.CrossEntropyLoss(), weights=nothing)


def test_a_loss_that_reads_its_reduction_too_early_is_refused() -> None:
    """Catches a mean taken for a sum over samples: the code step would be weaker by the size of the batch."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reduction = "mean"
            self.inner = nn.CrossEntropyLoss(reduction=self.reduction)

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return self.inner(output, target)

    module = network(5, 7, 4)
    core = AltMin(module, Wrapped(), codes=GradientCodes(1))
    with pytest.raises(ValueError, match=r"Wrapped with reduction='none' returned shape \(\), not a value per sample"):
        core.step(*batch(module))
    assert float(local_loss(nn.MSELoss()).total(torch.zeros(3, 2), torch.ones(3, 2))) == 3.0


def test_running_state_of_any_kind_advances_once() -> None:
    """Catches running statistics that every phase updates: an InstanceNorm keeps some, too."""
    block = nn.Sequential(nn.Conv2d(1, 2, 3), nn.InstanceNorm2d(2, track_running_stats=True), nn.ReLU())
    layers = [
        *block,
        nn.Conv2d(2, 2, 3),
        nn.InstanceNorm2d(2, track_running_stats=True),
        nn.Flatten(),
        nn.Linear(32, 3),
    ]
    module = nn.Sequential(*layers).double()
    twin = copy.deepcopy(module)
    x, y = torch.randn(5, 1, 8, 8, dtype=torch.float64), torch.randint(3, (5,))
    with torch.no_grad():
        twin(x)
    AltMin(module, nn.CrossEntropyLoss(), codes=CurvatureCodes(steps=3)).step(x, y)
    for ours, theirs in zip(module.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_block_may_leave_its_parameters_out() -> None:
    """Catches an error where backprop just has no gradient: a block that is skipped in this batch."""

    class Skipped(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x * 1.0

    module = nn.Sequential(nn.Linear(5, 7), Skipped(7, 7), nn.ReLU(), nn.Linear(7, 4)).double()
    before = copy.deepcopy(module[1].state_dict())
    AltMin(module, nn.CrossEntropyLoss()).step(*batch(network(5, 7, 4)))
    torch.testing.assert_close(module[1].state_dict(), before, rtol=0, atol=0)


def test_a_first_batch_of_nan_is_a_bad_batch() -> None:
    """Catches NaN outputs that differ from themselves, and blame the network's split for it."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.classifier = nn.Sequential(nn.Linear(5, 7), nn.ReLU()), nn.Linear(7, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(self.features(x).flatten(1))

    core = AltMin(Named(), nn.CrossEntropyLoss(), nonfinite="skip")
    core.step(torch.full((3, 5), float("nan")), torch.zeros(3, dtype=torch.long))
    assert core.guard.skipped == 1


def test_out_of_memory_stays_what_it_is() -> None:
    """Catches a shape being blamed, and batch-size finders that do not see what they look for."""

    class Hungry(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")

    core = AltMin(nn.Sequential(Hungry(5, 7), nn.ReLU(), nn.Linear(7, 4)), nn.CrossEntropyLoss())
    with pytest.raises(torch.OutOfMemoryError):
        core.step(torch.randn(3, 5), torch.zeros(3, dtype=torch.long))


def test_an_interrupted_batch_leaves_no_traces() -> None:
    """Catches running statistics of a batch whose code step was broken off."""

    class Interrupted(GradientCodes):
        def solve(self, problem: Any) -> Tensor:
            raise KeyboardInterrupt

    module = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 4))
    before = copy.deepcopy(module.state_dict())
    core = AltMin(module, nn.CrossEntropyLoss(), codes=Interrupted())
    with pytest.raises(KeyboardInterrupt):
        core.step(torch.randn(3, 5), torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


def test_a_model_can_be_pickled() -> None:
    """Catches functions without a name in a model, which processes could not hand to each other."""
    module = network(5, 7, 4)
    core = AltMin(module, nn.CrossEntropyLoss())
    x, y = batch(module)
    core.step(x, y)
    twin = pickle.loads(pickle.dumps(core))
    for model in (core, twin):
        model.step(x, y)
    torch.testing.assert_close(twin.state_dict(), core.state_dict(), rtol=0, atol=0)
