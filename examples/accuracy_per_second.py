"""What accuracy a second of computing buys: MNIST test accuracy against training time, AltMin beside backprop.

    python examples/accuracy_per_second.py --root data
    python examples/accuracy_per_second.py --table

Both at the rate that paper/accuracy.py chose for backprop and for AltMin after one epoch (the same one), constant, five
seeds, one thread. Time is CPU time of training alone, the evaluations in between are not counted; compiling is done
before. Rows of docs/results/accuracy_per_second.csv are written as runs end; runs whose rows exist are not repeated.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from figures import pyplot, save
from intervals import half_width, interval
from rows import append, finished, markdown, read
from torch import Tensor, nn

from lightning_altmin import AltMin, CurvatureCodes, LocalGradient
from lightning_altmin.data import VisionDataModule
from lightning_altmin.nn import MLP

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "accuracy_per_second.csv"
NETWORKS = {"2x100": (100, 0.008), "2x500": (500, 0.004)}
BATCH, EVERY, BATCHES = 200, 30, 600
SHOWN = 300  # batches after which the table shows accuracies: an epoch
Step = Callable[[Tensor, Tensor], Any]


@dataclass(frozen=True)
class Row:
    """The accuracy of one run after so many batches, and the seconds of training until then."""

    network: str
    method: str
    seed: int
    batches: int
    seconds: float
    accuracy: float


def backprop(network: nn.Module, optimizer: Callable[[Any], torch.optim.Optimizer]) -> Step:
    stepped, loss = optimizer(network.parameters()), nn.CrossEntropyLoss()

    def step(x: Tensor, y: Tensor) -> None:
        stepped.zero_grad()
        loss(network(x), y).backward()
        stepped.step()

    return step


def altmin(network: nn.Module, optimizer: Callable[[Any], Any], steps: int = 1, compile: bool = False) -> Step:
    weights, codes = LocalGradient(optimizer), CurvatureCodes(steps=steps)
    core = AltMin(network, nn.CrossEntropyLoss(), codes=codes, weights=weights, compile=compile)
    return functools.partial(core.step, keep_codes=False)


METHODS: dict[str, Callable[[nn.Module, Callable[[Any], Any]], Step]] = {
    "backprop": backprop,
    "AltMin": altmin,
    "AltMin, compiled": functools.partial(altmin, compile=True),
    "AltMin, 5 code steps": functools.partial(altmin, steps=5),
}


def run(name: str, method: str, seed: int, data: VisionDataModule) -> list[Row]:
    """Accuracy after every `EVERY` batches of one run."""
    width, lr = NETWORKS[name]
    torch.manual_seed(seed)
    network = MLP(784, [width, width], 10)
    step = METHODS[method](network, functools.partial(torch.optim.Adam, lr=lr, fused=True))
    if "compiled" in method:  # both graphs, with and without measuring; then as if nothing had been
        start = {k: v.clone() for k, v in network.state_dict().items()}
        x, y = next(iter(data.train_dataloader()))
        for _ in range(7):
            step(x, y)
        network.load_state_dict(start)
        torch.manual_seed(seed)
        core: Any = step.func.__self__  # type: ignore[attr-defined]
        core.optimizer.state.clear()
        core.codes.curvature.fill_(1.0)
        core.batches_seen = 0
    rows, seconds, done = [], 0.0, 0
    while done < BATCHES:
        for x, y in data.train_dataloader():
            begun = time.process_time()
            step(x, y)
            seconds += time.process_time() - begun
            done += 1
            if done % EVERY == 0:
                rows.append(Row(name, method, seed, done, round(seconds, 4), accuracy(network, data)))
            if done == BATCHES:
                break
    return rows


@torch.no_grad()
def accuracy(network: nn.Module, data: VisionDataModule) -> float:
    right = total = 0
    for x, y in data.test_dataloader():
        right += int((network(x).argmax(1) == y).sum())
        total += len(y)
    return right / total


def curve(rows: list[Row], name: str, method: str) -> Iterator[tuple[int, list[float], list[float]]]:
    """The seeds' seconds and accuracies in per cent after each number of batches."""
    mine = [row for row in rows if (row.network, row.method) == (name, method)]
    for batches in sorted({row.batches for row in mine}):
        seeds = [row for row in mine if row.batches == batches]
        yield batches, [row.seconds for row in seeds], [100 * row.accuracy for row in seeds]


def table(path: Path = RESULTS) -> str:
    """What docs/speed.md shows, from the committed rows."""
    rows, lines = read(path, Row), []
    for name in NETWORKS:
        for method in METHODS:
            for batches, seconds, accuracies in curve(rows, name, method):
                if batches == SHOWN:
                    lines.append((name, method, interval(accuracies), interval(seconds)))
    columns = ("network", "method", f"test accuracy after {SHOWN} batches, % (95 %)", "seconds (95 %)")
    return markdown(columns, lines)


def plot(path: Path) -> None:
    rows = read(path, Row)
    figure, axes = pyplot.subplots(1, len(NETWORKS), figsize=(10, 4), sharey=True)
    for axis, name in zip(axes, NETWORKS, strict=True):
        for method in METHODS:
            points = list(curve(rows, name, method))
            seconds = [statistics.mean(seeds) for _, seeds, _ in points]
            means = [statistics.mean(seeds) for _, _, seeds in points]
            halves = [half_width(seeds) for _, _, seeds in points]
            axis.plot(seconds, means, label=method)
            low, high = zip(*[(m - h, m + h) for m, h in zip(means, halves, strict=True)], strict=True)
            axis.fill_between(seconds, low, high, alpha=0.2)
        axis.set(title=f"784-{name}-10", xlabel="CPU seconds of training, one thread", ylim=(90, 98.5))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("MNIST test accuracy, % (bands: 95 % intervals)")
    axes[0].legend()
    figure.tight_layout()
    save(figure, path.with_suffix(".svg"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--table", action="store_true", help="only print the table of the rows, and plot them")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path: Path = arguments.results
    if arguments.table:
        plot(path)
        print(table(path))
        return
    known = finished(path, "network", "method", "seed")
    data = VisionDataModule("MNIST", root=arguments.root, batch_size=BATCH, val_split=0.0)
    data.setup("fit")
    data.setup("test")
    for seed in range(arguments.seeds):
        for name in NETWORKS:
            for method in METHODS:
                if (name, method, str(seed)) not in known:
                    append(path, run(name, method, seed, data))


if __name__ == "__main__":
    main()
