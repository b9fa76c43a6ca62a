"""Modules whose instance does something else than its type: a forward of its own, a hook, running state of any kind."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_altmin import AltMin, CoactivationMemory, CodedNetwork, LeastSquaresCodes

F64 = torch.float64


def sequential() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(),
        nn.Linear(4, 3),
    ).double()  # fmt: skip


def doubled(module: nn.Sequential) -> None:
    """Give this instance another forward."""
    module.forward = MethodType(lambda self, x: 2 * nn.Sequential.forward(self, x), module)  # type: ignore[method-assign]


@pytest.mark.parametrize("how", ["instance", "subclass", "nested", "nested hook"])
def test_a_sequential_with_a_forward_of_its_own_is_not_opened_as_one(how: str) -> None:
    """Catches the modules' order taken for a forward that was replaced on the instance, or for one with a hook."""

    class Doubled(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    module = Doubled(*sequential()) if how == "subclass" else sequential()
    if how == "instance":
        doubled(module)
    elif how == "nested":
        doubled(module[0])
    elif how == "nested hook":
        module[0].register_forward_hook(lambda m, inputs, output: 2 * output)
    core = AltMin(module, nn.CrossEntropyLoss())
    x = torch.randn(6, 5, dtype=F64)
    torch.testing.assert_close(core.coded.encode(x).output, module(x).detach(), rtol=1e-12, atol=1e-12)
    core.step(x, torch.randint(3, (6,)))
    torch.testing.assert_close(core.coded.encode(x).output, module(x).detach(), rtol=1e-12, atol=1e-12)
    assert core.coded.split_found == (how in ("instance", "subclass"))  # then the first batch is checked


def test_a_sequential_whose_own_forward_cannot_be_followed_is_refused() -> None:
    """Catches stages of the modules in order, which is not what the network computes."""
    module = sequential()
    module.forward = MethodType(lambda self, x: self[2](self[0](x if x.sum() > 0 else -x)), module)  # type: ignore[method-assign]
    with pytest.raises(TypeError, match="Sequential cannot be split: its forward cannot be traced"):
        CodedNetwork(module)


def test_a_hook_on_a_sequential_is_refused_where_it_changes_the_result() -> None:
    """Catches a hook that no stage runs and that changes what the network computes; one that only looks may stay."""
    x, y = torch.randn(6, 5, dtype=F64), torch.randint(3, (6,))
    module = sequential()
    module.register_forward_hook(lambda m, inputs, output: None)
    AltMin(module, nn.CrossEntropyLoss()).step(x, y)
    module.register_forward_hook(lambda m, inputs, output: 2 * output)
    with pytest.raises(ValueError, match="a forward hook on the Sequential changes its result"):
        AltMin(module, nn.CrossEntropyLoss()).step(x, y)


def test_looking_at_the_split_updates_no_buffer() -> None:
    """Catches running state of a block that ignores the mode, advanced by the check of the split, or blamed on it."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 5)
            self.register_buffer("calls", torch.zeros((), dtype=F64))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return self.layer(x) * self.calls

    class Traced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.block, self.last = nn.Linear(4, 5), Counting(), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.relu(self.block(self.first(x))))

    module = Traced().double()
    core = AltMin(CodedNetwork(module, blocks=["block"]), nn.CrossEntropyLoss())
    x, y = torch.randn(6, 4, dtype=F64), torch.randint(3, (6,))
    core.explain(x)
    assert float(module.block.calls) == 0
    for batches in (1, 2):
        core.step(x, y)
        assert float(module.block.calls) == batches


def _own_forward(module: nn.Sequential) -> None:
    module[2].forward = MethodType(lambda self, x: 2 * x @ self.weight.t(), module[2])


def _own_activation(module: nn.Sequential) -> None:
    module[1].forward = MethodType(lambda self, x: x.relu(), module[1])


def _hook(module: nn.Sequential) -> None:
    module[2].register_forward_hook(lambda layer, inputs, output: 2 * output)


def _memory() -> dict[str, Any]:
    return {"weights": CoactivationMemory()}


def _codes() -> dict[str, Any]:
    return {"codes": LeastSquaresCodes()}


@pytest.mark.parametrize(
    ("change", "solver", "match"),
    [
        (_own_forward, _memory, "forward of its own"),
        (_hook, _memory, "or hooks"),
        (_own_forward, _codes, r"Linear\(.* with a forward or hooks of its own"),
        (_own_activation, _codes, r"Tanh\(\) with a forward or hooks of its own"),
        (_hook, _codes, r"Linear\(.* with a forward or hooks of its own"),
    ],
)
def test_least_squares_refuses_a_layer_that_computes_more_than_its_type(
    change: Callable[[nn.Sequential], None], solver: Callable[[], dict[str, Any]], match: str
) -> None:
    """Catches least squares for W x, or the inverse of tanh, where the module computes something else."""
    module = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    AltMin(module, nn.CrossEntropyLoss(), **solver())
    change(module)
    with pytest.raises(ValueError, match=match):
        AltMin(module, nn.CrossEntropyLoss(), **solver())
