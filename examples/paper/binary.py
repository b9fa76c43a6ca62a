"""Networks of sign activations without a straight-through estimator, beside those with one, on MNIST.

    python examples/paper/binary.py tune  --root data
    python examples/paper/binary.py final --root data
    python examples/paper/binary.py table
    python examples/paper/binary.py plot

784-500-500-10, batch 200, Adam with a cosine to zero; 50,000 images train, 10,000 validate after every epoch. `tune`
tries the same rates for every method (`RATES`) but the authors' own recipe, with seed 0; `final` has each method's
best by validation accuracy, other seeds, and asks the test set once, at the end. `search` prints what the settings of
the search for discrete codes reach (`SEARCHES`). `--small` trains one epoch with one seed, for another results file;
`--workers N` trains N networks at a time. Rows are appended to docs/results/binary.csv as runs end, and a run that
has rows is not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import logging
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # for deep_networks, figures, intervals, rows and runs
from deep_networks import EpochClock
from figures import pyplot, save
from intervals import interval
from rows import append_values, markdown, read_values
from runs import QUIET
from workers import results

from lightning_altmin import (
    AltMinModule,
    AltMinObjective,
    BackpropModule,
    DiscreteCodes,
    GradientCodes,
    LocalGradient,
)
from lightning_altmin.codes import CodeProblem
from lightning_altmin.data import VisionDataModule
from lightning_altmin.margins import MarginLoss
from lightning_altmin.nn import MLP, HardThreshold, Heaviside, Quantise, Sign
from lightning_altmin.nn.integer import IntegerNetwork

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "binary.csv"
COLUMNS = (
    *("phase", "method", "rate", "seed", "epoch"),
    *("val_accuracy", "seconds", "test_accuracy", "integer_accuracy", "integer_differs"),
)
MEAN, STD = 0.1307, 0.3081  # of the pixels, as VisionDataModule normalises them


class _StraightThrough(torch.autograd.Function):
    """Sign whose gradient is that of a clipped identity: what DiscreteCodes does without."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, window: float) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x.abs() <= window)
        return torch.where(x >= 0, 1.0, -1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * ctx.saved_tensors[0], None


class StraightThroughSign(nn.Module):
    """A sign that lies about its gradient: 1 within the window, as if it were the identity there."""

    def __init__(self, window: float = 1.0) -> None:
        super().__init__()
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _StraightThrough.apply(x, self.window)
        return y


def discrete(
    activation: type[nn.Module],
    lr: float,
    flips: int,
    mu: float,
    codes: type[DiscreteCodes] = DiscreteCodes,
    **schedule: Any,
) -> LightningModule:
    return AltMinModule(
        MLP(784, [500, 500], 10, activation=activation),
        codes=codes(flips=flips),
        weights=LocalGradient(functools.partial(torch.optim.Adam, lr=lr, fused=True)),
        objective=AltMinObjective(mu=mu),
        **schedule,
    )


def backprop(activation: type[nn.Module], lr: float, **schedule: Any) -> LightningModule:
    adam = functools.partial(torch.optim.Adam, lr=lr, fused=True)
    return BackpropModule(MLP(784, [500, 500], 10, activation=activation), optimizer=adam, **schedule)


def official(lr: float, **schedule: Any) -> LightningModule:
    """The recipe of the authors' released code: the first layer binary, with a straight-through estimator inside.

    Its rate, 0.008, is halved every 8 epochs there; here it follows the cosine of the others.
    """
    network = nn.Sequential(
        *(nn.Flatten(), nn.Linear(784, 500, bias=False), nn.BatchNorm1d(500)),
        *(nn.Dropout(0.2), nn.Tanh(), StraightThroughSign(float("inf"))),
        *(nn.Linear(500, 500, bias=False), nn.BatchNorm1d(500), nn.Dropout(0.2), nn.Tanh(), nn.Linear(500, 10)),
    )
    return AltMinModule(
        network,
        codes=GradientCodes(steps=10, lr=0.3, momentum=0.9, nesterov=True),
        weights=LocalGradient(functools.partial(torch.optim.Adam, lr=lr, fused=True)),
        objective=AltMinObjective.reference(mu=0.003),
        **schedule,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class HingeLoss(MarginLoss):
    """The ramp without its end on the far side: a unit is pulled from however far away it is."""

    def gradient(self, code: Tensor) -> Tensor:
        above, below = code - self.above, self.below - code
        rising = torch.where(torch.where(self.up < 0, above, -above) < self.margin, self.up, 0)
        falling = torch.where(torch.where(self.down < 0, below, -below) < self.margin, self.down, 0)
        return (rising - falling) / (2 * self.margin)


class HingeCodes(DiscreteCodes):
    """DiscreteCodes with hinges, to see what the ramp is good for."""

    def solve(self, problem: CodeProblem) -> Tensor:
        move = super().solve(problem)
        assert problem.margins is not None
        problem.margins = HingeLoss(**vars(problem.margins))
        return move


METHODS: dict[str, Callable[..., LightningModule]] = {
    "discrete codes": functools.partial(discrete, Sign, flips=4, mu=0.05),
    "discrete codes, flips=0": functools.partial(discrete, Sign, flips=0, mu=0.05),
    "hinge, flips=0": functools.partial(discrete, Sign, flips=0, mu=0.05, codes=HingeCodes),
    "straight-through backprop": functools.partial(backprop, StraightThroughSign),
    "official recipe": functools.partial(official),
    "tanh backprop": functools.partial(backprop, nn.Tanh),
    "step": functools.partial(discrete, Heaviside, flips=0, mu=1.0),
    "hard threshold": functools.partial(discrete, HardThreshold, flips=0, mu=1.0),
    "2 bits": functools.partial(discrete, Quantise, flips=0, mu=1.0),
}
SEARCHES = [{"flips": flips, "mu": mu} for flips in (4, 16) for mu in (0.01, 0.05, 0.1)]
RATES = (0.001, 0.002, 0.004, 0.008)
PUBLISHED = {"official recipe": 0.008}
EPOCHS, SMALL_EPOCHS = 10, 1


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run: judged by samples held out, and by the test set unless it is for tuning."""

    phase: str
    method: str
    rate: float
    seed: int


def fit(make: Callable[..., LightningModule], seed: int, epochs: int, data: VisionDataModule) -> tuple[Any, EpochClock]:
    """Train once."""
    clock = EpochClock()
    seed_everything(seed, verbose=False)
    data.setup("fit")
    steps = epochs * len(data.train_dataloader())
    schedule = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps)
    module = make(lr_scheduler=schedule, lr_interval="step")
    trainer = Trainer(max_epochs=epochs, num_sanity_val_steps=0, callbacks=[clock], **QUIET)
    trainer.fit(module, datamodule=data)
    return trainer, clock


def integer_check(network: nn.Sequential, root: str) -> tuple[float, int]:
    """Test accuracy in integer arithmetic with 8-bit weights, and at how many images a float network differs.

    The float network has the same rounded weights, in double precision.
    """
    from torchvision.datasets import MNIST

    test = MNIST(root, train=False)
    integer = IntegerNetwork(network, zero=255 * MEAN, unit=1 / (255 * STD))
    predictions = torch.cat([integer.predict(pixels) for pixels in test.data.split(500)])
    with torch.no_grad():
        outputs = integer.rounded((test.data.double() - 255 * MEAN) / (255 * STD))
    accuracy = float((predictions == test.targets).double().mean())
    return accuracy, int((predictions != outputs.argmax(1)).sum())


def train(run: Run, epochs: int, root: str) -> list[tuple[Any, ...]]:
    """A row per epoch; in a final run's last one is what the test set says."""
    make = METHODS[run.method]
    data = VisionDataModule("MNIST", root=root, batch_size=200, val_split=1 / 6)
    trainer, clock = fit(functools.partial(make, lr=run.rate), run.seed, epochs, data)
    head = dataclasses.astuple(run)
    rows = [
        (*head, epoch, f"{accuracy:.4f}", f"{seconds:.1f}", "", "", "")
        for epoch, (accuracy, seconds) in enumerate(clock.rows, 1)
    ]
    if run.phase == "tune":
        return rows
    test = trainer.test(trainer.lightning_module, datamodule=data, verbose=False)[0]["test_acc"]
    integer: tuple[Any, Any] = ("", "")
    if make.func is discrete:  # type: ignore[attr-defined]
        accuracy, differs = integer_check(trainer.lightning_module.network, root)
        integer = (f"{accuracy:.4f}", differs)
    return [*rows[:-1], (*rows[-1][:-3], f"{test:.4f}", *integer)]


def best_rate(rows: list[dict[str, str]], method: str, epochs: int) -> float:
    """The rate with the highest validation accuracy at the end, or the one that the method was published with."""
    if method in PUBLISHED:
        return PUBLISHED[method]
    tuned = {
        float(row["rate"]): float(row["val_accuracy"])
        for row in rows
        if (row["phase"], row["method"], row["epoch"]) == ("tune", method, str(epochs))
    }
    if not tuned:
        raise SystemExit(f"no tuning runs of {method}: run `tune` first")
    return max(tuned, key=lambda rate: tuned[rate])


def execute(arguments: argparse.Namespace) -> None:
    epochs = SMALL_EPOCHS if arguments.small else EPOCHS
    rows = read_values(arguments.results)
    if arguments.command == "tune":
        tuned = [method for method in arguments.methods if method not in PUBLISHED]
        print(markdown(("method", "rates tried"), [(method, ", ".join(map(str, RATES))) for method in tuned]))
        runs = [Run("tune", method, rate, 0) for method in tuned for rate in RATES]
    else:
        rates = {method: best_rate(rows, method, epochs) for method in arguments.methods}
        runs = [Run("final", method, rates[method], seed) for seed in arguments.seeds for method in arguments.methods]
    done = {Run(row["phase"], row["method"], float(row["rate"]), int(row["seed"])) for row in rows}
    one = functools.partial(train, epochs=epochs, root=arguments.root)
    for found in results(one, [run for run in runs if run not in done], arguments.workers):
        append_values(arguments.results, COLUMNS, found)
        print(*found[-1], flush=True)


def search(arguments: argparse.Namespace) -> None:
    """What the search's settings reach by the samples held out, at the rate 0.002."""
    data = VisionDataModule("MNIST", root=arguments.root, batch_size=200, val_split=1 / 6)
    for setting in SEARCHES:
        _, clock = fit(functools.partial(METHODS["discrete codes"], lr=0.002, **setting), 0, EPOCHS, data)
        print(setting, [f"{accuracy:.4f}" for accuracy, _ in clock.rows], flush=True)


def final_rows(path: Path) -> list[dict[str, str]]:
    """Of each method, those with the rate that tuning chose."""
    rows = read_values(path)
    methods = {row["method"] for row in rows if row["phase"] == "final"}
    last = max((int(row["epoch"]) for row in rows), default=0)
    rates = {method: best_rate(rows, method, last) for method in methods}
    return [row for row in rows if row["phase"] == "final" and float(row["rate"]) == rates[row["method"]]]


def table(path: Path = RESULTS) -> str:
    """What docs/binary.md shows, from the committed rows."""
    rows = final_rows(path)
    lines = []
    for method in METHODS:
        ends = [row for row in rows if row["method"] == method and row["test_accuracy"]]
        if not ends:
            continue
        first = [100 * float(r["val_accuracy"]) for r in rows if r["method"] == method and r["epoch"] == "1"]
        pace = statistics.median(float(row["seconds"]) / int(row["epoch"]) for row in ends)
        test = interval([100 * float(row["test_accuracy"]) for row in ends])
        integer = interval([100 * float(row["integer_accuracy"]) for row in ends if row["integer_accuracy"]])
        begun = f"{statistics.mean(first):.1f}"
        lines.append((method, ends[0]["rate"], len(ends), test, integer, begun, f"{pace:.0f}"))
    columns = ("method", "rate", "seeds", "test accuracy %", "in integers %", "first epoch % (validation)")
    return markdown((*columns, "seconds per epoch"), lines)


def plot(path: Path) -> None:
    """Validation accuracy over epochs, the mean of the seeds."""
    rows = final_rows(path)
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for method in METHODS:
        epochs = sorted({int(row["epoch"]) for row in rows if row["method"] == method})
        means = [
            statistics.mean(
                100 * float(r["val_accuracy"]) for r in rows if r["method"] == method and int(r["epoch"]) == epoch
            )
            for epoch in epochs
        ]
        if epochs:
            axes.plot(epochs, means, marker=".", label=method)
    axes.set(xlabel="epoch", ylabel="validation accuracy, %", title="784-500-500-10 on MNIST")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save(figure, path.with_suffix(".svg"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("tune", "final", "search", "table", "plot"))
    parser.add_argument("--root", default="data", help="folder of MNIST")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--workers", type=int, default=1, help="processes that train")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    if arguments.small:
        arguments.seeds = arguments.seeds[:1]
    if arguments.results is None:
        arguments.results = RESULTS.with_stem("binary_small") if arguments.small else RESULTS
    if arguments.command == "table":
        print(table(arguments.results))
    elif arguments.command == "plot":
        plot(arguments.results)
    else:
        {"search": search}.get(arguments.command, execute)(arguments)


if __name__ == "__main__":
    main()
