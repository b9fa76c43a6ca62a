r"""The squared error of online AltMin near an optimum, beside what theory says: it falls like 1 / t.

    python examples/convergence.py run --seeds 16
    python examples/convergence.py table
    python examples/convergence.py plot

The problem is small enough to know everything about it. A population of 400 samples, a 4-3-2 network of tanh units,
squared loss, ridge; every step draws 8 samples at random and is an `AltMin.step` of the library, with rate
c / (t + t0). The mean of its update over all batches is a function G of the weights (`Problem.field`), computed by the
library too; the optimum is its root, found by Newton's method. docs/convergence.md derives what follows from G's
Jacobian J and the noise's covariance S at the optimum:

    t E|w_t - w*|^2  ->  trace(Sigma),    (cJ - 1/2) Sigma + Sigma (cJ - 1/2)^T = c^2 S

where c is larger than 1 / (2 m), with m the smallest real part of J's eigenvalues. `run` measures three schedules:
"1/t" with c = 1 / m, "slow" with c = 1 / (4 m), which is too small and must fall like 1 / sqrt(t), and "constant",
which must not fall. Rows go to docs/results/convergence.csv as they come; runs that are there are not repeated.
"""

from __future__ import annotations

import argparse
import csv
import functools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from figures import pyplot, save
from intervals import half_width, interval
from rows import append_values, markdown
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


class Problem:
    """A population, a network, and AltMin's mean update as a function of the weights."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        options = {"generator": generator, "dtype": torch.float64}
        inputs, hidden, outputs = WIDTHS
        self.x = torch.randn(POPULATION, inputs, **options)
        teacher = [torch.randn(hidden, inputs, **options), 2 * torch.randn(outputs, hidden, **options)]
        noise = 0.3 * torch.randn(POPULATION, outputs, **options)
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
class Theory:
    """What follows from the field near the optimum.

    Attributes:
        modulus: Smallest real part of the Jacobian's eigenvalues, ``m``.
        monotone: Smallest eigenvalue of its symmetric part; positive where the field is strongly monotone.
        own: Smallest eigenvalue of any block's own symmetric part, a layer each: block-wise strong convexity.
        coupling: Norm of the symmetric part between the blocks: how much one block's weights change another's update.
        steepest: The Jacobian's norm, ``L``.
        limit: ``t E|w_t - w*|^2`` for large t under the schedule ``1/t``.
    """

    modulus: float
    monotone: float
    own: float
    coupling: float
    steepest: float
    limit: float

    @staticmethod
    def of(problem: Problem) -> Theory:
        """Measure it."""
        jacobian = problem.jacobian(problem.optimum)
        eigenvalues = torch.linalg.eigvals(jacobian).real
        first = WIDTHS[0] * WIDTHS[1]
        blocks = (jacobian[:first, :first], jacobian[first:, first:])
        own = min(float(torch.linalg.eigvalsh((b + b.T) / 2).min()) for b in blocks)
        symmetric = (jacobian + jacobian.T) / 2
        monotone = float(torch.linalg.eigvalsh(symmetric).min())
        coupling = float(torch.linalg.matrix_norm(symmetric[:first, first:], 2))
        modulus = float(eigenvalues.min())
        rate = 1 / modulus
        drift = (rate * jacobian - 0.5 * torch.eye(len(jacobian), dtype=torch.float64)).numpy()
        sigma = solve_continuous_lyapunov(drift, rate**2 * problem.noise().numpy())
        steepest = float(torch.linalg.matrix_norm(jacobian, 2))
        return Theory(modulus, monotone, own, coupling, steepest, float(np.trace(sigma)))

    def rate(self, schedule: str) -> Callable[[int], float]:
        """The rate of step t, counted from 1."""
        c = {"1/t": 1.0, "slow": 0.25, "constant": 1.0}[schedule] / self.modulus
        t0 = 2 * self.steepest / self.modulus  # so that no rate is above 1 / (2 L)
        return (lambda t: c / t0 / 4) if schedule == "constant" else (lambda t: c / (t + t0))


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


def slopes(runs: list[dict[int, float]], first: int) -> tuple[float, float]:
    """Slope of log error over log t from step ``first`` on, a fit per run: mean and half a 95 % interval (t)."""
    fits = []
    for errors in runs:
        t = [mark for mark in errors if mark >= first]
        fits.append(float(np.polyfit(np.log(t), np.log([errors[mark] for mark in t]), 1)[0]))
    return statistics.mean(fits), half_width(fits)


def read(path: Path) -> dict[tuple[str, int], dict[int, float]]:
    """Runs by schedule and seed."""
    runs: dict[tuple[str, int], dict[int, float]] = {}
    if path.exists():
        with path.open() as file:
            for row in csv.DictReader(file):
                runs.setdefault((row["schedule"], int(row["seed"])), {})[int(row["t"])] = float(row["squared_error"])
    return runs


def append(path: Path, schedule: str, seed: int, errors: dict[int, float]) -> None:
    values = ((schedule, seed, t, f"{error:.6e}") for t, error in errors.items())
    append_values(path, ("schedule", "seed", "t", "squared_error"), values)


def table(path: Path) -> str:
    theory, runs = Theory.of(Problem()), read(path)
    known = (
        f"m = {theory.modulus:.3f}, symmetric part {theory.monotone:.3f}, own blocks {theory.own:.3f}, "
        f"coupling {theory.coupling:.3f}, L = {theory.steepest:.3f}; "
        f"predicted limit of t E|w - w*|^2 under 1/t: {theory.limit:.4f}"
    )
    lines = []
    for schedule in dict.fromkeys(schedule for schedule, _ in runs):
        mine = [errors for (name, _), errors in runs.items() if name == schedule]
        if len(mine) < 2:
            continue
        last = max(mine[0])
        mean, half = slopes(mine, last // 10)
        scaled = interval([last * errors[last] for errors in mine], ".4f", ".4f")
        lines.append((schedule, len(mine), f"{mean:.2f} ± {half:.2f}", scaled))
    columns = ("schedule", "seeds", "slope, last factor of ten (95 %)", "t times squared error at the end (95 %)")
    return known + "\n\n" + markdown(columns, lines)


def plot(path: Path) -> None:
    theory, runs = Theory.of(Problem()), read(path)
    figure, axis = pyplot.subplots(figsize=(5.5, 3.8))
    for schedule in dict.fromkeys(schedule for schedule, _ in runs):
        mine = [errors for (name, _), errors in runs.items() if name == schedule]
        t = np.array(sorted(mine[0]))
        values = np.array([[errors[mark] for mark in t] for errors in mine])
        mean, half = slopes(mine, int(t[-1]) // 10)
        label = f"{schedule}: slope {mean:.2f} ± {half:.2f}"
        spread = np.array([half_width(at_one_mark) for at_one_mark in values.T.tolist()])
        (line,) = axis.plot(t, values.mean(0), linewidth=1, label=label)
        low = np.maximum(values.mean(0) - spread, values.min())
        axis.fill_between(t, low, values.mean(0) + spread, alpha=0.2, color=line.get_color(), linewidth=0)
    axis.plot(t, theory.limit / t, "k:", linewidth=1, label="predicted limit under 1/t")
    axis.set(xscale="log", yscale="log", xlabel="steps t", ylabel="squared error, mean over seeds")
    axis.legend(fontsize="small")
    figure.tight_layout()
    save(figure, path.with_suffix(".svg"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table", "plot"))
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.command == "table":
        print(table(arguments.results))
    elif arguments.command == "plot":
        plot(arguments.results)
    else:
        problem = Problem()
        theory = Theory.of(problem)
        print(theory, flush=True)
        for seed in range(arguments.seeds):
            for schedule in SCHEDULES:
                if (schedule, seed) not in read(arguments.results):
                    append(arguments.results, schedule, seed, run(problem, theory, schedule, seed, arguments.steps))
                    print(schedule, seed, flush=True)


if __name__ == "__main__":
    main()
