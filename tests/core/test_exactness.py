"""Closed form of the whole algorithm: with forward inputs and one plain code step of rate 1, AltMin *is* backprop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_altmin import AltMin, AltMinObjective, CodedNetwork, GradientCodes, LocalGradient
from lightning_altmin.nn import LeNet5
from tests.core.written_out import batch, convolutional, network


def backprop(module: nn.Module, loss: Any, x: Tensor, y: Any) -> list[Tensor]:
    return list(torch.autograd.grad(loss(module(x), y), list(module.parameters())))


def local_gradients(core: AltMin, x: Tensor, y: Any) -> list[Tensor]:
    """What the weight step finds, before any optimizer."""
    step = core.encode(x, y)
    core.solve_codes(step)
    core.fill_gradients(step)
    gradients = []
    for parameter in core.network.parameters():
        assert parameter.grad is not None
        gradients.append(parameter.grad)
    return gradients


LOSSES: dict[str, Any] = {
    "cross-entropy": (nn.CrossEntropyLoss(), lambda out: torch.randint(out.shape[1], (len(out),))),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.2), lambda out: torch.randint(out.shape[1], (len(out),))),
    "soft targets": (nn.CrossEntropyLoss(), lambda out: torch.rand_like(out).softmax(1)),
    "mse": (nn.MSELoss(), torch.randn_like),
    "bce": (nn.BCEWithLogitsLoss(), torch.rand_like),
    "huber": (nn.HuberLoss(), torch.randn_like),
    "function": (lambda output, y: (output - y).abs().sum(1).mean(), torch.randn_like),
}


@pytest.mark.parametrize("engine", ["closed_form", "autograd"])
@pytest.mark.parametrize("mu", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.GELU, nn.LeakyReLU, nn.Softplus])
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_forward_inputs_and_rate_one_give_backprops_gradient(
    kind: str, activation: type[nn.Module], mu: float, engine: str
) -> None:
    """Catches any lost factor anywhere in the chain: all of them would have to cancel to pass."""
    module = network(6, 9, 8, 7, 4, activation=activation) if kind == "mlp" else convolutional(activation)
    x, y = batch(module)
    core = AltMin(
        CodedNetwork(module, engine),
        nn.CrossEntropyLoss(),
        objective=AltMinObjective(mu=mu),
        codes=GradientCodes(steps=1, lr=1.0),
        weights=LocalGradient(inputs="forward"),
    )
    for ours, expected in zip(local_gradients(core, x, y), backprop(module, nn.CrossEntropyLoss(), x, y), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_the_same_for_every_loss_that_is_a_plain_mean(name: str) -> None:
    """Catches a loss whose sum over samples is not the batch size times its mean, or averages over outputs wrongly."""
    loss, targets = LOSSES[name]
    module = network(6, 9, 8, 4)
    x, _ = batch(module)
    y = targets(module(x).detach())
    core = AltMin(module, loss, AltMinObjective(mu=0.05), GradientCodes(1, 1.0), LocalGradient(inputs="forward"))
    for ours, expected in zip(local_gradients(core, x, y), backprop(module, loss, x, y), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_dropout_does_not_break_exactness() -> None:
    """Catches a mask that differs between encode and the code step: backprop sees one mask too."""
    module = nn.Sequential(
        nn.Linear(6, 9), nn.Tanh(), nn.Dropout(0.5), nn.Linear(9, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 4)
    ).double()
    x, y = batch(module)
    for engine in ("closed_form", "autograd"):
        module.zero_grad()
        core = AltMin(
            CodedNetwork(module, engine), nn.CrossEntropyLoss(), codes=GradientCodes(1, 1.0),
            weights=LocalGradient(inputs="forward"),
        )  # fmt: skip
        torch.manual_seed(3)
        expected = backprop(module, nn.CrossEntropyLoss(), x, y)
        torch.manual_seed(3)
        for ours, theirs in zip(local_gradients(core, x, y), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("engine", ["closed_form", "autograd"])
def test_live_batch_norm_restores_the_theorem(engine: str) -> None:
    """Catches a live BatchNorm that is not differentiated through its statistics; with a fixed one it does not hold."""
    module = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 8), nn.BatchNorm1d(8), nn.Tanh(),
        nn.Linear(8, 4),
    ).double()  # fmt: skip
    x, y = torch.randn(7, 1, 6, 6, dtype=torch.float64), torch.randint(4, (7,))
    expected = backprop(copy.deepcopy(module), nn.CrossEntropyLoss(), x, y)
    for batch_norm, holds in (("live", True), ("fixed", False)):
        coded = CodedNetwork(copy.deepcopy(module), engine, batch_norm)
        core = AltMin(
            coded, nn.CrossEntropyLoss(), codes=GradientCodes(1, 1.0), weights=LocalGradient(inputs="forward")
        )
        pairs = list(zip(local_gradients(core, x, y), expected, strict=True))
        assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in pairs) == holds
    with pytest.raises(ValueError, match="batch_norm must be 'fixed' or 'live', got 'eval'"):
        CodedNetwork(module, batch_norm="eval")  # type: ignore[arg-type]


class MovingMean(nn.Module):
    """Takes away a mean that every batch moves."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return x - self.mean


UPDATES_BUFFERS: dict[str, Callable[[], list[nn.Module]]] = {
    "spectral norm": lambda: [nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16))],
    "spectral norm by a hook": lambda: [nn.utils.spectral_norm(nn.Linear(16, 16))],
    "moving mean": lambda: [MovingMean(16), nn.Linear(16, 16), MovingMean(16)],
}


@pytest.mark.parametrize("name", UPDATES_BUFFERS)
def test_buffers_that_a_block_updates_do_not_break_exactness(name: str) -> None:
    """Catches later phases that see the block one update further than encode, and buffers that they advance.

    Backprop runs the block once per batch: a twin's gradient from the same buffers, and its buffers, are the oracle.
    """
    module = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), *UPDATES_BUFFERS[name](), nn.Tanh(), nn.Linear(16, 4)).double()
    twin = copy.deepcopy(module)
    before = [buffer.clone() for buffer in module.buffers()]
    core = AltMin(module, nn.CrossEntropyLoss(), codes=GradientCodes(1, 1.0), weights=LocalGradient(inputs="forward"))
    for _ in range(3):
        x, y = torch.randn(9, 8, dtype=torch.float64) + 1, torch.randint(4, (9,))
        expected = backprop(twin, nn.CrossEntropyLoss(), x, y)
        module.zero_grad()
        for ours, theirs in zip(local_gradients(core, x, y), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12 * float(theirs.abs().max()))
        for ours, theirs, old in zip(module.buffers(), twin.buffers(), before, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)
            assert not torch.equal(ours, old)


def test_moved_inputs_are_not_backprop() -> None:
    """Catches the default silently being backprop by another route: with moved inputs the gradients must differ.

    The first stage is the exception: its input is x, which no code step moves.
    """
    module = network(6, 9, 8, 4)
    x, y = batch(module)
    core = AltMin(module, nn.CrossEntropyLoss(), AltMinObjective(mu=0.05), GradientCodes(1, 1.0), LocalGradient())
    ours, expected = local_gradients(core, x, y), backprop(module, nn.CrossEntropyLoss(), x, y)
    assert core.weights.inputs == "moved"
    for index, (a, b) in enumerate(zip(ours, expected, strict=True)):
        same = bool(torch.allclose(a, b, rtol=1e-6, atol=1e-12))
        assert same == (index < 2)


def test_the_signal_does_not_vanish_on_lenet() -> None:
    """Catches the official code's defect: a first convolution whose gradient is rounding noise.

    Raw local gradients with default objective and codes: their ratio to backprop's norm is within 10x across layers.
    None is at rounding level: single precision gives the gradients of double precision to within a percent.
    """
    double = LeNet5().double()
    single = copy.deepcopy(double).float()
    x, y = torch.randn(32, 1, 28, 28), torch.randint(10, (32,))
    single_gradients = local_gradients(AltMin(single, nn.CrossEntropyLoss()), x, y)
    gradients = local_gradients(AltMin(double, nn.CrossEntropyLoss()), x.double(), y)
    expected = backprop(double, nn.CrossEntropyLoss(), x.double(), y)
    weights = [i for i, p in enumerate(double.parameters()) if p.dim() > 1]
    assert len(weights) == 5
    ratios = [float(gradients[i].norm() / expected[i].norm()) for i in weights]
    assert max(ratios) <= 10 * min(ratios), ratios
    for i in weights:
        error = (single_gradients[i].double() - gradients[i]).norm() / gradients[i].norm()
        assert float(error) < 0.01
