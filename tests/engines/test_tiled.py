"""Coupling through the pooling of tiles: autograd as oracle, and where its order of entries must not be used."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_altmin import AltMin, AltMinObjective, CodedNetwork, CurvatureCodes, GradientCodes
from lightning_altmin.codes import CodeSolver
from lightning_altmin.engines import stage_engine
from tests.engines.test_gram import by_autograd

STAGES: dict[str, tuple[list[nn.Module], tuple[int, ...]]] = {
    "conv": ([nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(3, 4, 2)], (5, 3, 6, 4)),
    "oblong": ([nn.MaxPool2d((1, 3)), nn.Conv2d(3, 4, 2)], (5, 3, 4, 6)),
    "gram": ([nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 20)], (30, 3, 4, 4)),
    "plain-linear": ([nn.ReLU(), nn.MaxPool2d((3, 2)), nn.Flatten(), nn.Linear(12, 2)], (3, 3, 6, 4)),
}


def by_entries(image: Tensor, height: int, width: int) -> Tensor:
    """Written out: entry r, c of every tile, one after the other along rows."""
    entries = [image[:, :, r::height, c::width] for r in range(height) for c in range(width)]
    return torch.stack(entries, 1)


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("ties", [False, True])
def test_gradients_are_those_of_the_coupling(name: str, ties: bool) -> None:
    """Catches entries in another order, a maximum of the wrong tile, and a gradient that goes to two equal entries."""
    modules, shape = STAGES[name]
    modules = [copy.deepcopy(module).double() for module in modules]
    (pool,) = [module for module in modules if isinstance(module, nn.MaxPool2d)]
    height, width = (pool.kernel_size,) * 2 if isinstance(pool.kernel_size, int) else pool.kernel_size
    base = torch.randn(shape, dtype=torch.float64)
    base = base.round() if ties else base
    engine = stage_engine(modules)
    output, state = engine.encode(base)
    target = torch.randn_like(output)
    coupling = engine.repeated_coupling(base, state, target, 4, any_order=True)
    assert coupling is not None
    for move in (torch.zeros_like(base), torch.randn_like(base), 1e-3 * torch.randn_like(base)):
        expected = by_autograd(modules, base, target, move)
        arranged = by_entries(move, height, width)
        kept = arranged.clone()
        with torch.no_grad():
            gradient = coupling(arranged)
        torch.testing.assert_close(gradient, by_entries(expected, height, width), rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(coupling.restored(gradient), expected, rtol=1e-11, atol=1e-12)
        assert torch.equal(arranged, kept)
    unmoved = by_autograd(modules, base, target, torch.zeros_like(base))
    for _ in range(2):  # twice: the first must leave nothing behind
        with torch.no_grad():
            gradient = coupling(None)
        torch.testing.assert_close(coupling.restored(gradient), unmoved, rtol=1e-11, atol=1e-12)


def lenet() -> nn.Sequential:
    """Pooled twice, before a convolution and before a linear layer; of images of 13 the first leaves something over."""
    parts = [nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(16, 9), nn.Tanh(), nn.Linear(9, 3)).double()


@pytest.mark.parametrize(
    "codes",
    [
        CurvatureCodes(0.5, steps=4),
        GradientCodes(4, 0.1, momentum=0.5),
        GradientCodes(4, 0.1, momentum=0.5, nesterov=True),
        GradientCodes(9, 0.3, tol=0.5),
    ],
    ids=["curvature", "momentum", "nesterov", "stopping"],
)
@pytest.mark.parametrize(("lambda_c", "size"), [(0.0, 12), (1e-3, 12), (0.0, 13)])
def test_moves_are_those_of_the_autograd_engine(codes: CodeSolver, lambda_c: float, size: int) -> None:
    """Catches a move that is not put back in order, and code steps that mix both orders (measuring, an l1 term).

    Batches 0 to 4 measure and 5 to 7 do not, so both ways are taken.
    """
    network, moves = lenet(), []
    batches = [(torch.randn(6, 1, size, size, dtype=torch.float64), torch.randint(3, (6,))) for _ in range(8)]
    for engine in ("closed_form", "autograd"):
        coded = CodedNetwork(copy.deepcopy(network), engine)
        objective = AltMinObjective(mu=0.5, lambda_c=lambda_c)
        core = AltMin(coded, nn.CrossEntropyLoss(), objective, copy.deepcopy(codes))
        moves.append([core.step(*batch).moves for batch in batches])
    for ours, theirs in zip(*moves, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.shape == other.shape
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


class Uneven(AltMinObjective):
    """Anchors the left half of an image only."""

    def code_anchor_gradient(self, displacement: Tensor) -> Tensor | None:
        return displacement * (torch.arange(displacement.shape[-1]) < displacement.shape[-1] // 2)


def test_what_tells_entries_apart_keeps_the_order_of_the_code() -> None:
    """Catches an anchor by place, or tiles that leave something out, being given entries in another order."""
    assert AltMinObjective().treats_entries_alike
    assert not AltMinObjective(lambda_c=0.1).treats_entries_alike
    assert not Uneven().treats_entries_alike
    for shape, tiles in (((2, 1, 4, 4), True), ((2, 1, 5, 4), False), ((2, 1, 4, 5), False)):
        engine = stage_engine([nn.MaxPool2d(2), nn.Conv2d(1, 1, 1)])
        output, state = engine.encode(torch.randn(shape))
        arguments = (torch.randn(shape), state, torch.randn_like(output), 4)
        assert engine.repeated_coupling(*arguments) is None
        assert (engine.repeated_coupling(*arguments, any_order=True) is not None) is tiles
