"""Batches of a map-style data set that is read sample by sample, for data that does not fit in memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from lightning_altmin.arguments import check_count
from lightning_altmin.data.indexed_loader import IndexedLoader
from lightning_altmin.data.resumable_loader import Batch, BatchPreparation, BatchTransform
from lightning_altmin.data.seeding import derived_generator
from lightning_altmin.trainer.progress import TrainingProgress

_WORKER_STREAM = -2  # number of the derived generator that seeds the workers


class DatasetLoader(IndexedLoader):
    """Iterable of batches read by a ``torch.utils.data.DataLoader``, resumable at any batch.

    Trained batches are skipped before they are read. Augmentation runs on whole batches in the main process, so it
    is the same for any number of workers.

    Args:
        dataset: map-style data set; its items are pairs of an input tensor and an integer or tensor target.
        batch_size: samples per batch.
        num_workers: processes that read samples; 0 reads in the main process.
        shuffle: whether every epoch has a new random order.
        drop_last: whether a last batch that is not full is left out.
        transform: random augmentation ``transform(x, generator) -> x`` of a whole batch.
        prepare: deterministic last step ``prepare(x) -> x`` of a batch, such as normalisation.
        indices: numbers of the samples to use, shape (m,), integer; None uses all.
        progress: who counts the trained batches, see ``ResumableLoader``.

    Raises:
        ValueError: if ``batch_size`` is not positive, ``num_workers`` is negative, an index is out of range or there
            would be no batch.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        num_workers: int = 0,
        shuffle: bool = False,
        drop_last: bool = False,
        transform: BatchTransform | None = None,
        prepare: BatchPreparation | None = None,
        indices: torch.Tensor | None = None,
        progress: TrainingProgress | None = None,
    ) -> None:
        samples = len(dataset)  # type: ignore[arg-type]
        super().__init__(
            samples,
            batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            indices=indices,
            transform=transform,
            prepare=prepare,
            progress=progress,
        )
        check_count("num_workers", num_workers, 0)
        self._dataset = dataset
        self._num_workers = num_workers
        self._all_samples = samples

    def fetch(self, order: torch.Tensor | None, start: int, seed: int | None) -> Iterator[Batch]:
        """Read batches with a ``DataLoader``; see ``IndexedLoader.fetch``."""
        numbers: list[int] = list(range(self._all_samples)) if order is None else order.tolist()
        slices = [slice(*self.bounds(batch)) for batch in range(start, self.epoch_length)]
        reader: DataLoader[Any] = DataLoader(
            self._dataset,
            batch_sampler=[numbers[part] for part in slices],
            num_workers=self._num_workers,
            # without a generator of its own the DataLoader would draw the workers' seed from the global one
            generator=derived_generator(0 if seed is None else seed, _WORKER_STREAM),
        )
        for batch in reader:
            yield batch[0], batch[1]


@dataclass(frozen=True)
class DatasetSource:
    """A map-style data set together with the number of processes that read it.

    Attributes:
        dataset: its items are pairs of an input tensor and an integer or tensor target.
        num_workers: processes that read samples; 0 reads in the main process.
    """

    dataset: Dataset[Any]
    num_workers: int = 0

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.dataset)  # type: ignore[arg-type]

    def loader(
        self,
        batch_size: int,
        shuffle: bool = False,
        drop_last: bool = False,
        transform: BatchTransform | None = None,
        prepare: BatchPreparation | None = None,
        indices: torch.Tensor | None = None,
        progress: TrainingProgress | None = None,
    ) -> DatasetLoader:
        """Make a loader; the arguments are those of ``DatasetLoader``."""
        return DatasetLoader(
            self.dataset,
            batch_size,
            num_workers=self.num_workers,
            shuffle=shuffle,
            drop_last=drop_last,
            transform=transform,
            prepare=prepare,
            indices=indices,
            progress=progress,
        )
