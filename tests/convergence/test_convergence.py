"""The error of online AltMin near an optimum, against the theory of docs/convergence.md: its slope and its constant."""

from __future__ import annotations

import importlib
import math
import statistics
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def harness() -> ModuleType:
    """``examples/convergence.py``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        return importlib.import_module("convergence")


@pytest.fixture(scope="module")
def problem(harness: ModuleType) -> object:
    return harness.Problem()


@pytest.fixture(scope="module")
def theory(harness: ModuleType, problem: object) -> object:
    return harness.Theory.of(problem)


def test_the_update_of_the_population_is_the_mean_over_batches(problem: object) -> None:
    """Catches codes that depend on their batch, or a mean that is none: the root would not be where steps lead."""
    weights = problem.optimum + 0.2  # type: ignore[attr-defined]
    singles = [problem.update(weights, x[None], y[None]) for x, y in zip(problem.x, problem.y, strict=True)]  # type: ignore[attr-defined]
    torch.testing.assert_close(torch.stack(singles).mean(0), problem.field(weights), rtol=0, atol=1e-12)  # type: ignore[attr-defined]


def test_the_assumptions_hold_at_the_optimum(problem: object, theory: object) -> None:
    """Catches a problem that is not what the theorem is about, in which case the other tests would say nothing.

    Block-wise strong convexity less the coupling bounds the whole's modulus from below, with two blocks.
    """
    assert float(problem.field(problem.optimum).norm()) < 1e-12  # type: ignore[attr-defined]
    assert theory.own > theory.coupling > 0  # type: ignore[attr-defined]
    assert theory.own - theory.coupling <= theory.monotone <= theory.modulus + 1e-9  # type: ignore[attr-defined]


def test_the_error_falls_like_one_over_t_with_the_predicted_constant(
    harness: ModuleType, problem: object, theory: object
) -> None:
    """Catches a step that does not average its noise out: a gradient with a bias, a stale code, a wrong sign.

    Over the last factor of ten the slope is -1. The mean of t |w_t - w*|^2 over its marks and seeds is the trace of
    the Lyapunov equation's solution. Seeds are fixed; bounds are about four standard errors.
    """
    steps = 1000
    runs = [harness.run(problem, theory, "1/t", seed, steps) for seed in range(6)]
    mean, _ = harness.slopes(runs, steps // 10)
    assert -1.4 < mean < -0.6
    t0 = 2 * theory.steepest / theory.modulus  # type: ignore[attr-defined]
    scaled = [statistics.mean((t + t0) * e for t, e in errors.items() if t >= steps // 10) for errors in runs]
    error = statistics.stdev(scaled) / math.sqrt(len(scaled))
    assert abs(statistics.mean(scaled) - theory.limit) < 4 * error  # type: ignore[attr-defined]
    assert error < 0.25 * theory.limit  # type: ignore[attr-defined]  # or the line above says nothing


def test_a_constant_rate_does_not_converge(harness: ModuleType, problem: object, theory: object) -> None:
    """Catches a measure that falls whatever the steps do."""
    runs = [harness.run(problem, theory, "constant", seed, 400) for seed in range(3)]
    mean, _ = harness.slopes(runs, 40)
    assert mean > -0.4
