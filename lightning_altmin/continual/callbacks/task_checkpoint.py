"""Checkpoints by task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from lightning_altmin.arguments import check_count
from lightning_altmin.continual.callbacks.stream_access import stream_data, trained_batches
from lightning_altmin.continual.task import Task


class TaskCheckpoint(Checkpoint):
    """Saves ``task=<index>.ckpt`` at the end of each task, and on the way ``last.ckpt`` to resume from.

    Files are replaced as a whole, so that a process killed while it writes leaves the one before. At the end of an
    epoch ``last.ckpt`` is written after validation and all hooks: a run that is resumed does not miss them.

    Args:
        folder: Where to; made if it is not there.
        every_n_batches: Write ``last.ckpt`` after every n-th batch, and at the end of every epoch; ``None`` never does.
        tasks: Whether to save at the end of each task.

    Raises:
        ValueError: If ``every_n_batches`` is not an integer >= 1, or nothing would ever be saved.
    """

    only_observes = True

    def __init__(self, folder: str | Path, every_n_batches: int | None = None, tasks: bool = True) -> None:
        if every_n_batches is not None:
            check_count("every_n_batches", every_n_batches, otherwise="None for no last.ckpt")
        if every_n_batches is None and not tasks:
            raise ValueError("every_n_batches=None and tasks=False would never save anything")
        self.folder = Path(folder)
        self.every_n_batches = every_n_batches
        self.tasks = tasks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is a stream."""
        if stage == "fit":
            stream_data(trainer, self)

    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        """Save the task's checkpoint."""
        if self.tasks:
            trainer.save_checkpoint(self.folder / f"task={task.index}.ckpt")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save the newest state, unless the epoch's end is about to do it."""
        last = batch_idx + 1 >= trainer.num_training_batches
        if self.every_n_batches is not None and not last and trained_batches(trainer) % self.every_n_batches == 0:
            trainer.save_checkpoint(self.folder / "last.ckpt")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the newest state."""
        if self.every_n_batches is not None:
            trainer.save_checkpoint(self.folder / "last.ckpt")
