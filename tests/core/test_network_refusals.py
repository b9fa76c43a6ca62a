"""Structure: a network is described as it is, and one that cannot be trained is refused with the reason."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_altmin import AltMin, CodedNetwork, CurvatureCodes, GradientCodes, LocalGradient

F64 = torch.float64


def test_explain_counts_and_names() -> None:
    """Catches a table with the wrong code shapes, parameter counts (frozen ones included) or engine."""
    module = nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(864, 10), nn.PReLU(),
        nn.Linear(10, 3),
    )  # fmt: skip
    module[5].bias.requires_grad_(False)
    core = AltMin(module, nn.CrossEntropyLoss())
    lines = [line.split("  ") for line in core.explain(torch.randn(2, 1, 28, 28)).splitlines()]
    rows = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert rows == [
        ["stage", "modules", "code", "parameters", "engine"],
        ["0", "Conv2d(1, 6, (5, 5))-BatchNorm2d(6)", "6x24x24", "168", "closed_form"],
        ["5", "ReLU-MaxPool2d(2)-Flatten-Linear(864, 10)", "10", "8,640", "closed_form"],
        ["7", "PReLU(1)-Linear(10, 3)", "3 (output)", "34", "autograd"],
    ]
    assert "?" in core.explain()


def test_explain_changes_nothing() -> None:
    """Catches running statistics, modes or the random state touched by a look at the network."""
    module = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 2))
    module[1].eval()
    before, random = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    CodedNetwork(module).explain(torch.randn(1, 5, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert [m.training for m in module] == [True, False, True, True, True]


# ---------------------------------------------------------------- refusals

_tied = nn.Linear(4, 4)
_act = nn.PReLU()


class WithExtra(nn.Module):
    """A parameter that the stages do not use."""

    def __init__(self, trained: bool) -> None:
        super().__init__()
        self.features, self.classifier = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2)
        self.extra = nn.Parameter(torch.ones(1), requires_grad=trained)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "tied layers": (
        nn.Sequential(nn.Linear(4, 4), _tied, nn.ReLU(), _tied, nn.Linear(4, 2)), ValueError, "'1' and '3' share",
    ),
    "tied activation": (
        nn.Sequential(nn.Linear(4, 4), _act, nn.Linear(4, 4), _act, nn.Linear(4, 2)), ValueError, "'2' and '4' share",
    ),
    "no hidden layer": (nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), ValueError, "no hidden layer"),
    "no layer": (nn.Sequential(nn.ReLU()), ValueError, "no hidden layer"),
    "lazy": (nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 2)), ValueError, r"'0'.*lazy.*network\(x\)"),
    "unused": (WithExtra(True), ValueError, "'extra'.*belongs to no stage"),
    "unknown": (nn.Linear(4, 2), TypeError, "Linear cannot be split"),
    "transformer": (nn.TransformerEncoderLayer(4, 2), TypeError, "TransformerEncoderLayer cannot be split"),
    "empty list": ([], TypeError, "non-empty list"),
    "list of numbers": ([1, 2], TypeError, r"network must be .*list of modules.*, got \[1, 2\]$"),
    "number": (3, TypeError, "network must be a module .*, got 3$"),
    "class": (nn.Linear, TypeError, r"network must be .*got <class .*Linear'>; pass instances, Linear\("),
    "class in a list": ([nn.Linear(4, 4), nn.ReLU], TypeError, r"network must be .*; pass instances, ReLU\("),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_networks_that_cannot_be_trained_are_refused(name: str) -> None:
    """Catches a network trained wrongly, or partly, without a word; the error names the stage and the way out."""
    module, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        AltMin(module, nn.CrossEntropyLoss())


def test_unused_but_frozen_parameters_are_no_reason_to_refuse() -> None:
    """Catches a refusal of what nobody wanted to train anyway."""
    assert CodedNetwork(WithExtra(False)).depth == 1


def test_weights_tied_within_one_block_are_accepted() -> None:
    """Catches an over-zealous refusal: inside one stage a shared parameter has one local problem."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4, bias=False)
            self.same = self.layer

        def forward(self, x: Tensor) -> Tensor:
            return self.same(torch.tanh(self.layer(x)))

    module = nn.Sequential(nn.Linear(3, 4), Tied(), nn.Linear(4, 2)).double()
    core = AltMin(module, nn.CrossEntropyLoss(), codes=GradientCodes())
    x, y = torch.randn(5, 3, dtype=F64), torch.randint(2, (5,))
    step = core.encode(x, y)
    core.solve_codes(step)
    core.fill_gradients(step)
    mu = float(core.objective.mu)
    value = mu / 2 * (module[1](step.codes[0]) - step.codes[1]).square().sum() / 5
    (expected,) = torch.autograd.grad(value, module[1].layer.weight)
    torch.testing.assert_close(module[1].layer.weight.grad, expected, rtol=1e-12, atol=1e-14)


def test_a_step_function_cannot_be_trained_by_gradients_and_says_so() -> None:
    """Catches layers below a non-differentiable block staying silently untrained."""

    class Sign(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x > 0).to(x.dtype)

    core = AltMin(nn.Sequential(nn.Linear(3, 4), Sign(), nn.Linear(4, 2)), nn.CrossEntropyLoss())
    step = core.encode(torch.randn(5, 3), torch.randint(2, (5,)))
    core.solve_codes(step)  # the weights are still reached, through the graph, but the code is not: gradient zero
    assert torch.equal(step.codes[0], step.codes_forward[0])
    broken = AltMin(
        [nn.Linear(3, 4), Sign(), nn.Flatten(), nn.Linear(4, 2).requires_grad_(False)], nn.CrossEntropyLoss()
    )
    with pytest.raises(RuntimeError, match="no gradient flows through"):
        broken.step(torch.randn(5, 3), torch.randint(2, (5,)))


def test_a_sequential_with_a_forward_of_its_own_is_not_opened_as_a_sequential() -> None:
    """Catches stages that leave out the skip connection, and an error that does not say what keeps them together."""

    class Skipping(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + super().forward(x)

    with pytest.raises(ValueError, match=r"no hidden layer.*its input is read by 0 and add"):
        CodedNetwork(Skipping(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)))


def test_a_failed_constructor_leaves_the_solvers_free() -> None:
    """Catches a code solver that belongs to a model which never came to be."""
    codes, module = CurvatureCodes(), nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="names unknown stages"):
        AltMin(module, nn.CrossEntropyLoss(), codes=codes, weights=LocalGradient({"nowhere": torch.optim.Adam}))
    AltMin(module, nn.CrossEntropyLoss(), codes=codes)
