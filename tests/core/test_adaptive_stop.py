"""Closed form: where a gradient shrinks by a known factor per step, the adaptive stop comes after a known step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_altmin import AltMin, AltMinObjective, CodedNetwork, GradientCodes
from tests.core.written_out import batch, convolutional, network


def halving() -> tuple[nn.Sequential, Tensor, Tensor]:
    """The lower code's gradient is ``2 move - t``: steps at rate 1/4 halve it."""
    module = network(5, 4, 4, 3, activation=nn.Identity)
    with torch.no_grad():
        module[2].weight.copy_(torch.eye(4))
    x, y = batch(module)
    return module, x, y


def moves(module: nn.Module, codes: GradientCodes, x: Tensor, y: Tensor, engine: str = "auto") -> list[Tensor]:
    core = AltMin(CodedNetwork(module, engine), nn.CrossEntropyLoss(), AltMinObjective(mu=0.7), codes)
    step = core.encode(x, y)
    core.solve_codes(step)
    return step.moves


@pytest.mark.parametrize("engine", ["closed_form", "autograd"])
@pytest.mark.parametrize(("tol", "steps"), [(0.6, 1), (0.4, 2), (0.2, 3), (0.1, 4)])
def test_it_stops_at_the_first_gradient_below_the_tolerance(tol: float, steps: int, engine: str) -> None:
    """Catches a stop one step early or late, squared norms compared with tol itself, and steps ignored as a maximum.

    The gradient's norms are 1, 1/2, 1/4, ... of the first; after n steps the move is (1 - 2^-n) t / 2.
    """
    module, x, y = halving()
    top = moves(module, GradientCodes(20, 0.25, tol=tol), x, y, engine)[1]
    stopped = moves(module, GradientCodes(20, 0.25, tol=tol), x, y, engine)[0]
    torch.testing.assert_close(stopped, (1 - 0.5**steps) * top / 2, rtol=1e-12, atol=1e-14)
    capped = moves(module, GradientCodes(min(2, steps), 0.25, tol=tol), x, y, engine)
    torch.testing.assert_close(capped[0], (1 - 0.5 ** min(2, steps)) * capped[1] / 2, rtol=1e-12, atol=1e-14)


def test_no_step_is_computed_after_the_last_sample_has_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an adaptive stop that saves nothing: the lower code needs 3 steps, so 4 gradients."""
    from lightning_altmin.codes import CodeProblem

    module, x, y = halving()
    levels = []
    gradient = CodeProblem.gradient
    monkeypatch.setattr(CodeProblem, "gradient", lambda p, move=None: levels.append(p.level) or gradient(p, move))
    moves(module, GradientCodes(20, 0.25, tol=0.2), x, y)
    assert levels.count(0) == 4


@pytest.mark.parametrize("make", [lambda: network(5, 7, 6, 4), convolutional], ids=["mlp", "conv"])
@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_each_sample_stops_by_itself(make: object, momentum: float) -> None:
    """Catches a norm over the batch: a sample's move must not depend on the batch it came in."""
    module = make()  # type: ignore[operator]
    x, y = batch(module)

    def codes() -> GradientCodes:
        return GradientCodes(12, 0.2, momentum=momentum, tol=0.3)

    together = moves(module, codes(), x, y)
    alone = [moves(module, codes(), x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
    for level, code_moves in enumerate(together):
        expected = torch.cat([sample[level] for sample in alone])
        torch.testing.assert_close(code_moves, expected, rtol=1e-12, atol=1e-14)


def test_a_sample_without_gradient_stays() -> None:
    """Catches a division by the first gradient's norm, or an endless wait for a sample that is where it should be."""
    module, x, y = halving()
    with torch.no_grad():
        module[4].weight.zero_()
    for move in moves(module, GradientCodes(20, 0.25, tol=0.2), x, y):
        assert torch.equal(move, torch.zeros_like(move))


def test_steps_are_counted_for_each_sample_and_averaged() -> None:
    """Catches the maximum of the batch in place of the mean, and a count of gradients in place of steps.

    The lower code's samples need 3 steps each (halved until below 0.2); one sample that has no gradient needs none
    after its first, so 2 samples of which one is still make (3 + 1) / 2.
    """
    module, x, y = halving()
    core = AltMin(module, nn.CrossEntropyLoss(), AltMinObjective(mu=0.7), GradientCodes(20, 0.25, tol=0.2))
    step = core.encode(x, y)
    core.solve_codes(step)
    assert float(step.code_steps[0]) == 3.0  # type: ignore[arg-type]
    problem = list(core.code_problems(step))[1][0]
    assert problem.target_move is not None
    problem.target_move = problem.target_move[:2] * torch.tensor([[1.0], [0.0]])
    problem.forward, problem.forward_output = problem.forward[:2], problem.forward_output[:2]
    core.codes.solve(problem)
    assert float(problem.steps) == 2.0  # type: ignore[arg-type]
    core = AltMin(module, nn.CrossEntropyLoss(), codes=GradientCodes(3, 0.25))
    assert core.step(x, y).code_steps == [None, None]
