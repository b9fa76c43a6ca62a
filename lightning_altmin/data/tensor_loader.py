"""Whole batches by indexing tensors held in memory."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lightning_altmin.data.indexed_loader import IndexedLoader
from lightning_altmin.data.resumable_loader import Batch, BatchPreparation, BatchTransform
from lightning_altmin.trainer.progress import TrainingProgress


class TensorLoader(IndexedLoader):
    """Iterable of batches ``(x[i], y[i])``, resumable at any batch.

    A batch costs two index operations, not one call per sample and a collation. The tensors may be on any device.
    The shuffled order comes from one draw of torch's global generator at the start of each epoch, so
    ``seed_everything`` governs it.

    Args:
        x: inputs, shape (n, ...).
        y: targets, shape (n, ...).
        batch_size: samples per batch.
        shuffle: whether every epoch has a new random order.
        drop_last: whether a last batch that is not full is left out.
        transform: random augmentation ``transform(x, generator) -> x`` of a whole batch. The generator is seeded by
            the epoch's draw and the number of the batch, so a resumed run augments alike.
        prepare: deterministic last step ``prepare(x) -> x`` of a batch, such as normalisation.
        indices: numbers of the samples to use, shape (m,), integer; None uses all.
        progress: who counts the trained batches, see ``ResumableLoader``.

    Raises:
        ValueError: if ``x`` and ``y`` differ in length, ``batch_size`` is not positive, an index is out of range or
            there would be no batch.

    Example:
        >>> loader = TensorLoader(torch.arange(6.0)[:, None], torch.arange(6), batch_size=4)
        >>> [y.tolist() for x, y in loader]
        [[0, 1, 2, 3], [4, 5]]
    """

    def __init__(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        batch_size: int,
        shuffle: bool = False,
        drop_last: bool = False,
        transform: BatchTransform | None = None,
        prepare: BatchPreparation | None = None,
        indices: torch.Tensor | None = None,
        progress: TrainingProgress | None = None,
    ) -> None:
        _check_same_length(x, y)
        super().__init__(
            len(x),
            batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            indices=indices,
            transform=transform,
            prepare=prepare,
            progress=progress,
        )
        self._x = x
        self._y = y

    def fetch(self, order: torch.Tensor | None, start: int, seed: int | None) -> Iterator[Batch]:
        """Read batches by indexing; see ``IndexedLoader.fetch``."""
        if order is None:
            for batch in range(start, self.epoch_length):
                low, high = self.bounds(batch)
                # copies: a training step that writes into its batch must not reach the data
                yield self._x[low:high].clone(), self._y[low:high].clone()
            return
        x_order, y_order = order.to(self._x.device), order.to(self._y.device)
        for batch in range(start, self.epoch_length):
            low, high = self.bounds(batch)
            yield self._x.index_select(0, x_order[low:high]), self._y.index_select(0, y_order[low:high])


@dataclass(frozen=True)
class TensorSource:
    """A data set held in memory.

    Attributes:
        x: inputs, shape (n, ...).
        y: targets, shape (n, ...).
    """

    x: torch.Tensor
    y: torch.Tensor

    def __post_init__(self) -> None:
        _check_same_length(self.x, self.y)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.x)

    def loader(
        self,
        batch_size: int,
        shuffle: bool = False,
        drop_last: bool = False,
        transform: BatchTransform | None = None,
        prepare: BatchPreparation | None = None,
        indices: torch.Tensor | None = None,
        progress: TrainingProgress | None = None,
    ) -> TensorLoader:
        """Make a loader; the arguments are those of ``TensorLoader``."""
        return TensorLoader(
            self.x,
            self.y,
            batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            transform=transform,
            prepare=prepare,
            indices=indices,
            progress=progress,
        )


def _check_same_length(x: torch.Tensor, y: torch.Tensor) -> None:
    if x.ndim == 0 or y.ndim == 0 or len(x) != len(y):
        raise ValueError(f"x and y must have one entry per sample, got shapes {tuple(x.shape)} and {tuple(y.shape)}")
