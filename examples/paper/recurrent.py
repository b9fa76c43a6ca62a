"""An Elman network on sequential MNIST: AltMin with a code per time step, beside backprop through time.

    python examples/paper/recurrent.py tune   --root data
    python examples/paper/recurrent.py final  --root data
    python examples/paper/recurrent.py signal --root data
    python examples/paper/recurrent.py pixels --root data
    python examples/paper/recurrent.py table

An image is read row by row: 28 steps of 28 numbers from 0 to 1, 15 or 50 tanh units, batches of 1,024, Adam with a
cosine to zero. `tune` holds out a sixth of the training set and tries each rate for 10 epochs; `final` trains on
all of it for as many with each method's best rate and asks the test set once. `signal` records how far the
codes of each step move, beside the norms of backprop's gradients there, and plots both. `pixels` reads pixel by pixel,
784 steps, to show that it runs. The methods "..., all steps" have an output layer that reads the states of all 28
steps, where that of the others reads the last one's. ``tune --epochs 50 --methods backprop`` asks what more time would
bring. `--small` trains one epoch with one seed, for another results file; `--workers N` trains N networks at a time.
Rows are appended to docs/results/recurrent.csv as runs end; a run whose row exists is not repeated.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import logging
import statistics
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # for figures, intervals, rows and runs
from figures import pyplot, save
from intervals import interval
from rows import append, markdown, read
from runs import judged, timed_fit
from workers import results

from lightning_altmin import AltMin, AltMinModule, BackpropModule, CurvatureCodes, GradientCodes, LocalGradient
from lightning_altmin.data import VisionDataModule
from lightning_altmin.nn import ElmanRNN

RESULTS = Path(__file__).parents[2] / "docs" / "results"
ALL_STEPS = ", all steps"
METHODS = ("backprop", "AltMin", "backprop" + ALL_STEPS, "AltMin" + ALL_STEPS)
RATES = (0.003, 0.006, 0.012, 0.025)
HIDDEN = (15, 50)
EPOCHS, SMALL_EPOCHS, BATCH = 10, 1, 1024
SHARE = 0.1  # of the exact step of each code


@dataclass(frozen=True)
class Row:
    """One run."""

    phase: str
    hidden: int
    method: str
    epochs: int
    lr: float
    seed: int
    accuracy: float = float("nan")
    seconds: float = float("nan")

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.phase, self.hidden, self.method, self.epochs, self.lr, self.seed)


def train(row: Row, root: str, in_features: int = 28, batch: int = BATCH, limit: float | int = 1.0) -> Row:
    """One run; judged by the samples held out when tuning, else by the test set."""
    seed_everything(row.seed, verbose=False)
    held_out = 1 / 6 if row.phase == "tune" else 0.0
    data = VisionDataModule("MNIST", root=root, batch_size=batch, normalize=False, val_split=held_out)
    data.setup("fit")
    reads = 784 // in_features if row.method.endswith(ALL_STEPS) else 1
    network = ElmanRNN(in_features, row.hidden, 10, reads=reads)
    optimizer = functools.partial(torch.optim.Adam, lr=row.lr, fused=True)
    steps = row.epochs * (len(data.train_dataloader()) if isinstance(limit, float) else limit)
    schedule: dict[str, Any] = {
        "lr_scheduler": functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps),
        "lr_interval": "step",
    }
    module: AltMinModule | BackpropModule
    if row.method.startswith("backprop"):
        module = BackpropModule(network, optimizer=optimizer, **schedule)
    else:
        # The 784 steps of the pixels leave nothing of any share below 1: plain steps of rate 1 there.
        codes = CurvatureCodes(share=SHARE) if in_features > 1 else GradientCodes(steps=1, lr=1.0)
        module = AltMinModule(network, codes=codes, weights=LocalGradient(optimizer), **schedule)
    seconds = timed_fit(module, data, row.epochs, limit_train_batches=limit)
    name = "val" if row.phase == "tune" else "test"
    accuracy = judged(module, data, name)[f"{name}_acc"]
    return Row(**(asdict(row) | {"accuracy": round(accuracy, 4), "seconds": round(seconds, 1)}))


def best_rate(rows: list[Row], hidden: int, method: str, epochs: int) -> float:
    of = ("tune", hidden, method, epochs)
    tuned = [r for r in rows if (r.phase, r.hidden, r.method, r.epochs) == of]
    if not tuned:
        raise SystemExit(f"no tuning runs of {method} with {hidden} units: run `tune` first")
    return max(tuned, key=lambda r: r.accuracy).lr


def run(arguments: argparse.Namespace) -> None:
    path, epochs = arguments.results, SMALL_EPOCHS if arguments.small else EPOCHS
    known = read(path, Row)
    pairs = list(itertools.product(arguments.hidden, arguments.methods))
    if arguments.command == "tune":
        print(markdown(("method", "rates tried"), [(m, ", ".join(map(str, RATES))) for m in arguments.methods]))
        tuned = arguments.epochs or epochs
        rows = [Row("tune", hidden, method, tuned, lr, 100) for hidden, method in pairs for lr in RATES]
    else:
        rates = {pair: best_rate(known, *pair, epochs) for pair in pairs}
        rows = [
            Row("final", hidden, method, epochs, rates[hidden, method], seed)
            for seed in arguments.seeds
            for hidden, method in pairs
        ]
    done = {row.key for row in known}
    left = [row for row in rows if row.key not in done]
    for row in results(functools.partial(train, root=arguments.root), left, arguments.workers):
        append(path, [row])
        print(row, flush=True)


# ---------------------------------------------------------------- what arrives at each step


def signal(arguments: argparse.Namespace) -> None:
    """At several times of one AltMin run: norms of code moves and of backprop's gradients, step by step."""
    seed_everything(1, verbose=False)
    data = VisionDataModule("MNIST", root=arguments.root, batch_size=BATCH, normalize=False)
    data.setup("fit")
    core = AltMin(ElmanRNN(28, 50, 10), nn.CrossEntropyLoss(), codes=CurvatureCodes(share=SHARE))
    rows = []
    for number, (x, y) in enumerate(data.train_dataloader()):
        if number in (0, 50):
            step = core.encode(x, y)
            core.solve_codes(step)
            backward = _gradient_norms(core, x, y)
            signals = [1.0 if s is None else float(s) for s in step.signals]
            for t, (move, arrived, gradient) in enumerate(zip(step.moves, signals, backward, strict=True)):
                norm = float(move.double().norm() * core.objective.mu)  # squares of the lowest underflow in float32
                rows.append((number, t + 1, norm, norm / arrived, gradient))
            core.fill_gradients(step)
            core.optimizer.zero_grad()
        core.step(x, y, keep_codes=False)
        if number == 50:
            break
    path = RESULTS / "recurrent_signal.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("batch", "step", "move", "move_over_share", "backprop"))
        writer.writerows(rows)
    _plot(rows)


def _gradient_norms(core: AltMin, x: Tensor, y: Tensor) -> list[float]:
    """Norms of the gradients of the summed loss with respect to every code, by backprop through time."""
    network = core.network
    assert isinstance(network, ElmanRNN)
    inputs, begun = network.steps(x)
    codes: list[Tensor] = []
    code = x.new_zeros(len(x), network.hidden)
    for t in range(inputs.shape[1]):
        code = network.cell(network.step_input(code, inputs[:, t], begun[:, t]))
        codes.append(code)
    loss = nn.functional.cross_entropy(network.head(network.activation(code)), y, reduction="sum")
    return [float(g.norm()) for g in torch.autograd.grad(loss, codes)]


def _plot(rows: list[tuple[int, int, float, float, float]]) -> None:
    figure, panels = pyplot.subplots(1, 2, figsize=(8, 3), sharey=True)
    for panel, batch in zip(panels, (0, 50), strict=True):
        chosen = [row for row in rows if row[0] == batch]
        steps = [row[1] for row in chosen]
        panel.semilogy(steps, [row[2] for row in chosen], label="AltMin: mu times the move")
        panel.semilogy(steps, [row[3] for row in chosen], label="divided by the share")
        panel.semilogy(steps, [row[4] for row in chosen], "--", label="backprop: gradient")
        panel.set_title(f"batch {batch}")
        panel.set_xlabel("time step")
    panels[0].set_ylabel("norm over the batch")
    panels[0].legend(fontsize=7)
    figure.tight_layout()
    save(figure, RESULTS / "recurrent_signal.svg")


def pixels(arguments: argparse.Namespace) -> None:
    row = Row("pixels", 50, "AltMin", 1, 0.001, 1)
    append(arguments.results, [train(row, arguments.root, in_features=1, batch=128, limit=20)])


def table(path: Path) -> str:
    lines = []
    rows = [row for row in read(path, Row) if row.phase == "final"]
    for hidden in HIDDEN:
        for method in METHODS:
            chosen = [row for row in rows if (row.hidden, row.method) == (hidden, method)]
            if chosen:
                accuracy = interval([100 * row.accuracy for row in chosen])
                pace = statistics.median(row.seconds for row in chosen)
                lines.append((hidden, method, chosen[0].lr, len(chosen), accuracy, f"{pace:.0f}"))
    return markdown(("units", "method", "rate", "seeds", "test accuracy %", "seconds"), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("tune", "final", "signal", "pixels", "table"))
    parser.add_argument("--root", default="data", help="folder of MNIST")
    parser.add_argument("--hidden", type=int, nargs="+", default=HIDDEN)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--epochs", type=int, help="of a tuning run, if not as many as of a final one")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--workers", type=int, default=1, help="processes that train")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if arguments.small:
        arguments.seeds = arguments.seeds[:1]
    if arguments.results is None:
        arguments.results = RESULTS / f"recurrent{'_small' if arguments.small else ''}.csv"
    warnings.filterwarnings("ignore")
    if arguments.command == "table":
        print(table(arguments.results))
    elif arguments.command in ("signal", "pixels"):
        {"signal": signal, "pixels": pixels}[arguments.command](arguments)
    else:
        run(arguments)


if __name__ == "__main__":
    main()
