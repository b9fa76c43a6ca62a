"""AltMin in the Lightning Trainer for batches of sequences with lengths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_altmin.module import AltMinModule
from lightning_altmin.nn.elman import aligned, checked_lengths
from lightning_altmin.supervised import INPUT_KEYS, has_no_targets, named_inputs


class SequenceClassifier(AltMinModule):
    """An `AltMinModule` whose batches may hold sequences of different lengths, for an `ElmanRNN`.

    A batch is ``(x, lengths, y)`` with ``x`` padded behind, of shape ``(batch, time, features)``; a dictionary with the
    key ``lengths`` beside those of `AltMinModule`; or ``(PackedSequence, y)``. Batches without lengths are those of
    `AltMinModule`. The arguments are its, too.

    To predict, a batch may also be a ``PackedSequence``, or a dictionary with ``lengths`` and without targets. A pair
    is inputs and targets there as well: ``(x, lengths)`` would be taken for sequences of one length, so name the two.
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

    def inputs_of(self, batch: Any) -> Tensor:
        """Inputs as `unpack` aligns them, also of batches without targets."""
        if isinstance(batch, tuple | list) and len(batch) == 1:
            batch = batch[0]
        lengths = None
        if has_no_targets(batch) and self.unpacks_as(SequenceClassifier):
            batch, lengths = named_inputs(batch), batch.get("lengths")
        if isinstance(batch, PackedSequence) or lengths is not None:
            return aligned(batch, lengths)
        return super().inputs_of(batch)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Check lengths while they are on the CPU: on an accelerator a look at them would wait for it."""
        if isinstance(batch, Mapping) and "lengths" in batch:
            x, lengths = [value for key, value in batch.items() if key in INPUT_KEYS], batch["lengths"]
        elif isinstance(batch, tuple | list) and len(batch) == 3:
            x, lengths = [batch[0]], batch[1]
        else:
            return batch
        if len(x) == 1 and isinstance(x[0], Tensor) and x[0].dim() == 3:  # else `unpack` says what is wrong
            checked_lengths(lengths, x[0])
        return batch
