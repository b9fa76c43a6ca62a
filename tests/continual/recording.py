"""A run of a stream with everything it was trained on, its hooks, and its state at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from lightning_altmin.continual import Task


class Record(Callback):
    """Every batch's samples (their first feature) and labels, and every task hook."""

    only_observes = True

    def __init__(self) -> None:
        self.batches: list[tuple[list[float], list[int]]] = []
        self.events: list[tuple[str, int, int]] = []  # hook, task, batches trained before it

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.batches.append((batch[0].flatten(1)[:, 0].tolist(), batch[1].tolist()))

    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self.events.append(("start", task.index, trained(trainer)))

    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self.events.append(("end", task.index, trained(trainer)))


def trained(trainer: Trainer) -> int:
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.processed)


class SaveAt(Checkpoint):
    """Saves one checkpoint, in the ``call``-th call of a hook."""

    def __init__(self, hook: str, call: int, path: Path) -> None:
        self.trained = -1
        calls = 0

        def save(trainer: Trainer, *rest: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == call:
                trainer.save_checkpoint(path)
                self.trained = trained(trainer)

        setattr(self, hook, save)


def state_of(trainer: Trainer) -> dict[str, Any]:
    """Parameters, optimizer, data module and callbacks, as a checkpoint would have them."""
    module = trainer.lightning_module
    return {
        "weights": {name: value.clone() for name, value in module.state_dict().items()},
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "data": trainer.datamodule.state_dict(),  # type: ignore[attr-defined]
        "callbacks": {c.state_key: c.state_dict() for c in trainer.callbacks},  # type: ignore[attr-defined]
        "global_step": trainer.global_step,
        "torch": torch.get_rng_state(),
    }
