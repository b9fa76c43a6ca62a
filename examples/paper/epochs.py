"""Test accuracy by epoch, 50 epochs: the paper's curves of online training, beside backprop.

    python examples/paper/epochs.py tune  --suite mlp_100 --root data
    python examples/paper/epochs.py final --suite mlp_100 --root data
    python examples/paper/epochs.py table
    python examples/paper/epochs.py plot

Networks, batches of 200, methods and their settings are those of first_epoch.py: 784-100-100-10 (mlp_100) and
784-500-500-10 (mlp_500) on MNIST, 3072-500-500-10 on CIFAR-10 (cifar10_mlp). Rates are constant, for a stream has no
end that a schedule could count to; so the last digits are not those of accuracy.py, where they fall. `tune`
judges every setting after `TUNE_EPOCHS` epochs by a sixth of the training set held out, one seed; `final` trains on
the whole training set for 50 epochs with each method's best, by other seeds, and is judged by the test set. `--small`
does two epochs with one seed, in another results file. `--workers N` runs N at a time, `--device cuda` on a GPU. Every
finished run is written at once; a run whose rows exist is not repeated.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from pathlib import Path

import curves
import torch
from curves import Row, Run, best, plot, table
from first_epoch import HELD_OUT, METHODS, ONLINE, grid, loaded, memory, stepper
from rows import read

from lightning_altmin.guard import NonFiniteError

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "epochs.csv"
BATCH = 200
MARKS = (1, 2, 3, 5, 10, 15, 20, 30, 40, 50)
COLUMN, SHOWN = "epoch {}", (1, 5, 10, 20, 50)
TUNE_EPOCHS, SMALL_EPOCHS = 15, 2


def curve(run: Run, samples: memory.Samples, marks: list[int], device: str) -> Iterator[tuple[int, float]]:
    """Accuracy after the epochs of ``marks``."""
    network, step = stepper(run, device)
    per_epoch = len(samples.train[0]) // BATCH
    for number, (x, y) in enumerate(samples.batches(BATCH, marks[-1] * per_epoch, by_class=False), 1):
        step(x, y)
        if number % per_epoch == 0 and number // per_epoch in marks:
            yield number // per_epoch, memory.judge(network, samples.judged)[0]


def train(run: Run, root: str, epochs: int, device: str) -> list[Row]:
    """One run's rows, a mark each."""
    samples = loaded(run[0], root, HELD_OUT[run[1]], device)
    marks = [mark for mark in MARKS if mark <= epochs]
    found = dict.fromkeys(marks, 0.0)
    try:
        for mark, accuracy in curve(run, samples, marks, device):
            found[mark] = accuracy
    except NonFiniteError as error:  # diverged: its rows from here on say 0
        print(f"{run}: {error}", flush=True)
    return [Row(*run, mark, accuracy) for mark, accuracy in found.items()]


def execute(arguments: argparse.Namespace) -> None:
    rows = read(arguments.results, Row)
    suite, methods = arguments.suite, arguments.methods
    tuning_epochs, epochs = (SMALL_EPOCHS, SMALL_EPOCHS) if arguments.small else (TUNE_EPOCHS, MARKS[-1])
    runs: list[Run]
    if arguments.command == "tune":
        print(grid(methods), flush=True)
        epochs = tuning_epochs
        runs = [(suite, "tune", method, setting, 100) for method in methods for setting in METHODS[method]]
    else:
        ends = [row for row in rows if row.seen == tuning_epochs]
        runs = [(suite, "final", m, best(ends, suite, m), seed) for seed in range(arguments.seeds) for m in methods]
    loaded(suite, arguments.root, HELD_OUT[arguments.command])
    one = functools.partial(train, root=arguments.root, epochs=epochs, device=arguments.device)
    curves.execute(runs, one, arguments.results, arguments.workers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("tune", "final", "table", "plot"))
    parser.add_argument("--suite", choices=("mlp_100", "mlp_500", "cifar10_mlp"), default="mlp_100")
    parser.add_argument("--root", default="data", help="folder of the data set")
    parser.add_argument("--methods", nargs="+", choices=ONLINE, default=ONLINE)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1, help="processes that train")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.small:
        arguments.seeds = 1
    if arguments.results is None:
        arguments.results = RESULTS.with_stem("epochs_small") if arguments.small else RESULTS
    if arguments.command == "table":
        print(table(read(arguments.results, Row), COLUMN, SHOWN))
    elif arguments.command == "plot":
        plot(read(arguments.results, Row), arguments.results.with_suffix(".svg"), "epochs", errors=True)
    else:
        execute(arguments)


if __name__ == "__main__":
    main()
