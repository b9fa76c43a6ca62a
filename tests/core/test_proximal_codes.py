"""Proximal codes against the lasso's optimality conditions, and the exact zeros that they are for."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_altmin import AltMin, AltMinObjective, CodedNetwork, GradientCodes, LocalGradient, ProximalCodes
from lightning_altmin.codes import CodeProblem, CodeSolver
from tests.core.written_out import batch, network

MU, LAMBDA = 0.7, 0.4


def linear_problem(codes: CodeSolver, engine: str = "auto", lambda_c: float = LAMBDA) -> tuple[CodeProblem, Tensor]:
    """The lower code of a linear network, a lasso with matrix W, and the move that the solver finds.

    The code above is moved by one and the same solver, so that the problem does not depend on ``codes``.
    """
    torch.manual_seed(0)
    module = network(5, 6, 8, 4, activation=nn.Identity)
    x, y = batch(module)
    above = GradientCodes(3, 0.2)
    core = AltMin(CodedNetwork(module, engine), nn.CrossEntropyLoss(), AltMinObjective(MU, lambda_c), above)
    step = core.encode(x, y)
    with torch.no_grad():
        problems = core.code_problems(step)
        step.moves[1] = above.solve(next(problems)[0])
        problem = next(problems)[0]
        return problem, codes.solve(problem)


@pytest.mark.parametrize("engine", ["closed_form", "autograd"])
@pytest.mark.parametrize("accelerated", [True, False])
def test_it_converges_to_the_lasso_solution(accelerated: bool, engine: str) -> None:
    """Catches a threshold without the rate, without 1 / mu, or on the move: the optimality conditions of the lasso.

    Zero entries have |g| <= lambda / mu, the others g = -sign(c) lambda / mu, with g written out from W.
    """
    problem, move = linear_problem(ProximalCodes(3000, 0.2, accelerated), engine)
    weight = problem.above.affine[0].weight.detach()
    code = problem.forward + move
    gradient = (move @ weight.t() - problem.target_move) @ weight + move
    zero = code == 0
    assert 0.1 < float(zero.double().mean()) < 0.9  # both kinds occur, or the test says nothing
    assert float(gradient[zero].abs().max()) <= LAMBDA / MU + 1e-9
    torch.testing.assert_close(gradient[~zero], -code[~zero].sign() * LAMBDA / MU, rtol=0, atol=1e-8)


def test_plain_steps_never_raise_the_problem() -> None:
    """Catches a step that is not a proximal one: below 1 / (1 + ||W||^2) the value falls with every step."""
    values = []
    for steps in range(1, 15):
        problem, move = linear_problem(ProximalCodes(steps, 0.2, accelerated=False))
        assert 1 / (1 + float(torch.linalg.matrix_norm(problem.above.affine[0].weight.detach(), 2)) ** 2) >= 0.2
        with torch.no_grad():
            values.append(float(problem.value(move)))
    with torch.no_grad():
        values.insert(0, float(problem.value()))
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(values))
    assert values[-1] < values[0]


def test_acceleration_is_faster() -> None:
    """Catches an extrapolation that does nothing or harms: the gap to the optimum after 15 small steps."""
    gaps = {}
    with torch.no_grad():
        problem, best = linear_problem(ProximalCodes(4000, 0.2))
        optimum = float(problem.value(best))
        for accelerated in (True, False):
            problem, move = linear_problem(ProximalCodes(15, 0.03, accelerated))
            gaps[accelerated] = float(problem.value(move)) - optimum
    assert 0 <= gaps[True] < gaps[False] / 2


def test_without_l1_plain_steps_are_gradient_steps() -> None:
    """Catches a threshold of a term that is not there."""
    moves = [linear_problem(s, lambda_c=0.0)[1] for s in (ProximalCodes(4, 0.2, False), GradientCodes(4, 0.2))]
    torch.testing.assert_close(moves[0], moves[1], rtol=1e-12, atol=1e-14)


def test_codes_hold_exact_zeros_in_single_precision_where_subgradients_hold_none() -> None:
    """Catches a zero that is stored as a move and comes back as rounding noise; the sign of noise is not zero."""
    shares = {}
    for codes in (ProximalCodes(), GradientCodes(10, 0.2)):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(6, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 3))
        core = AltMin(module, nn.CrossEntropyLoss(), AltMinObjective(1.0, 0.3), codes, LocalGradient())
        step = core.step(torch.randn(32, 6), torch.randint(3, (32,)))
        shares[type(codes)] = float((step.codes[0] == 0).double().mean())
    assert shares[ProximalCodes] > 0.3
    assert shares[GradientCodes] == 0


@pytest.mark.parametrize(("name", "value"), [("steps", 0), ("lr", 0.0), ("lr", float("inf"))])
def test_settings_out_of_range_are_refused(name: str, value: Any) -> None:
    """Catches a setting that fails at the first batch."""
    with pytest.raises(ValueError, match=f"{name} must be"):
        ProximalCodes(**{name: value})
