r"""The squared error of online AltMin near an optimum, beside what theory says: it falls like 1 / t.

    python examples/convergence.py run --seeds 48 --schedules 1/t slow
    python examples/convergence.py run --seeds 16 --schedules constant
    python examples/convergence.py table
    python examples/convergence.py plot
    python examples/convergence.py predict --steps 1000000

The problem is small enough to know everything about it. A population of 400 samples, a 4-3-2 network of tanh units,
squared loss, ridge; every step draws 8 samples at random and is an `AltMin.step` of the library, with rate
c / (t + t0). The mean of its update over all batches is a function G of the weights (`Problem.field`), computed by the
library too; the optimum is its root, found by Newton's method. docs/convergence.md derives what follows from G's
Jacobian J and the noise's covariance S at the optimum, with a_t the rate and M_t = E (w_t - w*) (w_t - w*)^T:

    M_t = (1 - a_t J) M_{t-1} (1 - a_t J)^T + a_t^2 S,    E|w_t - w*|^2 = trace(M_t)
    t trace(M_t)  ->  trace(Sigma),    (cJ - 1/2) Sigma + Sigma (cJ - 1/2)^T = c^2 S

The second line needs c larger than 1 / (2 lambda), with lambda the smallest real part of J's eigenvalues. `run`
measures three schedules: "1/t" with c = 1 / lambda; "slow" with c = 1 / (4 lambda), which is too small: its slowest
directions fall like 1 / sqrt(t), the noise like 1 / t, and the sum's slope gets to -1/2 only after millions of steps;
"constant", which must not fall. `table` and `plot` set measurements beside the first line, iterated from the start.

Slopes of log error over log t are fitted to the mean over seeds, with an interval by the jackknife over seeds. The
window is set by the constants and not by the result. Under "1/t" the start's and the noise's transients are at most
t0 / (t + t0) of the term that is 1 / (t + t0), and writing t for t + t0 is an error of the same size (docs). The window
starts where that is a tenth, at t = 9 t0, and goes to the end. "slow" and "constant" have no such point and take the
same window. Rows go to docs/results/convergence.csv; runs that are there are not repeated.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from figures import pyplot, save
from intervals import half_width, interval
from rows import append_values, markdown, read_values
from scipy import stats
from scipy.linalg import solve_continuous_lyapunov
from torch import Tensor, nn

from lightning_altmin import AltMin, AltMinObjective, GradientCodes, LocalGradient

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "convergence.csv"
POPULATION, BATCH = 400, 8
WIDTHS = (4, 3, 2)
RIDGE = 0.6
STEPS = 5000
START = 0.1  # distance of the first weights from the optimum
SCHEDULES = ("1/t", "slow", "constant")
TRANSIENT = 0.1  # share of the transient in the 1 / t term where the window of the fits begins


class Problem:
    """A population, a network, and AltMin's mean update as a function of the weights."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        randn = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
        inputs, hidden, outputs = WIDTHS
        self.x = randn(POPULATION, inputs)
        teacher = [randn(hidden, inputs), 2 * randn(outputs, hidden)]
        noise = 0.3 * randn(POPULATION, outputs)
        self.y = torch.tanh(self.x @ teacher[0].T) @ teacher[1].T + noise
        self._teacher = torch.cat([teacher[0].flatten(), teacher[1].flatten()])

    def core(self, weights: Tensor) -> AltMin:
        """AltMin on a network with these weights; plain gradient steps, the ridge as weight decay."""
        inputs, hidden, outputs = WIDTHS
        network = nn.Sequential(
            nn.Linear(inputs, hidden, bias=False), nn.Tanh(), nn.Linear(hidden, outputs, bias=False)
        ).double()
        nn.utils.vector_to_parameters(weights.clone(), network.parameters())
        return AltMin(
            network,
            nn.MSELoss(),
            objective=AltMinObjective(mu=1.0),
            codes=GradientCodes(steps=3, lr=0.3),
            weights=LocalGradient(functools.partial(torch.optim.SGD, lr=1.0, weight_decay=RIDGE)),
        )

    def update(self, weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """What AltMin subtracts from the weights at rate 1, for one batch: the local gradients and the ridge's."""
        core = self.core(weights)
        core.step(x, y)
        return weights - nn.utils.parameters_to_vector(core.network.parameters()).detach()

    def field(self, weights: Tensor) -> Tensor:
        """The mean of `update` over all batches: codes are per sample, so it is the update of the whole population."""
        return self.update(weights, self.x, self.y)

    def jacobian(self, weights: Tensor, width: float = 1e-6) -> Tensor:
        """Of the field, by central differences."""
        columns = []
        for index in range(len(weights)):
            shift = torch.zeros_like(weights)
            shift[index] = width
            columns.append((self.field(weights + shift) - self.field(weights - shift)) / (2 * width))
        return torch.stack(columns, 1)

    @functools.cached_property
    def optimum(self) -> Tensor:
        """The field's root near the teacher."""
        weights = self._teacher.clone()
        for _ in range(200):  # into the basin
            weights = weights - 0.5 * self.field(weights)
        for _ in range(4):
            weights = weights - torch.linalg.solve(self.jacobian(weights), self.field(weights))
        return weights

    def noise(self) -> Tensor:
        """Covariance of a batch's update at the optimum: that of a sample's, divided by the batch size."""
        updates = torch.stack(
            [self.update(self.optimum, self.x[i : i + 1], self.y[i : i + 1]) for i in range(POPULATION)]
        )
        centred = updates - updates.mean(0)
        return centred.T @ centred / POPULATION / BATCH


@dataclass(frozen=True)
class Prediction:
    """The squared error of the linearised iteration.

    Attributes:
        marks: Numbers of steps.
        mean: ``E|w_t - w*|^2`` at each mark.
        covariance: Of one run's ``|w_t - w*|^2`` between marks, as if ``w_t`` were Gaussian.
    """

    marks: list[int]
    mean: np.ndarray
    covariance: np.ndarray

    def at(self, first: float) -> Prediction:
        """From step ``first`` on."""
        kept = np.array(self.marks) >= first
        return Prediction([t for t in self.marks if t >= first], self.mean[kept], self.covariance[kept][:, kept])

    def slope(self) -> float:
        """Of log error over log t."""
        return slope(self.marks, self.mean)

    def slope_error(self, seeds: int) -> float:
        """Standard deviation, by chance alone, of the slope that so many runs measure."""
        log = np.log(self.marks) - np.log(self.marks).mean()
        weights = log / (log**2).sum() / self.mean
        return math.sqrt(weights @ self.covariance @ weights / seeds)

    def ratio_error(self, seeds: int) -> float:
        """The same of the ratio of measured to predicted error, averaged over marks."""
        weights = 1 / self.mean / len(self.mean)
        return math.sqrt(weights @ self.covariance @ weights / seeds)


@dataclass(frozen=True)
class Theory:
    """What follows from the field near the optimum.

    Attributes:
        slowest: Smallest real part of the Jacobian's eigenvalues, ``lambda``.
        modulus: Smallest eigenvalue of its symmetric part, ``m``; positive where the field is strongly monotone.
        own: Smallest eigenvalue of any block's own symmetric part, a layer each: block-wise strong convexity.
        coupling: Norm of the symmetric part between the blocks: how much one block's weights change another's update.
        steepest: The Jacobian's norm, ``L``.
        limit: ``t E|w_t - w*|^2`` for large t under the schedule ``1/t``.
        jacobian: The Jacobian, ``J``.
        noise: Covariance of a batch's update, ``S``.
    """

    slowest: float
    modulus: float
    own: float
    coupling: float
    steepest: float
    limit: float
    jacobian: np.ndarray = field(repr=False)
    noise: np.ndarray = field(repr=False)

    @staticmethod
    def of(problem: Problem) -> Theory:
        """Measure it."""
        jacobian = problem.jacobian(problem.optimum)
        first = WIDTHS[0] * WIDTHS[1]
        blocks = (jacobian[:first, :first], jacobian[first:, first:])
        symmetric = (jacobian + jacobian.T) / 2
        slowest = float(torch.linalg.eigvals(jacobian).real.min())
        drift = (jacobian / slowest - 0.5 * torch.eye(len(jacobian), dtype=torch.float64)).numpy()
        noise = problem.noise().numpy()
        return Theory(
            slowest=slowest,
            modulus=float(torch.linalg.eigvalsh(symmetric).min()),
            own=min(float(torch.linalg.eigvalsh((b + b.T) / 2).min()) for b in blocks),
            coupling=float(torch.linalg.matrix_norm(symmetric[:first, first:], 2)),
            steepest=float(torch.linalg.matrix_norm(jacobian, 2)),
            limit=float(np.trace(solve_continuous_lyapunov(drift, noise / slowest**2))),
            jacobian=jacobian.numpy(),
            noise=noise,
        )

    @property
    def offset(self) -> float:
        """``t0`` of the rate c / (t + t0): no rate is above 1 / (2 L)."""
        return 2 * self.steepest / self.slowest

    @property
    def window(self) -> float:
        """The step at which ``t0 / (t + t0)`` is `TRANSIENT`."""
        return self.offset * (1 / TRANSIENT - 1)

    def rate(self, schedule: str) -> Callable[[int], float]:
        """The rate of step t, counted from 1."""
        c, t0 = {"1/t": 1.0, "slow": 0.25, "constant": 1.0}[schedule] / self.slowest, self.offset
        return (lambda t: c / t0 / 4) if schedule == "constant" else (lambda t: c / (t + t0))

    def predict(self, schedule: str, marks: Sequence[int]) -> Prediction:
        """Iterate the second moment of the linearised iteration, from a start in a uniformly random direction."""
        rate, identity = self.rate(schedule), np.eye(len(self.jacobian))
        moment, passage = START**2 / len(identity) * identity, identity
        taken: list[tuple[np.ndarray, np.ndarray]] = []
        for t in range(1, max(marks) + 1):
            step = identity - rate(t) * self.jacobian
            moment = step @ moment @ step.T + rate(t) ** 2 * self.noise
            passage = step @ passage  # from the mark before
            if t in marks:
                taken.append((moment, passage))
                passage = identity
        covariance = np.zeros((len(taken), len(taken)))
        for i, (cross, _) in enumerate(taken):
            for k in range(i, len(taken)):
                cross = taken[k][1] @ cross if k > i else cross
                covariance[i, k] = covariance[k, i] = 2 * (cross**2).sum()  # Gaussian, zero mean
        return Prediction(sorted(marks), np.array([np.trace(moment) for moment, _ in taken]), covariance)


def marks(steps: int) -> list[int]:
    """Numbers of steps at which the error is taken: ten in each factor of ten, from ten on, and the last."""
    return sorted({round(10 ** (k / 10)) for k in range(10, int(10 * math.log10(steps)) + 1)} | {steps})


def run(problem: Problem, theory: Theory, schedule: str, seed: int, steps: int) -> dict[int, float]:
    """Squared distance to the optimum at each mark of one run of online AltMin."""
    torch.manual_seed(seed)
    direction = torch.randn_like(problem.optimum)
    core = problem.core(problem.optimum + START * direction / direction.norm())
    rate, taken, errors = theory.rate(schedule), set(marks(steps)), {}
    for t in range(1, steps + 1):
        chosen = torch.randint(POPULATION, (BATCH,))
        for group in core.optimizer.param_groups:
            group["lr"] = rate(t)
        core.step(problem.x[chosen], problem.y[chosen], keep_codes=False)
        if t in taken:
            weights = nn.utils.parameters_to_vector(core.network.parameters()).detach()
            errors[t] = float((weights - problem.optimum).square().sum())
    return errors


def slope(t: Sequence[int], errors: np.ndarray) -> float:
    """Of log error over log t, by least squares."""
    return float(np.polyfit(np.log(t), np.log(errors), 1)[0])


def measured_slope(runs: list[dict[int, float]], first: float) -> tuple[float, float]:
    """Slope of the mean over runs from step ``first`` on, and half a 95 % interval by the jackknife over runs (t)."""
    t = [mark for mark in runs[0] if mark >= first]
    errors = np.array([[run[mark] for mark in t] for run in runs])
    whole = slope(t, errors.mean(0))
    without = [slope(t, np.delete(errors, i, 0).mean(0)) for i in range(len(runs))]
    return whole, half_width([len(runs) * whole - (len(runs) - 1) * other for other in without])


def ratios(runs: list[dict[int, float]], prediction: Prediction) -> list[float]:
    """Of each run, the ratio of measured to predicted error, averaged over the prediction's marks."""
    return [
        statistics.mean(errors[t] / mean for t, mean in zip(prediction.marks, prediction.mean.tolist(), strict=True))
        for errors in runs
    ]


def read(path: Path) -> dict[tuple[str, int], dict[int, float]]:
    """Runs by schedule and seed."""
    runs: dict[tuple[str, int], dict[int, float]] = {}
    for row in read_values(path):
        runs.setdefault((row["schedule"], int(row["seed"])), {})[int(row["t"])] = float(row["squared_error"])
    return runs


def append(path: Path, schedule: str, seed: int, errors: dict[int, float]) -> None:
    values = ((schedule, seed, t, f"{error:.6e}") for t, error in errors.items())
    append_values(path, ("schedule", "seed", "t", "squared_error"), values)


def by_schedule(path: Path) -> dict[str, list[dict[int, float]]]:
    """Runs of each schedule that has two or more."""
    runs = read(path)
    grouped = {name: [errors for (mine, _), errors in runs.items() if mine == name] for name in SCHEDULES}
    return {name: mine for name, mine in grouped.items() if len(mine) > 1}


def table(path: Path) -> str:
    theory = Theory.of(Problem())
    known = (
        f"lambda = {theory.slowest:.3f}, m = {theory.modulus:.3f}, own blocks {theory.own:.3f}, "
        f"coupling {theory.coupling:.3f}, L = {theory.steepest:.3f}, t0 = {theory.offset:.1f}, noise in "
        f"{np.linalg.matrix_rank(theory.noise)} of {len(theory.noise)} directions; "
        f"predicted limit of t E|w - w*|^2 under 1/t: {theory.limit:.4f}; fits from t = 9 t0 = {theory.window:.0f} on"
    )
    lines = []
    for schedule, runs in by_schedule(path).items():
        prediction = theory.predict(schedule, sorted(runs[0])).at(theory.window)
        mean, half = measured_slope(runs, theory.window)
        chance = float(stats.norm.ppf(0.975)) * prediction.slope_error(len(runs))
        expected = f"{round(prediction.slope(), 2) + 0:.2f} ± {chance:.2f}"  # + 0: no "-0.00"
        lines.append((schedule, len(runs), f"{mean:.2f} ± {half:.2f}", expected, interval(ratios(runs, prediction))))
    columns = (
        "schedule",
        "seeds",
        "slope measured (95 %)",
        "slope predicted (95 % of chance)",
        "error measured / predicted (95 %)",
    )
    return known + "\n\n" + markdown(columns, lines)


def plot(path: Path) -> None:
    theory = Theory.of(Problem())
    figure, axis = pyplot.subplots(figsize=(6, 4.2))
    for schedule, runs in by_schedule(path).items():
        t = sorted(runs[0])
        prediction = theory.predict(schedule, t)
        values = np.array([[errors[mark] for mark in t] for errors in runs])
        mean, half = measured_slope(runs, theory.window)
        expected = round(prediction.at(theory.window).slope(), 2) + 0
        spread = np.array([half_width(at_one_mark) for at_one_mark in values.T.tolist()])
        label = f"{schedule}: slope {mean:.2f} ± {half:.2f}, predicted {expected:.2f}"
        bars = axis.errorbar(t, values.mean(0), spread, fmt="o", markersize=3, linewidth=1, label=label)
        axis.plot(t, prediction.mean, linewidth=1, color=bars[0].get_color())
    axis.plot(t, theory.limit / np.array(t), "k:", linewidth=1, label="limit under 1/t")
    axis.axvline(theory.window, color="grey", linestyle="--", linewidth=1, label="fits from here on")
    axis.set(xscale="log", yscale="log", xlabel="steps t", ylabel="squared error: mean over seeds, prediction")
    axis.legend(fontsize="small")
    figure.tight_layout()
    save(figure, path.with_suffix(".svg"))


def predict(steps: int) -> str:
    """Predicted slopes over each factor of ten, further than anything is measured."""
    theory, tens = Theory.of(Problem()), [10**k for k in range(1, int(math.log10(steps)) + 1)]
    lines = []
    for schedule in SCHEDULES:
        mean = theory.predict(schedule, tens).mean
        lines.append((schedule, *(f"{value:.3f}" for value in np.diff(np.log10(mean)))))
    return markdown(("schedule", *(f"{t} to {10 * t}" for t in tens[:-1])), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table", "plot", "predict"))
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=SCHEDULES)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.command == "table":
        print(table(arguments.results))
    elif arguments.command == "plot":
        plot(arguments.results)
    elif arguments.command == "predict":
        print(predict(arguments.steps))
    else:
        problem = Problem()
        theory = Theory.of(problem)
        print(theory, flush=True)
        for seed in range(arguments.seeds):
            for schedule in arguments.schedules:
                if (schedule, seed) not in read(arguments.results):
                    append(arguments.results, schedule, seed, run(problem, theory, schedule, seed, arguments.steps))
                    print(schedule, seed, flush=True)


if __name__ == "__main__":
    main()
