"""Closed form: on a quadratic problem the default code step ends where the derivative along its line is zero."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_altmin import AltMin, AltMinObjective, CodedNetwork
from lightning_altmin.codes import CodeProblem, LineSearchCodes
from tests.core.written_out import Constants, StageFunction, batch, convolutional, network, objective, stage_functions


def squared_error_total(output: Tensor, y: Tensor) -> Tensor:
    return (output - y).square().flatten(1).mean(1).sum()


def quadratic() -> tuple[nn.Sequential, list[StageFunction], Tensor, Tensor]:
    """Linear stages and a squared error: every code's problem is a convex quadratic."""
    module = network(5, 7, 6, 4, activation=nn.Identity)
    x, _ = batch(module)
    return module, stage_functions(module), x, torch.randn(len(x), 4, dtype=torch.float64)


def core_for(module: nn.Module, mu: float, loss: Any, engine: str = "auto") -> AltMin:
    return AltMin(CodedNetwork(module, engine), loss, AltMinObjective(mu=mu), LineSearchCodes())


def problems(core: AltMin, x: Tensor, y: Any) -> list[tuple[CodeProblem, int]]:
    """Every code's problem of one sweep, with the codes above moved."""
    step, found = core.encode(x, y), []
    with torch.no_grad():
        for problem, level in core.code_problems(step):
            found.append((problem, level))
            step.moves[level] = core.codes.solve(problem)
    return found


@pytest.mark.parametrize("engine", ["closed_form", "autograd"])
@pytest.mark.parametrize("mu", [0.01, 1.0, 30.0])
def test_the_step_is_exact_for_every_sample(mu: float, engine: str) -> None:
    """Catches a step length that is wrong, shared by the batch, or computed at the wrong point.

    At the exact optimum along a sample's gradient g the new gradient of J (by autograd) is orthogonal to g.
    """
    module, functions, x, y = quadratic()
    core = core_for(module, mu, nn.MSELoss(), engine)
    step = core.encode(x, y)
    codes = list(step.codes_forward)
    for level in (1, 0):
        gradients = []
        for _ in range(2):
            leaf = codes[level].clone().requires_grad_()
            value = objective(
                functions, x, y, [*codes[:level], leaf, *codes[level + 1 :]], squared_error_total, at_(mu)
            )
            gradients.append(torch.autograd.grad(value, leaf)[0])
            if len(gradients) == 1:
                core.solve_codes(step)
                before, codes[level] = codes[level], step.codes[level]
        move = codes[level] - before
        lengths = -(move * gradients[0]).sum(1) / gradients[0].square().sum(1) * mu
        torch.testing.assert_close(move, -(lengths / mu).unsqueeze(1) * gradients[0], rtol=1e-9, atol=1e-12)
        assert bool(((lengths > 0) & (lengths <= 1)).all())
        cosine = torch.cosine_similarity(gradients[0], gradients[1], dim=1)
        assert float(cosine.abs().max()) < 1e-8


def at_(mu: float) -> Constants:
    return Constants(mu=mu)


@pytest.mark.parametrize("mu", [0.01, 1.0, 30.0])
def test_the_curvature_is_the_hessian_of_the_objective(mu: float) -> None:
    """Catches a curvature without the anchor, without 1 / mu, or summed over the batch: autograd's Hessian of J."""
    module, functions, x, y = quadratic()
    core = core_for(module, mu, nn.MSELoss())
    for problem, level in problems(core, x, y):
        direction = torch.randn_like(problem.forward)
        with torch.no_grad():
            curvature = problem.curvature(direction)
            elsewhere = problem.curvature(direction, torch.ones_like(problem.forward))
        torch.testing.assert_close(elsewhere, curvature, rtol=1e-9, atol=1e-9)
        for sample in range(len(x)):

            def value(code: Tensor, sample: int = sample, level: int = level, problem: CodeProblem = problem) -> Tensor:
                output = functions[level + 1](code.unsqueeze(0))
                if problem.is_top:
                    above = squared_error_total(output, y[sample : sample + 1])
                else:
                    above = mu / 2 * (output - problem.target[sample]).square().sum()
                return above + mu / 2 * (code - problem.forward[sample]).square().sum()

            hessian = torch.autograd.functional.hessian(value, problem.forward[sample])
            expected = direction[sample] @ hessian @ direction[sample] / mu
            torch.testing.assert_close(curvature[sample], expected, rtol=1e-9, atol=1e-9)


def test_a_samples_codes_do_not_depend_on_its_batch() -> None:
    """Catches one step length for the whole batch, also for images."""
    module = convolutional()
    x, y = batch(module, 5)
    core = core_for(module, 0.3, nn.CrossEntropyLoss())
    parts = []
    for rows in (slice(0, 5), slice(0, 2), slice(2, 5)):
        step = core.encode(x[rows], y[rows])
        core.solve_codes(step)
        parts.append(step.codes)
    for whole, first, rest in zip(*parts, strict=True):
        torch.testing.assert_close(torch.cat([first, rest]), whole, rtol=1e-12, atol=1e-12)


def test_a_sample_without_gradient_stays_where_it_is() -> None:
    """Catches 0 / 0: where the prediction is already right, nothing moves and nothing is NaN."""
    module, _, x, _ = quadratic()
    y = module(x).detach()
    y[1:] += 1.0
    core = core_for(module, 0.3, nn.MSELoss())
    step = core.encode(x, y)
    core.solve_codes(step)
    for forward, moved in zip(step.codes_forward, step.codes, strict=True):
        torch.testing.assert_close(moved[0], forward[0], rtol=1e-9, atol=1e-9)
        assert not bool((moved[1:] == forward[1:]).all(1).any())
        assert bool(moved.isfinite().all())


@pytest.mark.parametrize("steps", [0, -1, 1.5])
def test_steps_must_be_a_positive_integer(steps: Any) -> None:
    """Catches a setting that fails at the first batch, or moves no code at all."""
    with pytest.raises(ValueError, match=f"steps must be an integer >= 1, got {steps}"):
        LineSearchCodes(steps)


def test_more_steps_lower_the_problem_further() -> None:
    """Catches steps that start again from the forward code: on a quadratic each exact step lowers the value."""
    module, _, x, y = quadratic()
    values = []
    for steps in (1, 2, 4):
        core = AltMin(module, nn.MSELoss(), AltMinObjective(mu=0.05), LineSearchCodes(steps))
        with torch.no_grad():
            problem, _ = next(core.code_problems(core.encode(x, y)))
            values.append(float(problem.value(core.codes.solve(problem))))
    assert values[0] > values[1] > values[2]
    assert "steps=4" in repr(core.codes)
