"""Going on after an interruption exactly as without it: the random state of a run, saved and put back."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_altmin.random_state import random_state, set_random_state
from lightning_altmin.trainer.progress import TrainerProgress

_RANDOM_STATE = "lightning_altmin_random_state"


class ExactResume(LightningModule):
    """Keeps the state of all random number generators in checkpoints and puts it back when ``fit`` resumes.

    The state has to be in place where the uninterrupted run drew next: before the iterator of the next epoch is made (a
    torch ``DataLoader`` draws then), or inside an epoch, whose iterator was made long ago, before the next batch is
    asked for. Lightning makes an iterator before ``on_train_start`` in any case, and uses it or throws it away.

    Each of several processes has generators of its own, and a checkpoint holds those of all. Where it is resumed by
    another number of processes they take them in turn.

    Validation leaves the random state as it found it, so that it does not matter whether a resumed run repeats one.
    """

    def __init__(self) -> None:
        super().__init__()
        self._saved_random_state: dict[str, Any] | None = None
        self._random_state_before_validation: dict[str, Any] | None = None

    @property
    def resuming(self) -> bool:
        """Whether the ``fit`` that begins goes on from a checkpoint (loading one for a test or by hand is not that)."""
        return self.trainer.ckpt_path is not None

    def on_train_start(self) -> None:
        """Put back the random state, and make the next epoch's iterator from it if Lightning already has."""
        saved, self._saved_random_state = self._saved_random_state, None
        if not self.resuming or saved is None:
            return
        loop: Any = self.trainer.fit_loop
        _report_skipped_validation(loop.epoch_loop.val_loop)
        generators = saved["generators"]
        set_random_state(generators[self.trainer.global_rank % len(generators)])
        if not loop.restarting or saved["epoch"] == "closing":
            iter(loop._data_fetcher)  # the next batch is the first of an epoch, and comes from the iterator made so far
        elif saved["epoch"] == "ended":
            _exhaust(loop._data_fetcher)

    def on_validation_model_zero_grad(self) -> None:
        """Called just before a validation inside ``fit``."""
        self.hold_random_state()
        super().on_validation_model_zero_grad()

    def hold_random_state(self) -> None:
        """Remember the random state until the validation that begins is over."""
        self._random_state_before_validation = random_state()

    def on_validation_epoch_end(self) -> None:
        """Put back the random state before anyone writes a checkpoint (in ``on_validation_end`` at the earliest)."""
        before, self._random_state_before_validation = self._random_state_before_validation, None
        if before is not None:
            set_random_state(before)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the random state of every process, and where in its epoch the run is; called on all processes."""
        own = self._random_state_before_validation or random_state()
        checkpoint[_RANDOM_STATE] = {
            "generators": of_all_processes(self.trainer, own),
            "epoch": TrainerProgress(self.trainer).stage(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the random state until the run begins."""
        self._saved_random_state = checkpoint.get(_RANDOM_STATE)


def of_all_processes(trainer: Trainer, own: dict[str, Any]) -> list[dict[str, Any]]:
    """What each process has, by rank; once if it is the same for all, and this one's where none can be waited for.

    They may be gone after an exception, or be elsewhere when a signal makes Lightning save in the middle of a batch.
    """
    alone = trainer.state.status == TrainerStatus.INTERRUPTED or TrainerProgress(trainer).in_batch()
    if trainer.world_size == 1 or alone:
        return [own]
    states = [own] * trainer.world_size
    dist.all_gather_object(states, own)
    return states[:1] if all(_equal(state, own) for state in states) else states


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _exhaust(fetcher: Any) -> None:
    """Let the loader's first iterator, made for an epoch that is over, yield nothing.

    Under ``max_steps`` Lightning goes on with that epoch unless its last batch was followed by a validation.
    """
    fetcher.reset()  # drops what was fetched ahead
    fetcher.done = True


def _report_skipped_validation(loop: Any) -> None:
    """Say so if Lightning counts a validation as done without running it, and keep that off the random state.

    It does so if a validation was due directly after the batch in whose ``on_train_batch_end`` the checkpoint was
    written; on the way it makes an iterator of the validation loader, and a ``DataLoader`` draws then.
    """
    count = loop.increment_progress_to_evaluation_end

    def report() -> None:
        loop.increment_progress_to_evaluation_end = count
        with isolate_rng():
            count()
        rank_zero_warn(
            "the checkpoint was written between a batch and the validation due after it, and Lightning does not make "
            "up for that validation. Training itself goes on exactly, but whatever watches validation (a plateau "
            "schedule, early stopping, ModelCheckpoint(monitor=...)) misses its values once"
        )

    loop.increment_progress_to_evaluation_end = report
