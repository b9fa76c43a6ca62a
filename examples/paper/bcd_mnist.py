"""Three-splitting BCD on MNIST, 784-1500-1500-1500-10: the offline method at the setting its authors published.

    python examples/paper/bcd_mnist.py --root data --seeds 0 1 2
    python examples/paper/bcd_mnist.py --root data --small
    python examples/paper/bcd_mnist.py --table

Full batch, squared loss, gamma = rho = 1, alpha = 5, weights from 0.01 N(0, 1), biases 0.1, images in 0..1 without
normalisation, 50 sweeps. The authors' published runs reach 94.39 to 94.92 %, 94.61 % on average. `--small` is
784-200x3-10 on 10,000 samples, 15 sweeps.

Every sweep is a row of docs/results/bcd_mnist.csv, written at once, with the objective per sample every fifth. With
`--state FOLDER` the variables are kept after every fifth sweep (3 GB at full size), and an interrupted command goes on
from there; `--minutes M` stops after that time, its variables kept.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything

sys.path.insert(0, str(Path(__file__).parents[1]))  # for intervals and rows
from intervals import interval
from rows import append, markdown, read

from lightning_altmin.baselines.bcd import BCDModule, small_weights
from lightning_altmin.data import VisionDataModule
from lightning_altmin.nn import MLP

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "bcd_mnist.csv"
Run = tuple[int, int, int]
"""Width of the hidden layers, number of samples, seed."""
KEPT_EVERY = 5
OBJECTIVE_EVERY = 5  # it costs a fifth of a sweep


@dataclass(frozen=True)
class Row:
    """One sweep of one run."""

    width: int
    samples: int
    seed: int
    sweep: int
    accuracy: float
    objective: float
    seconds: float

    @property
    def run(self) -> Run:
        return self.width, self.samples, self.seed


class Record(Callback):
    """Judges the network on the test set after every sweep and writes a row; keeps the variables now and then."""

    def __init__(self, path: Path, run: Run, state: Path | None, data: LightningDataModule, end: float) -> None:
        self.path, self.run, self.state, self.data, self.end = path, run, state, data, end
        self.started = 0.0

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.started = time.perf_counter()

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if module.device.type == "cuda":
            torch.cuda.synchronize()
        seconds, sweep = time.perf_counter() - self.started, trainer.current_epoch + 1
        measured = sweep % OBJECTIVE_EVERY == 0
        batches = list(self.data.test_dataloader())
        right = sum(int((module(x.to(module.device)).argmax(1).cpu() == y).sum()) for x, y in batches)
        accuracy = round(right / sum(len(y) for _, y in batches), 4)
        objective = round(float(trainer.callback_metrics["train_objective"]), 6) if measured else math.nan
        row = Row(*self.run, sweep, accuracy, objective, round(seconds, 2))
        if (row.run, sweep) not in {(r.run, r.sweep) for r in read(self.path, Row)}:
            append(self.path, [row])
        print(row, flush=True)

    def on_train_epoch_end(self, trainer: Trainer, module: Any) -> None:
        trainer.should_stop = time.monotonic() > self.end
        if self.state is not None and (trainer.should_stop or (trainer.current_epoch + 1) % KEPT_EVERY == 0):
            trainer.save_checkpoint(self.state / "part.ckpt")
            (self.state / "part.ckpt").replace(self.state / "last.ckpt")


def run(arguments: argparse.Namespace, seed: int, end: float) -> None:
    width, samples, sweeps = (200, 10000, 15) if arguments.small else (1500, 60000, 50)
    done = [r.sweep for r in read(arguments.results, Row) if r.run == (width, samples, seed)]
    if done and max(done) >= sweeps:
        return
    state = None if arguments.state is None else arguments.state / f"bcd_{width}_{seed}"
    if state is not None:
        state.mkdir(parents=True, exist_ok=True)
    seed_everything(seed, verbose=False)
    data = VisionDataModule(
        "MNIST", root=arguments.root, batch_size=samples, normalize=False, val_split=60000 - samples
    )
    module = BCDModule(small_weights(MLP(784, [width] * 3, 10)))
    trainer = Trainer(
        accelerator=arguments.accelerator,
        devices=1,
        max_epochs=sweeps,
        log_every_n_steps=OBJECTIVE_EVERY,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Record(arguments.results, (width, samples, seed), state, data, end)],
    )
    last = None if state is None else state / "last.ckpt"
    trainer.fit(module, datamodule=data, ckpt_path=last if last is not None and last.exists() else None)


def table(path: Path) -> str:
    """Test accuracy after some sweeps, by size: means over seeds with 95 % intervals, lowest and highest."""
    rows = read(path, Row)
    lines = []
    for width, samples in dict.fromkeys((r.width, r.samples) for r in rows):
        sized = [r for r in rows if (r.width, r.samples) == (width, samples)]
        seconds = statistics.median(r.seconds for r in sized)
        for sweep in sorted({1, 2, 4, 10, 15, 50, max(r.sweep for r in sized)}):
            found = [100 * r.accuracy for r in sized if r.sweep == sweep]
            if found:
                shown = f"{interval(found)} ({min(found):.2f} to {max(found):.2f})"
                lines.append((f"784-{width}x3-10", samples, len(found), sweep, shown, f"{seconds:.1f}"))
    columns = ("network", "samples", "seeds", "sweeps", "test accuracy % (lowest to highest)", "seconds a sweep")
    return markdown(columns, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder of MNIST")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--state", type=Path, help="folder to keep the variables in, so that a run can go on")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this time")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the results and run nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)
    if arguments.table:
        print(table(arguments.results))
        return
    end = time.monotonic() + 60 * arguments.minutes
    for seed in arguments.seeds:
        if time.monotonic() < end:
            run(arguments, seed, end)


if __name__ == "__main__":
    main()
