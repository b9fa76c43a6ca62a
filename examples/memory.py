"""AM-mem beside backprop in the first mini-batches, and what its settings do.

    python examples/memory.py tune  --suite mlp_100 --root data
    python examples/memory.py final --suite mlp_100 --root data
    python examples/memory.py sweep --suite lenet --root data
    python examples/memory.py study --suite lenet --root data
    python examples/memory_report.py --figure docs/results/memory.svg

`tune` holds out a sixth of the training set and runs backprop with Adam and with SGD (momentum 0.9) at several rates;
`final` trains on the whole of it and reports the test set after some numbers of mini-batches, backprop with the rate
that was best *for that number of batches*, AM-mem with its default settings for all of them. `sweep` trains AM-mem at
the corners and in the middle of the range of its settings, `study` with one of its parts left out or replaced, over
several seeds; both judge by the samples held out. Every finished run is written at once to
docs/results/memory.csv, a row per number of batches; a run whose rows exist is not repeated. `memory_report.py` makes
the tables and the figure of the documentation.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rows import append, read
from torch import Tensor, nn
from torch.nn import functional

from lightning_altmin import AltMin, CoactivationMemory
from lightning_altmin.data import ImageFolderDataModule, VisionDataModule
from lightning_altmin.guard import NonFiniteError
from lightning_altmin.nn import MLP, ConvNet, LeNet5

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "memory.csv"
RATES = {
    "Adam": (0.001, 0.002, 0.004, 0.006, 0.008, 0.012, 0.016),
    "SGD": (0.02, 0.05, 0.1, 0.15, 0.2, 0.3),
}
MEMORY = "AM-mem"
DEFAULT = "step=0.8 ridge=1.0 every=10"
GRID = (
    *itertools.product((0.1, 0.4, 0.8, 1.0), (0.1, 0.3, 1.0, 3.0, 10.0), (10,)),
    *itertools.product((0.8, 1.0), (0.1, 1.0), (1, 50)),
)
# Of CIFAR-10, for its time.
CORNERS = (
    *((1.0, 0.1, 10), (1.0, 0.1, 50), (0.8, 1.0, 10), (1.0, 1.0, 10)),
    *((1.0, 10.0, 10), (0.1, 0.1, 10), (0.1, 10.0, 10)),
)
STUDIED = {
    "mlp_100": ("", "inputs=moved", "limit=inf", "forgetting=0.8", "forgetting=0.99"),
    "mlp_500": ("", "rank=0", "rank=4", "rank=16", "rank=64"),
    "wide": ("rank=0", "rank=16", "rank=64", "rank=256", ""),
    "lenet": ("", "limit=inf", "positions=mean", "inputs=moved", "rank=32"),
    "stream": (
        *(
            f"form=solve{solver} every=5{features} order={order}"
            for solver in ("", " solver=bcd")
            for features in (" features=frozen", "")
            for order in ("shuffled", "sorted")
        ),
        "order=shuffled",
        "order=sorted",
    ),
}
STUDY_SEEDS = 3


@dataclass(frozen=True)
class Suite:
    """A network, its data, and the numbers of batches after which it is judged."""

    network: Callable[[], nn.Module]
    batch: int
    marks: tuple[int, ...]
    data: Callable[[str, float], Any]
    tune_seeds: int = 3


def mnist(root: str, held_out: float) -> Any:
    return VisionDataModule("MNIST", root=root, batch_size=200, val_split=held_out)


def cifar10(root: str, held_out: float) -> Any:
    return ImageFolderDataModule(root, batch_size=200, val_split=held_out, augment=False)


SUITES = {
    "mlp_100": Suite(functools.partial(MLP, 784, [100, 100], 10), 200, (25, 100, 300), mnist),
    "mlp_500": Suite(functools.partial(MLP, 784, [500, 500], 10), 200, (25, 100, 300), mnist),
    "lenet": Suite(LeNet5, 128, (25, 100, 468), mnist, tune_seeds=2),
    "wide": Suite(functools.partial(MLP, 784, [5000, 100], 10), 200, (25, 100, 300), mnist),
    "stream": Suite(functools.partial(MLP, 784, [500, 500], 10), 200, (250,), mnist),
    "cifar10_mlp": Suite(functools.partial(MLP, 3072, [500, 500], 10), 200, (100, 208), cifar10),
    "cifar10_conv": Suite(functools.partial(ConvNet, 3, 10, channels=(16, 32, 64)), 128, (100, 325), cifar10),
    "cifar10_conv_plain": Suite(
        functools.partial(ConvNet, 3, 10, channels=(16, 32, 64), batch_norm=False), 128, (100, 325), cifar10
    ),
}


@dataclass(frozen=True)
class Row:
    """The accuracy of one run after some number of batches; 0 once it has diverged."""

    suite: str
    phase: str
    method: str
    setting: str
    seed: int
    batches: int
    accuracy: float = math.nan
    loss: float = math.nan

    @property
    def run(self) -> tuple[str, ...]:
        return self.suite, self.phase, self.method, self.setting, str(self.seed)


Step = Callable[[Tensor, Tensor], None]


def backprop(network: nn.Module, method: str, rate: float) -> Step:
    optimizer: torch.optim.Optimizer
    if method == "Adam":
        optimizer = torch.optim.Adam(network.parameters(), lr=rate, fused=True)
    else:
        optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9, fused=True)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        functional.cross_entropy(network(x), y).backward()
        optimizer.step()

    return step


def memory(network: nn.Module, setting: str) -> Step:
    values = parsed(setting)
    if values.pop("features", None) == "frozen":
        for layer in [m for m in network.modules() if isinstance(m, nn.Linear)][:-1]:
            layer.requires_grad_(False)
    values.pop("order", None)
    core = AltMin(network, nn.CrossEntropyLoss(), weights=CoactivationMemory(**values))

    def step(x: Tensor, y: Tensor) -> None:
        core.step(x, y, keep_codes=False)

    return step


def parsed(setting: str) -> dict[str, Any]:
    """``"step=0.8 limit=inf"`` as arguments of a memory, and what else the setting says."""
    values: dict[str, Any] = {}
    for pair in setting.split():
        key, value = pair.split("=")
        try:
            values[key] = int(value)
        except ValueError:
            try:
                values[key] = float(value)
            except ValueError:
                values[key] = value
    return values


class Samples:
    """A data module's samples as tensors: those to train on, and those to judge by."""

    def __init__(self, name: str, root: str, held_out: float) -> None:
        module = SUITES[name].data(root, held_out)
        module.prepare_data()
        module.setup("fit")
        module.setup("test")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the loader shuffles: the same samples stand at the same places in every process
            self.train = self._all(module.train_dataloader())
        self.judged = self._all(module.val_dataloader() if held_out else module.test_dataloader())

    def to(self, device: str) -> Samples:
        """The same samples on a device."""
        moved = copy.copy(self)
        moved.train = self.train[0].to(device), self.train[1].to(device)
        moved.judged = self.judged[0].to(device), self.judged[1].to(device)
        return moved

    @staticmethod
    def _all(loader: Any) -> tuple[Tensor, Tensor]:
        batches = list(loader)
        return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])

    def batches(self, size: int, count: int, by_class: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Epochs in a random order, or class by class, without the last smaller batch."""
        x, y = self.train
        made = 0
        while True:
            order = torch.randperm(len(x)).to(x.device)
            if by_class:
                order = order[torch.argsort(y[order], stable=True)]
            for chosen in order.split(size):
                if len(chosen) == size:
                    yield x[chosen], y[chosen]
                    made += 1
                    if made == count:
                        return


@torch.no_grad()
def judge(network: nn.Module, samples: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Accuracy and mean loss."""
    network.eval()
    x, y = samples
    outputs = torch.cat([network(part) for part in x.split(1000)])
    network.train()
    return float((outputs.argmax(1) == y).float().mean()), float(functional.cross_entropy(outputs, y))


def train(run: tuple[str, str, str, str, int], samples: Samples) -> list[Row]:
    """One run, judged at its suite's marks."""
    suite_name, phase, method, setting, seed = run
    suite = SUITES[suite_name]
    torch.manual_seed(seed)  # the same weights and the same order of batches for all methods
    network = suite.network()
    step = memory(network, setting) if method == MEMORY else backprop(network, method, float(setting))
    rows, diverged = [], False
    by_class = "order=sorted" in setting
    for number, (x, y) in enumerate(samples.batches(suite.batch, suite.marks[-1], by_class), 1):
        if not diverged:
            try:
                step(x, y)
            except NonFiniteError:
                diverged = True
        if number in suite.marks:
            accuracy, loss = (0.0, math.nan) if diverged else judge(network, samples.judged)
            rows.append(Row(suite_name, phase, method, setting, seed, number, accuracy, loss))
    return rows


def best(rows: list[Row], suite: str, method: str, batches: int) -> str:
    """The rate with the highest accuracy on the samples held out, after this number of batches; a mean over seeds."""
    tuned = [r for r in rows if (r.suite, r.phase, r.method, r.batches) == (suite, "tune", method, batches)]
    if not tuned:
        raise SystemExit(f"no tuning runs of {method} on {suite}: run `tune` first")
    settings = dict.fromkeys(r.setting for r in tuned)
    return max(settings, key=lambda s: statistics.mean(r.accuracy for r in tuned if r.setting == s))


def planned(phase: str, name: str, rows: list[Row], seeds: int) -> list[tuple[str, str, str, str, int]]:
    suite = SUITES[name]
    if phase == "sweep":
        swept = CORNERS if name.startswith("cifar10") else GRID
        return [(name, phase, MEMORY, f"step={s} ridge={r} every={k}", 100) for s, r, k in swept]
    if phase == "study":
        seeds_used = range(100, 100 + STUDY_SEEDS)
        return [(name, phase, MEMORY, setting, seed) for seed in seeds_used for setting in STUDIED.get(name, ())]
    if phase == "tune":
        tried = [(method, str(rate)) for method, rates in RATES.items() for rate in rates]
        return [(name, phase, method, rate, 100 + seed) for seed in range(suite.tune_seeds) for method, rate in tried]
    chosen = [(MEMORY, DEFAULT)]
    for method in RATES:
        chosen += dict.fromkeys((method, best(rows, name, method, mark)) for mark in suite.marks)
    return [(name, phase, method, setting, seed) for seed in range(seeds) for method, setting in chosen]


def execute(phase: str, name: str, root: str, path: Path, seeds: int, minutes: float) -> None:
    samples, start = None, time.monotonic()
    for run in planned(phase, name, read(path, Row), seeds):
        if (*run[:-1], str(run[-1])) in {row.run for row in read(path, Row)}:
            continue
        if time.monotonic() - start > 60 * minutes:
            print("more runs are planned: call again")
            return
        if samples is None:
            samples = Samples(name, root, 0.0 if phase == "final" else 1 / 6)
        rows = train(run, samples)
        append(path, rows)
        print(*run, *(f"{100 * row.accuracy:.2f}" for row in rows), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("tune", "final", "sweep", "study"))
    parser.add_argument("--suite", choices=tuple(SUITES), default="mlp_100")
    parser.add_argument("--root", default="data", help="folder of MNIST, or of the CIFAR-10 image folders")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after so long")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    execute(arguments.command, arguments.suite, arguments.root, arguments.results, arguments.seeds, arguments.minutes)


if __name__ == "__main__":
    main()
