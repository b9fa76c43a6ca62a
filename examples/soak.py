"""Kills one of two processes at a random batch, resumes from the last checkpoint, and compares with a run left alone.

    python examples/soak.py --runs 200 --output docs/results/soak.csv

Every bit of weights, buffers and optimizer state has to be equal at the end; the script fails at the first that is not.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import signal
import tempfile
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from lightning_altmin import AltMinModule
from lightning_altmin.data import DigitsDataModule
from lightning_altmin.nn import MLP

PROCESSES, EPOCHS, BATCH = 2, 2, 50
SECONDS = 600  # in which a run has to end, on a busy machine too


class Kill(Callback):
    """Kills its own process before a batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            os.kill(os.getpid(), signal.SIGKILL)


def train(rank: int, port: int, folder: Path, kill: tuple[int, int] | None, resume: bool) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES, "LOCAL_WORLD_SIZE": PROCESSES}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "soak"}
    os.environ.update({name: str(value) for name, value in environment.items()})
    seed_everything(0, verbose=False)
    module = AltMinModule(MLP(64, [32, 32], 10))
    callbacks: list[Callback] = [ModelCheckpoint(folder, save_last=True, every_n_train_steps=3, save_top_k=0)]
    if kill is not None and kill[0] == rank:
        callbacks.append(Kill(kill[1]))
    trainer = Trainer(
        accelerator="cpu",
        devices=PROCESSES,
        strategy=DDPStrategy(timeout=timedelta(seconds=20)),
        max_epochs=EPOCHS,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    last = folder / "last.ckpt"
    trainer.fit(
        module, datamodule=DigitsDataModule(batch_size=BATCH), ckpt_path=last if resume and last.exists() else None
    )
    if rank == 0:
        torch.save([module.state_dict(), trainer.optimizers[0].state_dict()], folder / "end")


def run(folder: Path, kill: tuple[int, int] | None = None, resume: bool = False) -> float:
    """Train on all processes; seconds until the last one has ended."""
    spawn = mp.get_context("spawn")
    port = random.Random().randrange(20000, 60000)
    workers = [spawn.Process(target=train, args=(r, port, folder, kill, resume)) for r in range(PROCESSES)]
    begin = time.monotonic()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(SECONDS)
        if worker.is_alive():
            raise SystemExit(f"a process did not end within {SECONDS} s")
    failed = [worker.exitcode for worker in workers if worker.exitcode]
    if kill is None and failed:
        raise SystemExit(f"a run that should have gone well ended with {failed}")
    if kill is not None and len(failed) != PROCESSES:
        raise SystemExit(f"a process went on alone: exit codes {[worker.exitcode for worker in workers]}")
    return time.monotonic() - begin


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    rows: list[list[Any]] = []
    with tempfile.TemporaryDirectory() as name:
        straight = Path(name) / "straight"
        run(straight)
        expected = torch.load(straight / "end", weights_only=True)
        batches = torch.load(straight / "last.ckpt", weights_only=True)["global_step"]
        for number in range(args.runs):
            folder = Path(name) / str(number)
            folder.mkdir()
            kill = (draw.randrange(PROCESSES), draw.randrange(batches))
            ended = run(folder, kill)
            resumed = (folder / "last.ckpt").exists()
            run(folder, resume=True)
            same = equal(torch.load(folder / "end", weights_only=True), expected)
            rows.append([number, *kill, resumed, f"{ended:.1f}", same])
            print(*rows[-1], flush=True)
            if args.output:
                with args.output.open("w", newline="") as file:
                    writer = csv.writer(file)
                    writer.writerow(
                        ["run", "killed_process", "before_batch", "had_checkpoint", "ended_after_s", "equal"]
                    )
                    writer.writerows(rows)
            if not same:
                raise SystemExit(f"run {number} differs from the one left alone")
    print(f"{len(rows)} runs, all equal")


if __name__ == "__main__":
    main()
