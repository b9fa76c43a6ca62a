"""Early stopping of a task: the stream goes on with the next one."""

from __future__ import annotations

import math
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_altmin.arguments import check_count, check_number
from lightning_altmin.continual.callbacks.stream_access import task_stream_data
from lightning_altmin.continual.task import Task


class TaskEarlyStopping(Callback):
    """Ends a task, instead of the run, when a value stops improving over epochs.

    The rest of ``epochs_per_task`` is skipped; after the last task the run ends, before ``max_epochs`` if need be.

    Args:
        monitor: A logged value, such as ``"val_loss"`` of the current task's validation data.
        mode: Whether smaller (``"min"``) or larger (``"max"``) is better.
        patience: Epochs without improvement that end a task, >= 1.
        min_delta: What counts as an improvement, >= 0.

    Attributes:
        stopped: For each task that was ended early, the epoch in the task after which it was, from 0.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        mode: Literal["min", "max"] = "min",
        patience: int = 3,
        min_delta: float = 0.0,
    ) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max', got {mode!r}")
        check_count("patience", patience)
        check_number("min_delta", min_delta, least=0)
        self.monitor = monitor
        self.mode = mode
        self.patience = patience
        self.min_delta = min_delta
        self.stopped: dict[int, int] = {}
        self._best = math.inf
        self._waited = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there are tasks with epochs."""
        if stage == "fit":
            task_stream_data(trainer, self)
            self.stopped, self._best, self._waited = {}, math.inf, 0

    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        """Forget the task before."""
        self._best, self._waited = math.inf, 0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the epoch's value."""
        data = task_stream_data(trainer, self)
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            raise MisconfigurationException(
                f"TaskEarlyStopping(monitor={self.monitor!r}): no such value was logged in the epoch; there are "
                f"{sorted(trainer.callback_metrics)}. Validation needs a stream made with val_split"
            )
        signed = float(value) if self.mode == "min" else -float(value)
        if signed < self._best - self.min_delta:
            self._best, self._waited = signed, 0
        else:
            self._waited += 1
        # Processes that saw other values must not part ways.
        if trainer.strategy.reduce_boolean_decision(self._waited >= self.patience, all=False):
            self.stopped[data.task.index] = data.epoch_in_task - 1  # the epoch already counts as trained
            data.end_task()

    def state_dict(self) -> dict[str, Any]:
        """The best value and the epochs waited."""
        return {"best": self._best, "waited": self._waited, "stopped": dict(self.stopped)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on waiting."""
        self._best, self._waited = state_dict["best"], state_dict["waited"]
        self.stopped = dict(state_dict["stopped"])
