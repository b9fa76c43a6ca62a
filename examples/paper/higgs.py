"""HIGGS in one pass: accuracy on held-out rows by rows seen, AltMin beside backprop.

    python examples/paper/higgs.py tune  --path data/HIGGS.csv.gz
    python examples/paper/higgs.py final --path data/HIGGS.csv.gz
    python examples/paper/higgs.py table
    python examples/paper/higgs.py plot

The file is at https://archive.ics.uci.edu/dataset/280/higgs; its last 500,000 rows are the test set, and one pass is
over the 10.5 million before them (less 50,000 held out), in the order of the file. **Without --path the rows are not
HIGGS**: a synthetic stream of its shape (28 features, two classes) is made while it is trained on, a million rows long,
whose classes are drawn with the probabilities that a fixed random network gives them. So the best possible accuracy is
known; it is the row "best possible", and its setting is empty.

28-300-300-2, ReLU, batches of 200, constant rates. `tune` has six settings per method, those of first_epoch.py, judged
by rows that neither training nor test has, after the first 200,000 rows; `final` uses each method's best with other
seeds, which draw the weights: all see the same rows. `--small` trains on a tenth, with one seed, in another results
file; `--workers N` runs N at a time.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

import curves
import torch
from curves import Row, Run, best, plot, table, unfinished
from first_epoch import METHODS, OFFLINE, grid, memory, step_of
from rows import append, read
from torch import Tensor

from lightning_altmin.data import HiggsDataModule
from lightning_altmin.guard import NonFiniteError
from lightning_altmin.nn import MLP

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "higgs.csv"
COLUMN = "{} rows"
FEATURES, BATCH = 28, 200
MARKS = (2_000, 10_000, 50_000, 200_000, 1_000_000)
TUNE_ROWS, HELD_OUT_ROWS = 200_000, 50_000
ONLINE = tuple(method for method in METHODS if method not in OFFLINE)
Batch = tuple[Tensor, Tensor]


class Synthetic:
    """Rows whose class probabilities are those of a fixed random network."""

    suite, rows = "synthetic", 1_000_000

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._first = torch.randn(FEATURES, 50, generator=generator) / FEATURES**0.5
        self._second = torch.randn(50, generator=generator)

    def _blocks(self, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Features, labels and the probability of label 1, without end."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            x = torch.randn(BATCH, FEATURES, generator=generator)
            chance = torch.sigmoid(torch.tanh(2 * x @ self._first) @ self._second)
            yield x, torch.bernoulli(chance, generator=generator).long(), chance

    def stream(self) -> Iterator[Batch]:
        return ((x, y) for x, y, _ in self._blocks(seed=1))

    def _judges(self, part: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        return itertools.islice(self._blocks(seed=2 if part == "val" else 3), HELD_OUT_ROWS // BATCH)

    def judged(self, part: str) -> Batch:
        xs, ys, _ = zip(*self._judges(part), strict=True)
        return torch.cat(xs), torch.cat(ys)

    def best_possible(self) -> float:
        """Accuracy on the test rows of who knows the network and says the likelier class."""
        return float(torch.cat([(chance > 0.5) == (y == 1) for _, y, chance in self._judges("test")]).float().mean())


class File:
    """The rows of the real file."""

    suite, rows = "HIGGS", 10_500_000 - HELD_OUT_ROWS

    def __init__(self, path: Path) -> None:
        self._data = HiggsDataModule(path, batch_size=BATCH, val_rows=HELD_OUT_ROWS, drop_last=True)
        self._data.setup("fit")
        self._data.setup("test")

    def stream(self) -> Iterator[Batch]:
        return iter(self._data.train_dataloader())

    def judged(self, part: str) -> Batch:
        loader = self._data.val_dataloader() if part == "val" else self._data.test_dataloader()
        xs, ys = zip(*loader, strict=True)
        return torch.cat(xs), torch.cat(ys)


@functools.cache
def rows_of(path: Path | None) -> Synthetic | File:
    """What a run learns from, made once in a process, or in the one it was forked from."""
    return Synthetic() if path is None else File(path)


@functools.cache
def judges_of(path: Path | None, part: str) -> Batch:
    """What it is judged by, likewise."""
    return rows_of(path).judged(part)


def marks(rows: int) -> list[int]:
    """Where a pass of this length is judged: at its end, too."""
    return [mark for mark in MARKS if mark < rows] + [rows]


def train(run: Run, path: Path | None, part: str, rows: int) -> list[Row]:
    """One run's rows, a mark each, and one where the pass ends."""
    _, _, method, setting, seed = run
    torch.manual_seed(seed)
    network = MLP(FEATURES, [300, 300], 2)
    step, judges = step_of(network, method, setting), judges_of(path, part)
    found = dict.fromkeys(marks(rows), 0.0)
    try:
        for number, (x, y) in enumerate(itertools.islice(rows_of(path).stream(), rows // BATCH), 1):
            step(x, y)
            if number * BATCH in found:
                found[number * BATCH] = memory.judge(network, judges)[0]
    except NonFiniteError as error:  # diverged: its rows from here on say 0
        print(f"{run}: {error}", flush=True)
    return [Row(*run, mark, accuracy) for mark, accuracy in found.items()]


def execute(arguments: argparse.Namespace) -> None:
    rows = read(arguments.results, Row)
    source = rows_of(arguments.path)
    share, suite = 10 if arguments.small else 1, source.suite
    runs: list[Run]
    if arguments.command == "tune":
        print(grid(ONLINE), flush=True)
        part, length = "val", TUNE_ROWS // share
        runs = [(suite, "tune", method, setting, 100) for method in ONLINE for setting in METHODS[method]]
    else:
        part, length = "test", source.rows // share
        if isinstance(source, Synthetic):
            bound: Run = (suite, "final", "best possible", "", 0)
            if unfinished([bound], rows):
                append(arguments.results, [Row(*bound, mark, source.best_possible()) for mark in marks(length)])
        ends = [row for row in rows if row.seen == TUNE_ROWS // share]
        runs = [(suite, "final", m, best(ends, suite, m), seed) for seed in range(arguments.seeds) for m in ONLINE]
    judges_of(arguments.path, part)
    one = functools.partial(train, path=arguments.path, part=part, rows=length)
    curves.execute(runs, one, arguments.results, arguments.workers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("tune", "final", "table", "plot"))
    parser.add_argument("--path", type=Path, help="HIGGS.csv.gz; without it, a synthetic stream of its shape")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1, help="processes that train")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.small:
        arguments.seeds = 1
    if arguments.results is None:
        arguments.results = RESULTS.with_stem("higgs_small") if arguments.small else RESULTS
    if arguments.command == "table":
        print(table(read(arguments.results, Row), COLUMN))
    elif arguments.command == "plot":
        plot(read(arguments.results, Row), arguments.results.with_suffix(".svg"), "rows seen")
    else:
        execute(arguments)


if __name__ == "__main__":
    main()
