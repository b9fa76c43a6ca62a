"""Least-squares codes: each of the two sub-solves against brute force or a dense solver, and what they are for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_altmin import AltMin, AltMinObjective, CodedNetwork, CurvatureCodes, LeastSquaresCodes
from lightning_altmin.codes.elementwise import activation_move
from lightning_altmin.codes.least_squares import damped_least_squares
from lightning_altmin.nn import MLP, LeNet5
from tests.core.written_out import batch, network

ACTIVATIONS = {
    "identity": nn.Identity(),
    "relu": nn.ReLU(),
    "leaky": nn.LeakyReLU(0.2),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "softplus": nn.Softplus(),
}


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (6, 6)])
@pytest.mark.parametrize("damping", [1e-3, 1.0, 50.0])
def test_the_linear_solve_is_the_least_squares_solution(shape: tuple[int, int], damping: float) -> None:
    """Catches the wrong side's Gram matrix, a damping that is squared or left out: numpy solves the stacked system."""
    weight, target = torch.randn(*shape, dtype=torch.float64), torch.randn(5, shape[0], dtype=torch.float64)
    stacked = np.vstack([weight.numpy(), damping**0.5 * np.eye(shape[1])])
    wanted = np.hstack([target.numpy(), np.zeros((5, shape[1]))])
    expected = np.linalg.lstsq(stacked, wanted.T, rcond=None)[0].T
    found = damped_least_squares(weight, target, damping)
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-9, atol=1e-9)


def cost(activation: nn.Module, code: Tensor, change: Tensor, weight: float, move: Tensor) -> Tensor:
    return (activation(code + move) - activation(code) - change).square() + weight * move.square()


@pytest.mark.parametrize("name", ACTIVATIONS)
@given(
    code=st.floats(-6, 6),
    change=st.floats(-2, 2),
    weight=st.sampled_from([0.1, 0.3, 1.0, 10.0]),
)
@settings(max_examples=60, deadline=None)
def test_the_elementwise_solve_is_the_global_optimum(name: str, code: float, change: float, weight: float) -> None:
    """Catches a swapped case, a side's optimum outside the side, a local minimum, Newton steps that do not arrive.

    Brute force: no move among 20 001, over everything that could cost less than staying, costs less.
    """
    activation = ACTIVATIONS[name]
    c, d = torch.tensor([[code], [change]], dtype=torch.float64)
    move = activation_move(activation, c, d, weight)
    others = torch.linspace(-1, 1, 20_001, dtype=torch.float64) * abs(change) / weight**0.5
    least = cost(activation, c, d, weight, others).min()
    assert float(cost(activation, c, d, weight, move)) <= float(least) * (1 + 1e-5) + 1e-14


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_small_changes_keep_their_digits(name: str) -> None:
    """Catches a move found as the difference of two codes: 1e-12 beside a code of 1 is beyond single precision."""
    activation, code = ACTIVATIONS[name], torch.tensor([0.7, 1.3])
    change = torch.tensor([1e-12, -3e-12])
    double = code.double().requires_grad_()
    (slope,) = torch.autograd.grad(activation(double).sum(), double)
    expected = slope * change / (slope**2 + 0.1)  # the optimum, to first order in the change
    found = activation_move(activation, code, change, 0.1)
    if name in ("identity", "relu", "leaky"):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    else:  # s(c + m) - s(c) is rounding noise there, whose share of the move is bounded by its size
        assert float((found - expected).abs().max()) < 1e-6


def problems(core: AltMin, x: Tensor, y: Any) -> list[Any]:
    step, found = core.encode(x, y), []
    with torch.no_grad():
        for problem, level in core.code_problems(step):
            step.moves[level] = core.codes.solve(problem)
            found.append((problem, step.moves[level]))
    return found


def test_without_prices_a_linear_network_meets_its_targets() -> None:
    """Catches a step that undershoots, or asks the wrong layer: W (c_l - c_l^f) is then the move of the code above.

    The top one is the output's gradient step, (p - onehot) / mu for cross-entropy.
    """
    module = network(5, 9, 8, 6, 4, activation=nn.Identity)
    x, y = batch(module)
    core = AltMin(module, nn.CrossEntropyLoss(), AltMinObjective(mu=0.7), LeastSquaresCodes(1e-12, 1e-12))
    linears = [m for m in module if isinstance(m, nn.Linear)]
    wanted = (nn.functional.one_hot(y, 4) - module(x).detach().softmax(1)) / 0.7
    for linear, (_, move) in zip(reversed(linears), problems(core, x, y), strict=False):
        torch.testing.assert_close(move @ linear.weight.detach().t(), wanted, rtol=1e-6, atol=1e-8)
        wanted = move


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Sigmoid, nn.Tanh])
def test_the_two_solves_in_a_row_are_the_step(activation: type[nn.Module]) -> None:
    """Catches solves in the wrong order or at the wrong code: both are minimised here by autograd and scipy."""
    from scipy.optimize import minimize

    module = network(5, 4, 3, 4, activation=activation)
    x, y = batch(module, 3)
    damping, weight = 0.3, 0.2
    core = AltMin(module, nn.CrossEntropyLoss(), AltMinObjective(mu=1.0), LeastSquaresCodes(damping, weight))
    problem, move = problems(core, x, y)[1]
    matrix = module[2].weight.detach()
    for row in range(3):
        target = problem.target_move[row].numpy()
        first = minimize(
            lambda d, t=target: ((matrix.numpy() @ d - t) ** 2).sum() + damping * (d**2).sum(), np.zeros(4), tol=1e-12
        )
        act, code = activation(), problem.forward[row]
        assert problem.forward.shape == move.shape
        for unit in range(4):
            grid = torch.linspace(-6, 6, 240_001, dtype=torch.float64)
            costs = cost(act, code[unit], torch.tensor(first.x[unit]), weight, grid)
            torch.testing.assert_close(move[row, unit], grid[costs.argmin()], rtol=0, atol=2e-4)


def test_the_pair_lowers_the_problem_but_is_not_its_optimum() -> None:
    """Catches documentation that promises more than is true, and a step that raises what it is to lower."""
    module = network(6, 9, 8, 7, 4)
    x, y = batch(module)
    core = AltMin(module, nn.CrossEntropyLoss(), AltMinObjective(mu=1.0), LeastSquaresCodes())
    problem, move = problems(core, x, y)[1]
    with torch.no_grad():
        assert float(problem.value(move)) < float(problem.value())
        assert float(problem.gradient(move).norm()) > 1e-6


def test_the_signal_does_not_shrink_with_depth_where_backprops_does() -> None:
    """Catches a pseudo-inverse that is a transpose: in a 12-layer sigmoid network backprop's signal falls 1e9-fold."""
    torch.manual_seed(0)
    shares = {}
    for name, codes in (("gradient", CurvatureCodes()), ("least squares", LeastSquaresCodes(1e-3, 1e-3))):
        core = AltMin(MLP(20, [30] * 12, 5, activation="sigmoid").double(), nn.CrossEntropyLoss(), codes=codes)
        x, y = torch.randn(40, 20, dtype=torch.float64), torch.randint(5, (40,))
        step = core.encode(x, y)
        core.solve_codes(step)
        shares[name] = float(step.moves[0].norm() / step.moves[-1].norm())
    assert shares["gradient"] < 1e-6
    assert shares["least squares"] > 1e-2


def test_engines_agree() -> None:
    """Catches a solver that reads something of the closed-form engine."""
    module = network(6, 9, 8, 4)
    x, y = batch(module)
    moves = []
    for engine in ("closed_form", "autograd"):
        core = AltMin(CodedNetwork(module, engine), nn.CrossEntropyLoss(), codes=LeastSquaresCodes())
        core.verify(x, y)
        moves.append([move for _, move in problems(core, x, y)])
    for ours, theirs in zip(*moves, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_what_it_cannot_solve_is_refused_by_name() -> None:
    """Catches a pooling, normalisation, dropout or l1 term that is silently ignored."""
    conv = nn.Sequential(nn.Linear(4, 8), nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 2, 3), nn.ReLU(), nn.Linear(6, 3))
    for module, culprit in (
        (LeNet5(), "MaxPool2d"),
        (MLP(8, [6, 5], 3, batch_norm=True), "BatchNorm1d"),
        (MLP(8, [6, 5], 3, dropout=0.1), "Dropout"),
        (MLP(8, [6, 5], 3, activation="gelu"), "GELU"),
        (conv, "Unflatten"),
    ):
        with pytest.raises(ValueError, match=f"(?s)LeastSquaresCodes needs one activation.*has {culprit}"):
            AltMin(module, nn.CrossEntropyLoss(), codes=LeastSquaresCodes())
    with pytest.raises(ValueError, match=r"lambda_c=0\.1 must be 0"):
        AltMin(MLP(8, [6], 3), nn.CrossEntropyLoss(), AltMinObjective(lambda_c=0.1), LeastSquaresCodes())
    with pytest.raises(ValueError, match="ReferenceObjective has a code_coupling_gradient of its own"):
        AltMin(MLP(8, [6], 3), nn.CrossEntropyLoss(), AltMinObjective.reference(), LeastSquaresCodes())


@pytest.mark.parametrize("arguments", [{"damping": 0.0}, {"weight": -1.0}, {"weight": float("nan")}])
def test_prices_must_be_positive(arguments: dict[str, float]) -> None:
    """Catches a singular system at the first batch."""
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be a positive number"):
        LeastSquaresCodes(**arguments)
