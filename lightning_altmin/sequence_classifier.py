"""AltMin in the Lightning Trainer for batches of sequences with lengths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_altmin.module import AltMinModule
from lightning_altmin.nn.elman import aligned


class SequenceClassifier(AltMinModule):
    """An `AltMinModule` whose batches may hold sequences of different lengths, for an `ElmanRNN`.

    A batch is ``(x, lengths, y)`` with ``x`` padded behind, of shape ``(batch, time, features)``; a dictionary with the
    key ``lengths`` beside those of `AltMinModule`; or ``(PackedSequence, y)``. Batches without lengths are those of
    `AltMinModule`. The arguments are its, too.
    """

    def unpack(self, batch: Any) -> tuple[Tensor, Any]:
        """Inputs, aligned at their ends where lengths are given, and targets."""
        if isinstance(batch, Mapping) and "lengths" in batch:
            x, y = super().unpack({key: value for key, value in batch.items() if key != "lengths"})
            return aligned(x, batch["lengths"]), y
        if isinstance(batch, tuple | list) and len(batch) == 3:
            x, lengths, y = batch
            return aligned(x, lengths), y
        x, y = super().unpack(batch)
        return (aligned(x) if isinstance(x, PackedSequence) else x), y
