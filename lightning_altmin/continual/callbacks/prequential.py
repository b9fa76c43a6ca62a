"""Accuracy on samples that are about to be learnt: test, then train."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_altmin.arguments import check_count
from lightning_altmin.continual.accuracy_matrix import count_correct
from lightning_altmin.continual.callbacks.stream_access import (
    evaluating,
    inputs_and_labels,
    stream_data,
    trained_batches,
)


class PrequentialAccuracy(Callback):
    """Predicts every batch's new samples before they are trained on; the running share of right ones.

    Prequential (interleaved test-then-train) evaluation of data streams, Gama et al. 2013: it needs neither test data
    nor boundaries. Replayed samples do not count. Costs one more forward pass per batch.

    Args:
        log_every_n_batches: Batches from one log entry ``continual/prequential_accuracy`` to the next, >= 1.

    Raises:
        ValueError: If ``log_every_n_batches`` is not an integer >= 1.
    """

    only_observes = True

    def __init__(self, log_every_n_batches: int = 50) -> None:
        check_count("log_every_n_batches", log_every_n_batches)
        self.log_every_n_batches = log_every_n_batches
        self._counts: Tensor = torch.zeros(2, dtype=torch.int64)  # correct, all
        self._trainer: Trainer | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin to count."""
        if stage == "fit":
            stream_data(trainer, self)
            self._trainer = trainer
            self._counts = torch.zeros(2, dtype=torch.int64)

    @torch.no_grad()
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Test."""
        x, y = inputs_and_labels(pl_module, batch)
        replay = stream_data(trainer, self).replay
        new = len(y) if replay is None else replay.new_samples
        with evaluating(pl_module), isolate_rng(), trainer.precision_plugin.forward_context():
            correct = count_correct(pl_module(x[:new]), y[:new])
        self._counts = self._counts.to(correct.device) + torch.stack([correct, correct.new_tensor(new)])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log."""
        if trained_batches(trainer) % self.log_every_n_batches == 0:
            value = float(self.compute())
            for logger in trainer.loggers:
                step = trainer.fit_loop.epoch_loop._batches_that_stepped
                logger.log_metrics({"continual/prequential_accuracy": value}, step=step)

    def compute(self) -> Tensor:
        """The share of right predictions so far, over all processes, which must all call it; NaN before the first."""
        correct, total = self._total().double()
        return correct / total

    def state_dict(self) -> dict[str, Any]:
        """The counts of all processes."""
        return {"counts": self._total().cpu()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting; the first process takes over what all had counted."""
        first = self._trainer is None or self._trainer.global_rank == 0
        self._counts = state_dict["counts"].clone() if first else torch.zeros(2, dtype=torch.int64)

    def _total(self) -> Tensor:
        if self._trainer is None or self._trainer.world_size == 1:
            return self._counts
        own = self._counts.to(self._trainer.strategy.root_device).clone()  # reduced in place
        summed = self._trainer.strategy.reduce(own, reduce_op="sum")
        assert isinstance(summed, Tensor)
        return summed
