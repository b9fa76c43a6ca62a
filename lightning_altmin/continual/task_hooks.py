"""Calls the hooks ``on_task_start`` and ``on_task_end`` of callbacks and of the LightningModule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from lightning_altmin.continual.task import Task

if TYPE_CHECKING:
    from lightning_altmin.continual.data_module import StreamDataModule, TaskStreamDataModule
    from lightning_altmin.continual.online_data_module import OnlineTaskStreamDataModule


class TaskHooks(Callback):
    """Base: which tasks have begun and ended, each hook called once also across a resume.

    The data module puts it into the Trainer for the time of a fit, behind all callbacks but checkpoints, so that when
    ``on_task_end`` is called the others have seen the task's last batch, and a checkpoint sees what they made of it. If
    a checkpoint was written between a task's last batch and ``on_task_end``, the resumed run calls it first.

    Args:
        data: The data module.
    """

    def __init__(self, data: StreamDataModule) -> None:
        self._started = 0
        self._ended = 0
        self._stream_data = data

    def attach(self, trainer: Trainer) -> None:
        """Put this callback into the Trainer, after checking that the others can do with the boundaries they get.

        Raises:
            MisconfigurationException: If a callback learns from boundaries that are hidden.
        """
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if not self._stream_data.boundaries:
            for callback in callbacks:
                if _has_hooks(callback) and not getattr(callback, "only_observes", False):
                    raise MisconfigurationException(
                        f"{type(callback).__name__} needs to know when tasks begin and end, which this stream hides: "
                        "use OnlineTaskStreamDataModule(boundaries=True), or TaskStreamDataModule"
                    )
        checkpoints = [index for index, callback in enumerate(callbacks) if isinstance(callback, Checkpoint)]
        callbacks.insert(checkpoints[0] if checkpoints else len(callbacks), self)

    def detach(self, trainer: Trainer) -> None:
        """Take this callback out of the Trainer."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if self in callbacks:
            callbacks.remove(self)

    def state_dict(self) -> dict[str, Any]:
        """How many tasks have begun and ended."""
        return {"started": self._started, "ended": self._ended}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._started, self._ended = state_dict["started"], state_dict["ended"]

    def begin(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        """Call ``on_task_start`` if the task has not begun, after what is missing of the tasks before."""
        while self._ended < task.index:
            self.end(trainer, pl_module, self._stream_data.stream[self._ended])
        if self._started == task.index:
            self._started += 1
            self._call("on_task_start", trainer, pl_module, task)

    def end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        """Call ``on_task_end`` if the task has not ended."""
        if self._ended == task.index:
            self._ended += 1  # before the calls: a checkpoint written in one of them must not repeat them
            self._call("on_task_end", trainer, pl_module, task)

    def _call(self, hook: str, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        for callback in list(trainer.callbacks):  # type: ignore[attr-defined]
            if callback is not self and hasattr(callback, hook):
                getattr(callback, hook)(trainer, pl_module, task)
        if self._stream_data.boundaries and hasattr(pl_module, hook):
            getattr(pl_module, hook)(task)


class EpochTaskHooks(TaskHooks):
    """Tasks begin and end with epochs; the run ends with the stream."""

    _stream_data: TaskStreamDataModule

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make up for what Lightning skips when it resumes from a checkpoint of an epoch's last ``on_train_batch_end``.

        It counts the epoch as trained, and begins the next one without its ``on_train_epoch_start`` and without
        counting it as begun; a checkpoint written in it would then be taken for one of a finished epoch.
        """
        loop: Any = trainer.fit_loop
        progress = loop.epoch_progress
        if loop.restarted_mid_epoch and progress.current.ready == progress.current.processed:
            self._end_if_over(trainer, pl_module)
            if not loop.done:
                progress.increment_ready()
                progress.increment_started()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Where the epoch's own hook was skipped, its first batch begins the task."""
        self.begin(trainer, pl_module, self._stream_data.task)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first epoch of a task begins it."""
        self.begin(trainer, pl_module, self._stream_data.task)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last epoch of a task ends it."""
        self._end_if_over(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run resumed between the very last batch and the end of its epoch has no more epochs."""
        self._end_if_over(trainer, pl_module)

    def _end_if_over(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = self._stream_data
        if data.task_is_over:
            self.end(trainer, pl_module, data.task)
            if data.task.index == len(data.stream) - 1:
                trainer.should_stop = True


class BatchTaskHooks(TaskHooks):
    """Tasks begin and end with batches of one epoch."""

    _stream_data: OnlineTaskStreamDataModule

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The first batch of a task begins it."""
        self.begin(trainer, pl_module, self._stream_data.task_of(batch_idx))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The last batch of a task ends it."""
        task = self._stream_data.task_of(batch_idx)
        if batch_idx + 1 == self._stream_data.ends[task.index]:
            self.end(trainer, pl_module, task)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run resumed after the very last batch has no more batches."""
        last = self._stream_data.stream[len(self._stream_data.stream) - 1]
        if trainer.fit_loop.batch_idx + 1 >= self._stream_data.ends[-1]:
            self.end(trainer, pl_module, last)


def _has_hooks(callback: Callback) -> bool:
    return hasattr(callback, "on_task_start") or hasattr(callback, "on_task_end")
