"""The error of online AltMin near an optimum, against the theory of docs/convergence.md: its slope and its size.

Chance decides how far measured and predicted values are apart. Their standard deviation for a number of seeds comes
from the predicted covariance over steps (`Prediction`), and the bounds are `SIGMAS` of them.
"""

from __future__ import annotations

import importlib
import statistics
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
SIGMAS = 3.3  # with other seeds, chance fails an assertion once in a thousand times


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
    assert theory.own - theory.coupling <= theory.modulus <= theory.slowest + 1e-9  # type: ignore[attr-defined]


def test_the_docs_describe_the_problem(harness: ModuleType, problem: object, theory: object) -> None:
    """Catches a page that explains the slopes by a noise, or by a start, that the problem does not have."""
    hidden = problem.optimum[:12].reshape(3, 4)  # type: ignore[attr-defined]
    torch.testing.assert_close(hidden, hidden[:1].expand(3, 4))  # equal units
    values, vectors = np.linalg.eigh(theory.noise)  # type: ignore[attr-defined]
    noisy = vectors[:, values > 1e-9]
    inside = noisy.T @ theory.jacobian @ noisy  # type: ignore[attr-defined]
    assert noisy.shape == (18, 6)
    np.testing.assert_allclose(theory.jacobian @ noisy, noisy @ inside, atol=1e-8)  # type: ignore[attr-defined]
    assert np.linalg.eigvals(inside).real.min() > 4 * theory.slowest  # type: ignore[attr-defined]
    assert harness.START**2 * theory.offset < theory.limit  # type: ignore[attr-defined]
    assert theory.window == pytest.approx(9 * theory.offset)  # type: ignore[attr-defined]


def test_the_prediction_has_the_limits_of_the_derivation(theory: object) -> None:
    """Catches a recursion that is not that of the docs: its limits are known without iterating it.

    Under "1/t", (t + t0) E|w - w*|^2 tends to the trace of the Lyapunov equation's solution; what is left of the
    transient is t0 / (t + t0) of it at most, and in the window the slope is -1 up to that. Under "slow" the slope is
    between that of the slowest direction and that of the noise. At a constant rate the moment is stationary.
    """
    marks = [*range(110, 1000, 30), 5000]
    first = theory.window  # type: ignore[attr-defined]
    t0 = theory.offset  # type: ignore[attr-defined]
    decay, slow, constant = (theory.predict(name, marks).at(first) for name in ("1/t", "slow", "constant"))  # type: ignore[attr-defined]
    assert abs((5000 + t0) * decay.mean[-1] / theory.limit - 1) < t0 / (5000 + t0)  # type: ignore[attr-defined]
    assert abs(decay.slope() + 1) < 0.1
    assert -1 < slow.slope() < -0.5
    step = np.eye(18) - theory.rate("constant")(1) * theory.jacobian  # type: ignore[attr-defined]
    noise = theory.rate("constant")(1) ** 2 * theory.noise  # type: ignore[attr-defined]
    moment = np.linalg.solve(np.eye(18**2) - np.kron(step, step), noise.ravel()).reshape(18, 18)
    assert constant.mean[-1] == pytest.approx(np.trace(moment), rel=1e-6)


def test_the_predicted_chance_is_that_of_simulated_paths(harness: ModuleType, theory: object) -> None:
    """Catches a covariance between marks that is wrong: every bound below is a multiple of it.

    4000 paths of the linearised iteration with Gaussian noise and a Gaussian start. A mean's standard deviation is then
    some 2 % of it, a variance's 5 %, and a correlation's at most 1 / sqrt(4000) = 0.016 times a factor for tails.
    """
    marks, paths = [10, 12, 15], 4000
    prediction = theory.predict("1/t", marks)  # type: ignore[attr-defined]
    random, rate = np.random.default_rng(0), theory.rate("1/t")  # type: ignore[attr-defined]
    error = random.normal(size=(paths, 18)) * harness.START / 18**0.5
    root = np.linalg.cholesky(theory.noise + 1e-12 * np.eye(18))  # type: ignore[attr-defined]
    squares = []
    for t in range(1, marks[-1] + 1):
        error = error - rate(t) * (error @ theory.jacobian.T + random.normal(size=(paths, 18)) @ root.T)  # type: ignore[attr-defined]
        if t in marks:
            squares.append((error**2).sum(1))
    np.testing.assert_allclose(np.mean(squares, 1), prediction.mean, rtol=0.08)
    variances = np.diag(prediction.covariance)
    np.testing.assert_allclose(np.var(squares, 1), variances, rtol=0.25)
    correlations = prediction.covariance / np.sqrt(np.outer(variances, variances))
    assert correlations[0, 1] > 0.1  # or the next line says nothing
    np.testing.assert_allclose(np.corrcoef(squares), correlations, atol=0.06)


@pytest.mark.parametrize(("schedule", "seeds", "steps"), [("1/t", 6, 700), ("slow", 6, 600), ("constant", 3, 300)])
def test_the_error_is_the_predicted_one_at_finite_times(
    harness: ModuleType, problem: object, theory: object, schedule: str, seeds: int, steps: int
) -> None:
    """Catches a step that does not average its noise out: a gradient with a bias, a stale code, a wrong sign.

    Slope of the mean error and mean ratio to the prediction, over the marks of the window, both by the library's step.
    """
    prediction = theory.predict(schedule, harness.marks(steps)).at(theory.window)  # type: ignore[attr-defined]
    runs = [harness.run(problem, theory, schedule, seed, steps) for seed in range(seeds)]
    slope, _ = harness.measured_slope(runs, theory.window)  # type: ignore[attr-defined]
    assert abs(slope - prediction.slope()) < SIGMAS * prediction.slope_error(seeds)
    ratio = statistics.mean(harness.ratios(runs, prediction))
    assert abs(ratio - 1) < SIGMAS * prediction.ratio_error(seeds)


@pytest.mark.parametrize("schedule", ["1/t", "slow", "constant"])
def test_the_published_rows_are_the_predicted_ones(harness: ModuleType, theory: object, schedule: str) -> None:
    """Catches rows, or a derivation, that are wrong by more than chance: many seeds and steps make bounds narrow.

    The bounds tell the schedules apart: a slope of 0, the predicted one of "slow" and -1.
    """
    runs = harness.by_schedule(harness.RESULTS)[schedule]
    prediction = theory.predict(schedule, sorted(runs[0])).at(theory.window)  # type: ignore[attr-defined]
    slope, half = harness.measured_slope(runs, theory.window)  # type: ignore[attr-defined]
    assert abs(slope - prediction.slope()) < SIGMAS * prediction.slope_error(len(runs)) < 0.2
    assert half < 0.2
    ratio = statistics.mean(harness.ratios(runs, prediction))
    assert abs(ratio - 1) < SIGMAS * prediction.ratio_error(len(runs)) < 0.3


def test_the_page_has_the_table_of_the_rows(harness: ModuleType) -> None:
    """Catches rows that were measured anew and a page that still has the old ones."""
    page = (ROOT / "docs" / "convergence.md").read_text(encoding="utf-8")
    lines = [line for line in harness.table(harness.RESULTS).splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + len(harness.SCHEDULES)
    assert all(line in page for line in (lines[0], *lines[2:]))


def test_the_slope_and_its_interval_by_hand(harness: ModuleType) -> None:
    """Catches a fit of the wrong axis and an interval over the wrong number of runs.

    Runs a / t have slope -1 whatever a is, and no spread. Of two runs at two marks, a factor e apart, the slopes
    without one run are those of the other, -1 and -3, so the pseudo-values are twice the slope of the mean less those:
    they are 2 apart, and half the interval is the t quantile for one degree of freedom, 12.706, times 2 / 2.
    """
    marks = [round(100 * np.e**k) for k in range(4)]
    assert harness.measured_slope([{t: a / t for t in marks} for a in (1.0, 2.0, 5.0)], 1) == pytest.approx((-1, 0))
    runs = [{1.0: 1.0, float(np.e): float(np.exp(power))} for power in (-1, -3)]
    slope, half = harness.measured_slope(runs, 1)
    assert slope == pytest.approx(np.log((np.exp(-1) + np.exp(-3)) / 2))
    assert half == pytest.approx(12.7062, rel=1e-4)


def test_a_constant_rate_does_not_converge(harness: ModuleType, theory: object) -> None:
    """Catches a prediction, and with it the measure above, that falls whatever the steps do."""
    assert abs(theory.predict("constant", harness.marks(1000)).at(theory.window).slope()) < 0.01  # type: ignore[attr-defined]
