"""Very deep networks without skip connections: least-squares and curvature codes beside backprop, on MNIST.

    python examples/deep_networks.py --root data --network sigmoid8
    python examples/deep_networks.py --root data --network sigmoid8 --tune
    python examples/deep_networks.py --table

Hidden layers of 100 units, batch 200. Weights begin as PyTorch's default has them or, where the network's name says
so, orthogonal with the activation's gain and without biases, for all methods alike. 50,000 images train, 10,000
validate after every epoch, and the test set is asked once, at the end. docs/deep.md says how settings were found, and
at which rates backprop was tuned: `--tune` tries `RATES` with seed 0 for the method "backprop, Adam, tuned", which
has the best by validation accuracy at the end. Rows are appended to docs/results/deep_networks.csv as runs end, and a
run that has rows is not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from figures import pyplot, save
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from rows import append_values, finished, markdown, read_values
from runs import QUIET
from torch import nn

from lightning_altmin import AltMinModule, AltMinObjective, BackpropModule, LeastSquaresCodes, LocalGradient
from lightning_altmin.data import VisionDataModule
from lightning_altmin.nn import MLP

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "deep_networks.csv"
COLUMNS = ("network", "method", "seed", "epoch", "val_accuracy", "seconds", "test_accuracy")


@dataclasses.dataclass(frozen=True)
class Task:
    """A network, how long it trains, the settings of the least-squares codes for it, and Adam's rate for all."""

    activation: str
    depth: int
    epochs: int
    damping: float
    weight: float
    mu: float
    lr: float
    gain: float | None = None  # of orthogonal weights; None for PyTorch's default initialisation


TASKS = {
    "sigmoid8": Task("sigmoid", 8, 5, damping=3.0, weight=0.1, mu=0.1, lr=0.004),
    "relu20": Task("relu", 20, 10, damping=0.1, weight=0.1, mu=1.0, lr=0.001),
    "tanh20": Task("tanh", 20, 10, damping=0.1, weight=1.0, mu=0.1, lr=0.0005),
    "relu20-orthogonal": Task("relu", 20, 10, damping=0.1, weight=1.0, mu=0.1, lr=0.001, gain=2**0.5),
    "tanh20-orthogonal": Task("tanh", 20, 10, damping=0.1, weight=1.0, mu=0.1, lr=0.001, gain=1.0),
}
METHODS = (
    *("least squares", "least squares, then curvature", "least squares, then backprop"),
    *("curvature", "backprop, Adam", "backprop, Adam, tuned", "backprop, SGD"),
)
RATES = (0.0001, 0.0003, 0.001, 0.002, 0.004, 0.008)
TRIED = RESULTS.with_stem("deep_networks_rates")
OPENING = 1  # epochs of the first of two methods


class EpochClock(Callback):
    """After each epoch: validation accuracy, and the seconds of training alone."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, float]] = []
        self._seconds = 0.0
        self._start = 0.0

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._start = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._seconds += time.perf_counter() - self._start

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.rows.append((float(trainer.callback_metrics["val_acc"]), self._seconds))


def orthogonal_(network: nn.Module, gain: float) -> None:
    """Weights that keep the size of signals from layer to layer, and no biases."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)


def make_network(task: Task) -> nn.Module:
    network = MLP(784, [100] * task.depth, 10, activation=task.activation)
    if task.gain is not None:
        orthogonal_(network, task.gain)
    return network


def make_module(task: Task, method: str, network: nn.Module, **schedule: Any) -> LightningModule:
    adam = functools.partial(torch.optim.Adam, lr=task.lr, fused=True)
    if method in ("backprop", "backprop, Adam", "backprop, Adam, tuned"):
        return BackpropModule(network, optimizer=adam, **schedule)
    if method == "backprop, SGD":
        return BackpropModule(network, optimizer=functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9), **schedule)
    if method == "curvature":  # the default code step, which multiplies by the same factors as backprop
        return AltMinModule(network, weights=LocalGradient(adam), **schedule)
    return AltMinModule(
        network,
        codes=LeastSquaresCodes(task.damping, task.weight),
        weights=LocalGradient(adam),
        objective=AltMinObjective(mu=task.mu),
        **schedule,
    )


def phases(method: str, epochs: int, batches: int) -> list[tuple[str, int, dict[str, Any]]]:
    """Method, epochs and schedule of each part of a run; an opening has a constant rate."""

    def cosine(length: int) -> dict[str, Any]:
        scheduler = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=length * batches)
        return {"lr_scheduler": scheduler, "lr_interval": "step"}

    opening, then, rest = method.partition(", then ")
    if not then:
        return [(method, epochs, cosine(epochs))]
    return [(opening, OPENING, {}), (rest, epochs - OPENING, cosine(epochs - OPENING))]


def run(name: str, method: str, seed: int, data: VisionDataModule, test: bool = True) -> list[tuple[Any, ...]]:
    """Train once; one row per epoch, the last with the test accuracy if the test set is to be asked."""
    task, clock = TASKS[name], EpochClock()
    if method == "backprop, Adam, tuned":
        task = dataclasses.replace(task, lr=best_rate(name))
    seed_everything(seed, verbose=False)
    data.setup("fit")
    network = make_network(task)
    for part, epochs, schedule in phases(method, task.epochs, len(data.train_dataloader())):
        module = make_module(task, part, network, **schedule)
        trainer = Trainer(max_epochs=epochs, num_sanity_val_steps=0, callbacks=[clock], **QUIET)
        trainer.fit(module, datamodule=data)
    rows = [
        (name, method, seed, epoch, f"{accuracy:.4f}", f"{seconds:.1f}", "")
        for epoch, (accuracy, seconds) in enumerate(clock.rows, 1)
    ]
    if not test:
        return rows
    accuracy = trainer.test(module, datamodule=data, verbose=False)[0]["test_acc"]
    return [*rows[:-1], (*rows[-1][:-1], f"{accuracy:.4f}")]


def tune(name: str, data: VisionDataModule) -> None:
    """Backprop's validation accuracy at the end, for each rate that has none yet."""
    task, done = TASKS[name], finished(TRIED, "network", "rate")
    for rate in RATES:
        if (name, str(rate)) not in done:
            TASKS[name] = dataclasses.replace(task, lr=rate)
            accuracy = run(name, "backprop, Adam", 0, data, test=False)[-1][4]
            append_values(TRIED, ("network", "rate", "val_accuracy"), [(name, rate, accuracy)])
    TASKS[name] = task


def best_rate(name: str) -> float:
    """Backprop's rate with the highest validation accuracy."""
    tried = {float(r["rate"]): float(r["val_accuracy"]) for r in read_values(TRIED) if r["network"] == name}
    if not tried:
        raise SystemExit(f"no rates were tried on {name}: run `--tune` first")
    return max(tried, key=lambda rate: tried[rate])


def table() -> str:
    """What docs/deep.md shows, from the committed rows."""
    rows = read_values(RESULTS)
    lines = []
    for name in TASKS:
        for method in METHODS:
            chosen = [row for row in rows if row["network"] == name and row["method"] == method]
            ends = [row for row in chosen if row["test_accuracy"]]
            if not ends:
                continue
            found = [100 * float(row["test_accuracy"]) for row in ends]
            # Not an interval: the runs of a network that trains by luck are no normal sample.
            extremes = f" ({min(found):.1f} to {max(found):.1f})" if len(found) > 1 else ""
            accuracy = f"{statistics.mean(found):.1f}{extremes}"
            reached = {
                int(r["epoch"]) for r in chosen if float(r["val_accuracy"]) >= 0.9 and r["seed"] == ends[0]["seed"]
            }
            pace = statistics.median(float(row["seconds"]) / int(row["epoch"]) for row in ends)
            lines.append((name, method, len(ends), accuracy, min(reached, default="never"), f"{pace:.0f}"))
    columns = ("network", "method", "seeds", "test accuracy %", "first epoch at 90 %", "seconds per epoch")
    return markdown(columns, lines)


def plot() -> None:
    """Validation accuracy over epochs, the mean of the seeds."""
    rows = read_values(RESULTS)
    names = [name for name in TASKS if any(row["network"] == name for row in rows)]
    figure, panels = pyplot.subplots(1, len(names), figsize=(4 * len(names), 3.4), sharey=True, squeeze=False)
    for axes, name in zip(panels[0], names, strict=True):
        for method in METHODS:
            by_epoch: dict[int, list[float]] = {}
            for row in rows:
                if row["network"] == name and row["method"] == method:
                    by_epoch.setdefault(int(row["epoch"]), []).append(100 * float(row["val_accuracy"]))
            if by_epoch:
                means = [statistics.mean(by_epoch[epoch]) for epoch in sorted(by_epoch)]
                axes.plot(sorted(by_epoch), means, marker=".", label=method)
        axes.axhline(90, color="grey", linewidth=0.8, linestyle=":")
        axes.set(title=name, xlabel="epoch")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    panels[0][0].set(ylabel="validation accuracy, %")
    save(figure, RESULTS.with_suffix(".svg"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder of MNIST")
    parser.add_argument("--network", choices=TASKS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--try",
        nargs="+",
        default=[],
        dest="trial",
        metavar="SETTING=VALUE",
        help="other settings of the network (epochs=4 mu=0.1 ...): validation accuracies are printed, not recorded",
    )
    parser.add_argument("--tune", action="store_true", help="try backprop's rates by validation accuracy")
    parser.add_argument("--table", action="store_true", help="print the table of the rows there are, and plot them")
    arguments = parser.parse_args()
    if arguments.table:
        plot()
        print(table())
        return
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    data = VisionDataModule("MNIST", root=arguments.root, batch_size=200, val_split=1 / 6)
    done = finished(RESULTS, "network", "method", "seed") if not arguments.trial else set()
    whole = {field.name for field in dataclasses.fields(Task) if field.type == "int"}
    changes: dict[str, Any] = {
        name: int(value) if name in whole else float(value)
        for name, value in (setting.split("=") for setting in arguments.trial)
    }
    networks = [arguments.network] if arguments.network else list(TASKS)
    if arguments.tune:
        for name in networks:
            tune(name, data)
        return
    for name in networks:
        TASKS[name] = dataclasses.replace(TASKS[name], **changes)
        for seed in arguments.seeds:
            for method in arguments.methods:
                if (name, method, str(seed)) in done:
                    continue
                rows = run(name, method, seed, data, test=not arguments.trial)
                if arguments.trial:
                    print(name, method, seed, arguments.trial, [row[4] for row in rows], flush=True)
                else:
                    append_values(RESULTS, COLUMNS, rows)


if __name__ == "__main__":
    main()
