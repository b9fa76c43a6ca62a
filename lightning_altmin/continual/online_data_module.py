"""The data of a whole stream in a single pass, without boundaries."""

from __future__ import annotations

import bisect
from itertools import accumulate
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

from lightning_altmin.continual.data_module import StreamDataModule
from lightning_altmin.continual.replay import Replay
from lightning_altmin.continual.task import Task, TaskStream
from lightning_altmin.continual.task_hooks import BatchTaskHooks, TaskHooks
from lightning_altmin.continual.task_loader import OnePassLoader
from lightning_altmin.data.resumable_loader import ResumableLoader


class OnlineTaskStreamDataModule(StreamDataModule):
    """A stream in one epoch: every training sample once, task after task, in one loader that resumes at any batch.

    The learner is not told where tasks begin and end, unless ``boundaries`` is set: ``on_task_start`` and
    ``on_task_end`` are called for callbacks that only observe (those with ``only_observes = True``, as
    `ContinualEvaluation`), and a callback that needs boundaries to learn is refused. There is no validation; use
    ``ContinualEvaluation(part="val")``.

    Args:
        stream: The tasks; `fuzzy` blurs their boundaries.
        batch_size: New samples per batch and process; replayed ones come on top. A batch never spans two tasks.
        eval_batch_size: Samples per test batch.
        replay: Adds stored samples to the batches.
        shuffle: Whether a task's samples come in random order.
        seed: Of the orders. Torch's global generator is not used, so ``seed_everything`` does not change them.
        boundaries: Whether learning methods are told about boundaries.

    Raises:
        TypeError: If ``stream`` is not a `TaskStream`, or ``replay`` not a `Replay`.
        ValueError: If a batch size is not positive.
    """

    def __init__(
        self,
        stream: TaskStream,
        batch_size: int = 10,
        eval_batch_size: int = 1000,
        replay: Replay | None = None,
        shuffle: bool = True,
        seed: int = 0,
        boundaries: bool = False,
    ) -> None:
        super().__init__(stream, batch_size, eval_batch_size, replay, shuffle, seed)
        self.boundaries = boundaries
        self._ends: list[int] | None = None

    def trainer_kwargs(self) -> dict[str, Any]:
        """One epoch."""
        return {"max_epochs": 1}

    def check_trainer(self, trainer: Trainer) -> None:
        """Refuse a Trainer that passes over the stream more than once, or not over all of it."""
        super().check_trainer(trainer)
        if trainer.max_epochs != 1:
            raise MisconfigurationException(
                f"OnlineTaskStreamDataModule needs Trainer(max_epochs=1), got {trainer.max_epochs}: it passes once; "
                "use TaskStreamDataModule(epochs_per_task=...) for several epochs"
            )
        limit = trainer.limit_train_batches
        whole = isinstance(limit, float) and limit == 1.0  # the number 1 is one batch
        if not whole and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise MisconfigurationException(
                f"Trainer(limit_train_batches={limit}) would cut the stream short, for the whole "
                "of it is one epoch; use stream.first(n) or tasks with fewer samples"
            )

    def make_hooks(self) -> TaskHooks:
        """Boundaries are between batches."""
        return BatchTaskHooks(self)

    @property
    def task(self) -> Task:
        """The task of the current batch."""
        batch = 0 if self.trainer is None else max(0, self.trainer.fit_loop.batch_idx)
        return self.task_of(batch)

    @property
    def ends(self) -> list[int]:
        """For each task the number of the batch after its last one."""
        if self._ends is None:
            lengths = [self._train_loader(t.index, t.index, progress=False).epoch_length for t in self.stream]
            self._ends = list(accumulate(lengths))
        return self._ends

    def task_of(self, batch: int) -> Task:
        """The task of a batch, given by its number in the stream."""
        return self.stream[min(bisect.bisect_right(self.ends, batch), len(self.stream) - 1)]

    def train_dataloader(self) -> ResumableLoader:
        """All training batches of the stream."""
        progress = self._progress()
        self._ends = None
        parts = [self._train_loader(task.index, epoch=task.index) for task in self.stream]
        return OnePassLoader(parts, progress)
