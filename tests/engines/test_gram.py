"""Gram form against autograd, its cost rule against counted multiply-adds, and where it must not be used."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_altmin import AltMin, AltMinObjective, CodedNetwork, CurvatureCodes, GradientCodes
from lightning_altmin.codes import CodeProblem, CodeSolver
from lightning_altmin.engines import StageEngine, stage_engine
from lightning_altmin.engines.gram import gram_pays
from tests.core.written_out import network


def stage(transfer: nn.Module, inputs: int = 5, outputs: int = 7) -> list[nn.Module]:
    return [transfer.double(), nn.Linear(inputs, outputs).double()]


def by_autograd(modules: list[nn.Module], base: Tensor, target: Tensor, move: Tensor) -> Tensor:
    """Of ``1/2 ||f(base + move) - f(base) - target||^2``."""
    function = nn.Sequential(*modules)
    code = (base + move).requires_grad_()
    residual = function(code) - function(base).detach() - target
    return torch.autograd.grad(residual.square().sum() / 2, code)[0]


@pytest.mark.parametrize("transfer", [nn.ReLU(), nn.Tanh(), nn.Identity(), nn.Dropout(0.0), nn.BatchNorm1d(5).eval()])
def test_gradients_are_those_of_the_coupling(transfer: nn.Module) -> None:
    """Catches a pull of the wrong sign, a Gram matrix of the wrong side, and a slope taken at the forward code."""
    modules = stage(transfer)
    engine: StageEngine = stage_engine(modules)
    base, target = torch.randn(20, 5, dtype=torch.float64), torch.randn(20, 7, dtype=torch.float64)
    _, state = engine.encode(base)
    coupling = engine.repeated_coupling(base, state, target, 4)
    assert coupling is not None
    zero = torch.zeros_like(base)
    for move in (None, torch.randn_like(base), 1e-3 * torch.randn_like(base)):
        expected = by_autograd(modules, base, target, zero if move is None else move)
        torch.testing.assert_close(coupling(move), expected, rtol=1e-11, atol=1e-12)


class Asked(CodeSolver):
    """Asks for a number of gradients and moves nothing."""

    def __init__(self, gradients: int, announced: bool) -> None:
        super().__init__()
        self.gradients, self.announced = gradients, announced

    def solve(self, problem: CodeProblem) -> Tensor:
        if self.announced:
            problem.expect(self.gradients)
        move = None
        for _ in range(self.gradients):
            problem.gradient(move)
            move = torch.zeros_like(problem.forward)
        return torch.zeros_like(problem.forward)


def multiply_adds(width: tuple[int, int], batch: int, gradients: int, announced: bool) -> int:
    below, above = width
    module = nn.Sequential(nn.Linear(2, below), nn.ReLU(), nn.Linear(below, above), nn.ReLU(), nn.Linear(above, 2))
    core = AltMin(module, nn.CrossEntropyLoss(), codes=Asked(gradients, announced))
    step = core.encode(torch.randn(batch, 2), torch.zeros(batch, dtype=torch.long))
    *_, (problem, _) = _without_solving(core, step)
    with FlopCounterMode(display=False) as counter:
        core.codes.solve(problem)
    return counter.get_total_flops() // 2


def _without_solving(core: AltMin, step: Any) -> list[tuple[CodeProblem, int]]:
    return list(core.code_problems(step))


@settings(max_examples=25, deadline=None)
@given(width=st.tuples(st.integers(2, 30), st.integers(2, 30)), batch=st.integers(1, 40), gradients=st.integers(2, 6))
def test_the_rule_takes_the_form_with_fewer_multiply_adds(width: tuple[int, int], batch: int, gradients: int) -> None:
    """Catches a rule with inputs and outputs exchanged, or one that counts a first gradient that is free."""
    plain = (2 * gradients - 1) * batch * width[0] * width[1]
    gram = batch * width[0] * width[1] + width[0] ** 2 * width[1] + (gradients - 1) * batch * width[0] ** 2
    assert multiply_adds(width, batch, gradients, announced=False) == plain
    assert multiply_adds(width, batch, gradients, announced=True) == min(plain, gram)
    assert gram_pays(batch, nn.Linear(*width), gradients) == (gram < plain)


@pytest.mark.parametrize("codes", [GradientCodes(5, 0.1, momentum=0.5), CurvatureCodes(0.5, steps=5)])
def test_a_step_is_the_same_with_and_without_it(codes: CodeSolver) -> None:
    """Catches a solver whose announcement and requests disagree; the autograd engine knows no Gram form."""
    module = network(6, 8, 9, 7, 2, activation=nn.ReLU)
    x, y = torch.randn(30, 6, dtype=torch.float64), torch.randint(2, (30,))
    moves = []
    for engine in ("closed_form", "autograd"):
        coded = CodedNetwork(copy.deepcopy(module), engine)
        core = AltMin(coded, nn.CrossEntropyLoss(), AltMinObjective(mu=0.5), copy.deepcopy(codes))
        for _ in range(2):
            step = core.step(x, y)
        moves.append(step.moves)
    for ours, theirs in zip(*moves, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


class Huber(AltMinObjective):
    def code_coupling_gradient(self, residual: Tensor) -> Tensor:
        return residual.clamp(-0.1, 0.1)


def test_another_coupling_keeps_its_own_gradient() -> None:
    """Catches a Gram form used for an objective whose coupling is not a square."""
    assert AltMinObjective().couples_by_squares
    assert not Huber().couples_by_squares
    assert not AltMinObjective.reference().couples_by_squares


def test_sixteen_bits_and_normalised_stages_take_the_plain_form() -> None:
    """Catches W^T W a - W^T t in bfloat16, where the difference is rounding, and a normalisation that is left out."""
    base, target = torch.randn(20, 5), torch.randn(20, 5)
    modules: list[nn.Module] = [nn.ReLU(), nn.Linear(5, 5)]
    engine = stage_engine(modules)
    _, state = engine.encode(base)
    assert engine.repeated_coupling(base, state, target, 4) is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert engine.repeated_coupling(base, state, target, 4) is None
    normalised = stage_engine([*modules, nn.BatchNorm1d(5)])
    _, state = normalised.encode(base)
    assert normalised.repeated_coupling(base, state, target, 4) is None
