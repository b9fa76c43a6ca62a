"""One quiet run under the Trainer on a CPU: how long it trains, and what held-out samples or the test set say of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def timed_fit(module: LightningModule, data: LightningDataModule, epochs: int, **flags: Any) -> float:
    """Train without validation; returns the seconds."""
    trainer = Trainer(max_epochs=epochs, limit_val_batches=0, num_sanity_val_steps=0, **QUIET, **flags)
    start = time.perf_counter()
    trainer.fit(module, datamodule=data)
    return time.perf_counter() - start


def judged(module: LightningModule, data: LightningDataModule, by: str) -> Mapping[str, float]:
    """The loss and the metrics by the ``"val"`` or the ``"test"`` part of the data, with that prefix."""
    trainer = Trainer(**QUIET)
    judge = trainer.validate if by == "val" else trainer.test
    return judge(module, datamodule=data, verbose=False)[0]
