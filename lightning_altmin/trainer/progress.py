"""What a Lightning Trainer says about the batches it has trained."""

from typing import Any, Literal, Protocol

from lightning.pytorch import Trainer

EpochStage = Literal["running", "closing", "ended"]


class TrainingProgress(Protocol):
    """Source of the number of trained batches, as opposed to fetched ones."""

    def trained_batches(self) -> int:
        """Number of batches trained so far, over all epochs; it never falls."""
        ...

    def stage(self) -> EpochStage:
        """Where the current epoch stands.

        Returns:
            ``"running"`` while batches of the epoch remain to be trained; ``"closing"`` when the last one is trained
            but its ``on_train_batch_end`` has not finished; ``"ended"`` after that.
        """
        ...


class TrainerProgress:
    """Progress of a ``lightning.pytorch.Trainer``.

    Lightning counts a batch as processed directly after ``training_step`` and before ``on_train_batch_end``, so at
    every place where a checkpoint is saved the count is that of the batches whose update the saved weights contain.
    A loader cannot know this by itself: the Trainer fetches one batch ahead from loaders without a length.

    Args:
        trainer: the trainer whose ``fit`` uses the loader.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def trained_batches(self) -> int:
        """Number of batches trained by all ``fit`` calls of the trainer and of the run it was resumed from."""
        # `total`, not `current`: the latter is set back at points that differ between ways of resuming
        return int(self._batch_progress.total.processed)

    def stage(self) -> EpochStage:
        """Where the current epoch stands.

        "closing" and "ended" differ because Lightning resumes from them differently: after a checkpoint written in the
        last ``on_train_batch_end`` of an epoch it takes the first iterator of the loader for the next epoch, after
        one written later (end of validation, end of epoch) it takes it for the finished epoch.
        """
        progress = self._batch_progress
        ready, completed = progress.current.ready, progress.current.completed
        processed = progress.current.processed
        # Lightning marks the batch as the last one when it is fetched, before it is trained
        if not progress.is_last_batch or processed != ready:
            return "running"
        return "ended" if completed == processed else "closing"

    def in_batch(self) -> bool:
        """Whether a batch is being trained at this moment: no place to save, but a signal may ask for it."""
        current = self._batch_progress.current
        return bool(current.ready != current.processed)

    @property
    def _batch_progress(self) -> Any:
        # Any: Lightning annotates the trackers with a base class that lacks `processed`
        return self._trainer.fit_loop.epoch_loop.batch_progress


def training_progress(trainer: Trainer | None) -> TrainerProgress | None:
    """Progress of the trainer that asks for a train loader.

    Args:
        trainer: the trainer of the data module, None when the loader is used by hand.
    """
    if trainer is None:
        return None
    return TrainerProgress(trainer)
