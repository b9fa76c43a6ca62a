"""AltMin beside backprop at equal effort: tuned on a validation split, then several seeds on the test set.

    python examples/paper/accuracy.py tune  --suite mnist_mlp_100 --root data
    python examples/paper/accuracy.py final --suite mnist_mlp_100 --root data
    python examples/paper/accuracy.py table

Both methods get the same network, batches, cosine schedule and optimizer (fused Adam) and the same number of settings.
`tune` holds out a part of the training set and runs each setting; `final` trains on the whole training set with
each method's best setting and reports the test set. `--small` does it with one seed for one epoch, and another results
file; `--workers N` runs N at a time. Every finished run is a row of docs/results/accuracy.csv, written at once; a run
whose row exists is not repeated, so an interrupted command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import logging
import math
import statistics
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, seed_everything
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # for intervals, rows and runs
from intervals import interval
from rows import append, markdown, read
from runs import judged, timed_fit
from workers import results

from lightning_altmin import AltMinModule, AltMinObjective, BackpropModule, CodedNetwork, CurvatureCodes, LocalGradient
from lightning_altmin.data import ImageFolderDataModule, VisionDataModule
from lightning_altmin.nn import MLP, ConvNet, LeNet5

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "accuracy.csv"


@dataclass(frozen=True)
class Setting:
    """What is tuned. For backprop only the learning rate means something."""

    lr: float
    mu: float = 0.0
    share: float = 0.0


RATES = (0.001, 0.002, 0.004, 0.006, 0.008, 0.012)
BACKPROP = [Setting(lr) for lr in RATES]
ALTMIN = [Setting(lr, mu=5.0, share=0.05) for lr in RATES]  # mu and share are the defaults
SMALLER = (0.00025, 0.0005)  # also tried for the MLP on CIFAR-10, where backprop's best was the smallest of RATES
LIVE = "AltMin, live BatchNorm"  # CodedNetwork(..., batch_norm="live")


def methods(network: str) -> dict[str, list[Setting]]:
    """Methods by name, each with the settings that are tried."""
    live = {LIVE: ALTMIN} if "BatchNorm" in network else {}
    tried = {"backprop": BACKPROP, "AltMin": ALTMIN, **live}
    smaller = SMALLER if network.startswith("MLP 3072") else ()
    return {name: [*(replace(known[0], lr=lr) for lr in smaller), *known] for name, known in tried.items()}


@dataclass(frozen=True)
class Suite:
    """Networks that share data, batch size and training lengths."""

    networks: dict[str, Callable[[], nn.Module]]
    data: Callable[[str, float], LightningDataModule]
    epochs: tuple[int, ...]
    tune_epochs: tuple[int, ...]
    seeds: int
    tune_seeds: int = 1


def mnist(root: str, val_split: float, batch_size: int = 200) -> LightningDataModule:
    return VisionDataModule("MNIST", root=root, batch_size=batch_size, val_split=val_split)


def cifar10(root: str, val_split: float, batch_size: int, augment: bool) -> LightningDataModule:
    return ImageFolderDataModule(root, batch_size=batch_size, val_split=val_split, augment=augment)


def mlp(inputs: int, width: int, batch_norm: bool) -> nn.Module:
    return MLP(inputs, [width, width], 10, batch_norm=batch_norm)


SUITES = {
    f"mnist_mlp_{width}{'_batchnorm' if norm else ''}": Suite(
        {f"MLP 2x{width}{' BatchNorm' if norm else ''}": functools.partial(mlp, 784, width, norm)},
        mnist,
        epochs=(1, 20),
        tune_epochs=(1, 20),
        seeds=5,
        tune_seeds=1 if norm and width == 500 else 3,
    )
    for width, norm in itertools.product((100, 500), (False, True))
} | {
    "mnist_lenet": Suite({"LeNet": LeNet5}, functools.partial(mnist, batch_size=128), (10,), (2,), seeds=5),
    "cifar10_mlp": Suite(
        {"MLP 3072-500-500-10": functools.partial(mlp, 3072, 500, False)},
        functools.partial(cifar10, batch_size=200, augment=False),
        epochs=(6,),
        tune_epochs=(2,),
        seeds=5,
    ),
    "cifar10_conv": Suite(
        {"ConvNet BatchNorm": functools.partial(ConvNet, 3, 10, channels=(16, 32, 64))},
        functools.partial(cifar10, batch_size=128, augment=False),
        epochs=(3,),
        tune_epochs=(1,),
        seeds=5,
    ),
}


@dataclass(frozen=True)
class Row:
    """One run."""

    suite: str
    phase: str
    network: str
    method: str
    epochs: int
    lr: float
    mu: float
    share: float
    seed: int
    accuracy: float = math.nan
    loss: float = math.nan
    seconds: float = math.nan

    @property
    def key(self) -> tuple[str, ...]:
        return tuple(str(getattr(self, f.name)) for f in fields(self) if f.name not in ("accuracy", "loss", "seconds"))


def train(row: Row, root: str) -> Row:
    """Train one network by one method and evaluate it: on the held-out part when tuning, else on the test set."""
    suite = SUITES[row.suite]
    data = suite.data(root, 1 / 6 if row.phase == "tune" else 0.0)
    seed_everything(row.seed, verbose=False)
    network = suite.networks[row.network]()
    optimizer = functools.partial(torch.optim.Adam, lr=row.lr, fused=True)
    data.setup("fit")
    total = row.epochs * len(data.train_dataloader())
    schedule: dict[str, Any] = {
        "lr_scheduler": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, total),
        "lr_interval": "step",
    }
    module: AltMinModule | BackpropModule
    if row.method != "backprop":
        module = AltMinModule(
            CodedNetwork(network, batch_norm="live" if row.method == LIVE else "fixed"),
            objective=AltMinObjective(mu=row.mu),
            codes=CurvatureCodes(share=row.share),
            weights=LocalGradient(optimizer),
            **schedule,
        )
    else:
        module = BackpropModule(network, optimizer=optimizer, **schedule)
    seconds = timed_fit(module, data, row.epochs)
    name = "val" if row.phase == "tune" else "test"
    result = judged(module, data, name)
    outcome = {"accuracy": result[f"{name}_acc"], "loss": result[f"{name}_loss"], "seconds": round(seconds, 2)}
    return Row(**(asdict(row) | outcome))


def planned(name: str, suite: Suite, phase: str, rows: list[Row], wanted: list[str] | None) -> list[Row]:
    """All runs of a phase, in an order that pairs the methods seed by seed."""
    runs = []
    lengths = suite.tune_epochs if phase == "tune" else suite.epochs
    for network, (index, epochs) in itertools.product(suite.networks, enumerate(lengths)):
        for seed in range(suite.tune_seeds if phase == "tune" else suite.seeds):
            for method, settings in methods(network).items():
                if wanted and method not in wanted:
                    continue
                chosen = settings if phase == "tune" else [best(rows, name, network, method, suite.tune_epochs[index])]
                # Seeds of the final runs are not those of the tuning runs.
                seed_used = 100 + seed if phase == "tune" else seed
                runs += [Row(name, phase, network, method, epochs, **asdict(s), seed=seed_used) for s in chosen]
    return runs


def best(rows: list[Row], suite: str, network: str, method: str, epochs: int) -> Setting:
    """The setting with the highest validation accuracy, a mean over the tuning seeds."""
    tuned = [
        r for r in rows if (r.suite, r.phase, r.network, r.method, r.epochs) == (suite, "tune", network, method, epochs)
    ]
    if not tuned:
        raise SystemExit(f"no tuning runs of {method} on {network} ({epochs} epochs): run `tune` first")
    settings = dict.fromkeys(Setting(r.lr, r.mu, r.share) for r in tuned)
    return max(settings, key=lambda s: statistics.mean(r.accuracy for r in tuned if Setting(r.lr, r.mu, r.share) == s))


def grid(network: str) -> str:
    """The settings that are tried."""
    tried = [(name, ", ".join(str(s.lr) for s in settings)) for name, settings in methods(network).items()]
    return markdown(("method", "rates tried"), tried)


def run(arguments: argparse.Namespace) -> None:
    name, path = arguments.suite, arguments.results
    suite = SUITES[name]
    if arguments.small:
        suite = replace(suite, epochs=(1,), tune_epochs=(1,), seeds=1, tune_seeds=1)
    if arguments.command == "tune":
        print(*map(grid, suite.networks), sep="\n\n", flush=True)
    rows = read(path, Row)
    done = {row.key for row in rows}
    left = [row for row in planned(name, suite, arguments.command, rows, arguments.methods) if row.key not in done]
    for row in results(functools.partial(train, root=arguments.root), left, arguments.workers):
        append(path, [row])
        print(f"{row.phase} {row.network} {row.method} epochs={row.epochs} lr={row.lr} mu={row.mu} seed={row.seed}: "
              f"{100 * row.accuracy:.2f} % in {row.seconds:.0f} s", flush=True)  # fmt: skip


def table(path: Path) -> str:
    """Means over seeds, and the mean paired difference with a 95 % interval (t distribution)."""
    lines = []
    final = [r for r in read(path, Row) if r.phase == "final"]
    for suite, network, epochs in dict.fromkeys((r.suite, r.network, r.epochs) for r in final):
        runs: dict[str, dict[int, Row]] = {
            m: {r.seed: r for r in final if (r.suite, r.network, r.epochs, r.method) == (suite, network, epochs, m)}
            for m in methods(network)
        }
        dataset = "CIFAR-10" if suite.startswith("cifar") else "MNIST"
        for method in list(runs)[1:]:
            seeds = sorted(runs["backprop"].keys() & runs[method].keys())
            if len(seeds) < 2:
                continue
            theirs, ours = ([100 * runs[m][s].accuracy for s in seeds] for m in ("backprop", method))
            difference = [a - b for a, b in zip(ours, theirs, strict=True)]
            rates = f"{runs['backprop'][seeds[0]].lr}; {runs[method][seeds[0]].lr}"
            results = (interval(theirs), method, interval(ours), interval(difference, "+.2f"))
            lines.append((f"{dataset} {network}", epochs, len(seeds), *results, rates))
    columns = ("network", "epochs", "seeds", "backprop %", "method", "its %", "- backprop (95 %)")
    return markdown((*columns, "rates (backprop; it)"), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("tune", "final", "table"))
    parser.add_argument("--suite", choices=tuple(SUITES), default="mnist_mlp_100")
    parser.add_argument("--root", default="data", help="folder of MNIST, or of the CIFAR-10 image folders")
    parser.add_argument("--methods", nargs="+", choices=("backprop", "AltMin", LIVE), help="all if not given")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1, help="processes that train")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if arguments.results is None:
        arguments.results = RESULTS.with_stem("accuracy_small") if arguments.small else RESULTS
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", "You defined a `validation_step`")  # final runs hold nothing out
    if arguments.command == "table":
        print(table(arguments.results))
    else:
        run(arguments)


if __name__ == "__main__":
    main()
