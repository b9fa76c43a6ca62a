"""Kills one of two processes at a random moment, resumes from the last checkpoint, and compares with a run left alone.

    python examples/soak.py --runs 200 --output docs/results/soak.csv

Drawn for every run: the process, the batch, the moment in it (one is in the middle of writing a checkpoint), SIGKILL or
SIGTERM. Every bit of weights, buffers, optimizer state and random generators of both processes has to be equal at the
end; the script fails at the first run that is not, that hangs, or in which a process goes on alone. Rows are written as
they come, and a script that was stopped goes on after the last of them.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import random
import signal
import socket
import tempfile
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lightning_altmin import AltMinModule
from lightning_altmin.data import DigitsDataModule

PROCESSES, EPOCHS, BATCH, SAVES = 2, 2, 100, 2  # two epochs of eight batches, a checkpoint after every second one
LIMIT = 900  # seconds in which a run has to end, on a machine that is stopped now and then too
MOMENTS = ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end", "writing a checkpoint")
COLUMNS = (
    "run",
    "killed_process",
    "signal",
    "batch",
    "moment",
    "resumed_after",
    "stopped_in_s",
    "resumed_in_s",
    "equal",
)


@dataclass(frozen=True)
class Kill:
    """What happens to which process, and when."""

    process: int
    signal: signal.Signals
    batch: int
    moment: str

    @property
    def strikes_in(self) -> int:
        """The batch in which it happens: a checkpoint is written at the end of every ``SAVES``-th."""
        return self.batch if self.moment != MOMENTS[-1] else (self.batch // SAVES + 1) * SAVES - 1

    @classmethod
    def drawn(cls, seed: str, batches: int) -> Kill:
        draw = random.Random(seed)
        signals = (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)
        moment, process = draw.choice(MOMENTS), draw.randrange(PROCESSES)
        if moment == MOMENTS[-1]:
            process = 0  # which writes them
        return cls(process, draw.choice(signals), draw.randrange(batches), moment)


class Killer(Callback):
    """Sends its own process a signal, once."""

    def __init__(self, kill: Kill) -> None:
        self.kill = kill
        if kill.moment != MOMENTS[-1]:
            setattr(self, kill.moment, self.strike)

    def strike(self, trainer: Trainer, *rest: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.kill.batch:
            os.kill(os.getpid(), self.kill.signal)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self.kill.moment == MOMENTS[-1] and trainer.fit_loop.total_batch_idx >= self.kill.batch:
            checkpoint["bomb"] = Bomb(self.kill.signal)


class Bomb:
    """Goes off when the pickler has written what is before it."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number

    def __reduce__(self) -> Any:
        os.kill(os.getpid(), self.number)
        return OrderedDict, ()  # which a checkpoint may hold: after SIGTERM it is written to its end


def train(rank: int, port: int, folder: Path, kill: Kill | None) -> None:
    """One process's run: from the last checkpoint in the folder if there is one."""
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES, "LOCAL_WORLD_SIZE": PROCESSES}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "soak"}
    os.environ.update({name: str(value) for name, value in environment.items()})
    warnings.simplefilter("ignore")
    seed_everything(rank, verbose=False)
    layers = [nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 32), nn.ReLU()]
    module = AltMinModule(nn.Sequential(*layers, nn.Linear(32, 10)))
    saves = ModelCheckpoint(folder, save_last=True, every_n_train_steps=SAVES, save_top_k=0)
    trainer = Trainer(
        accelerator="cpu",
        devices=PROCESSES,
        strategy=DDPStrategy(timeout=timedelta(seconds=300)),
        max_epochs=EPOCHS,
        callbacks=[saves] if kill is None or kill.process != rank else [Killer(kill), saves],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    last = folder / "last.ckpt"
    data = DigitsDataModule(batch_size=BATCH)
    trainer.fit(module, datamodule=data, ckpt_path=last if last.exists() else None, weights_only=True)
    state = {"weights": module.state_dict(), "optimizer": trainer.optimizers[0].state_dict()}
    torch.save(state | {"torch": torch.get_rng_state(), "batches": trainer.global_step}, folder / f"end{rank}")


def run(folder: Path, kill: Kill | None = None) -> float:
    """Train on all processes; seconds until the last one has ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fork = multiprocessing.get_context("fork")  # they start with everything imported
    workers = [fork.Process(target=_quietly, args=(train, r, port, folder, kill)) for r in range(PROCESSES)]
    begin = time.monotonic()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(max(0.0, begin + LIMIT - time.monotonic()))
    waiting = [worker for worker in workers if worker.is_alive()]
    codes = [worker.exitcode for worker in workers]
    for worker in waiting:
        worker.kill()
        worker.join()
    if waiting:
        raise SystemExit(f"{len(waiting)} processes did not end within {LIMIT} s, {kill}\n{_said(folder)}")
    if kill is None and any(codes):
        raise SystemExit(f"a run that should have gone well ended with {codes}\n{_said(folder)}")
    return time.monotonic() - begin


def _quietly(function: Callable[..., None], rank: int, port: int, folder: Path, kill: Kill | None) -> None:
    with (folder / f"output{rank}").open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    function(rank, port, folder, kill)


def _said(folder: Path) -> str:
    return "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("output*")))


def ends(folder: Path) -> list[Any]:
    return [torch.load(folder / f"end{rank}", weights_only=True) for rank in range(PROCESSES)]


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
    parser.add_argument("--output", type=Path, default=Path("soak.csv"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.output.exists():
        args.output.write_text(",".join(COLUMNS) + "\n")
    done = len(args.output.read_text().splitlines()) - 1
    with tempfile.TemporaryDirectory() as name:
        straight = Path(name) / "straight"
        straight.mkdir()
        run(straight)
        expected = ends(straight)
        for number in range(done, args.runs):
            folder = Path(name) / str(number)
            folder.mkdir()
            kill = Kill.drawn(f"{args.seed} {number}", expected[0]["batches"])
            stopped = run(folder, kill)
            finished = list(folder.glob("end*"))
            # a process that is killed in the last batch leaves the others nothing to be stopped in
            if finished and kill.strikes_in < expected[0]["batches"] - 1:
                raise SystemExit(f"{len(finished)} processes went on, {kill}\n{_said(folder)}")
            for file in finished:
                file.unlink()
            last = folder / "last.ckpt"
            after = torch.load(last, weights_only=True)["global_step"] if last.exists() else 0
            resumed = run(folder)
            same = equal(ends(folder), expected)
            row = [number, kill.process, kill.signal.name, kill.batch, kill.moment, after]
            with args.output.open("a", newline="") as table:
                csv.writer(table, lineterminator="\n").writerow([*row, f"{stopped:.1f}", f"{resumed:.1f}", same])
            if not same:
                raise SystemExit(f"run {number} differs from the one left alone: {kill}")
    print(f"{args.runs} runs, all equal")


if __name__ == "__main__":
    main()
