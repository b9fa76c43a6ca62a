"""Loaders of data sets that can be asked for any sample by its number."""

from abc import abstractmethod
from collections.abc import Iterator

import torch

from lightning_altmin.arguments import check_count
from lightning_altmin.data.resumable_loader import Batch, BatchPreparation, BatchTransform, ResumableLoader
from lightning_altmin.data.seeding import derived_generator
from lightning_altmin.trainer.progress import TrainingProgress

_ORDER_STREAM = -1  # number of the derived generator that shuffles; a batch's own one has the batch's number


class IndexedLoader(ResumableLoader):
    """Cuts the samples, in their order or shuffled, into batches.

    Args:
        samples: number of samples of the data set.
        batch_size: samples per batch.
        shuffle: whether every epoch has a new random order.
        drop_last: whether a last batch that is not full is left out.
        indices: numbers of the samples to use, shape (n,), integer; None uses all.
        transform: random augmentation ``transform(x, generator)`` of a batch; ``generator`` depends on the epoch's
            draw and the batch's number only.
        prepare: deterministic last step ``prepare(x)`` of a batch, such as normalisation.
        progress: who counts the trained batches, see ``ResumableLoader``.

    Raises:
        ValueError: if ``batch_size`` is not positive, an index is out of range or there would be no batch at all.
    """

    def __init__(
        self,
        samples: int,
        batch_size: int,
        shuffle: bool = False,
        drop_last: bool = False,
        indices: torch.Tensor | None = None,
        transform: BatchTransform | None = None,
        prepare: BatchPreparation | None = None,
        progress: TrainingProgress | None = None,
    ) -> None:
        super().__init__(progress)
        check_count("batch_size", batch_size)
        if indices is not None:
            _check_indices(indices, samples)
        count = samples if indices is None else len(indices)
        if count == 0:
            raise ValueError("the loader would be empty: there are no samples")
        if drop_last and count < batch_size:
            raise ValueError(
                f"the loader would be empty: drop_last=True drops the only batch, which has {count} samples where "
                f"batch_size={batch_size}; use a smaller batch_size or drop_last=False"
            )
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self._samples = count
        self._indices = indices
        self._transform = transform
        self._prepare = prepare

    def share(self, rank: int, world: int) -> None:
        """Hand out this process's part of every batch of ``world * batch_size`` samples; nothing is padded or repeated.

        A last batch that is not full is dealt out as evenly as possible.

        Args:
            rank: number of this process.
            world: number of processes.

        Raises:
            ValueError: if a process would get nothing of the last batch.
        """
        check_shares(self._samples, self.batch_size, world, self.drop_last)
        self._rank, self._world = rank, world

    @abstractmethod
    def fetch(self, order: torch.Tensor | None, start: int, seed: int | None) -> Iterator[Batch]:
        """Read batches.

        Args:
            order: numbers of all the samples of the epoch in their order, shape (n,); None for 0, 1, 2, ...
            start: number of the first batch to read.
            seed: the draw of the epoch; None for an epoch without one.

        Yields:
            The batches from number ``start`` on, neither transformed nor prepared.
        """

    @property
    def is_random(self) -> bool:
        """Whether an epoch needs a draw of the global generator."""
        return self.shuffle or self._transform is not None

    @property
    def epoch_length(self) -> int:
        """Number of batches of an epoch."""
        full, rest = divmod(self._samples, self._world * self.batch_size)
        return full + (1 if rest and not self.drop_last else 0)

    def layout(self) -> dict[str, int | bool]:
        """The settings that say which samples a batch number stands for."""
        return {
            "samples": self._samples,
            "batch_size": self._world * self.batch_size,  # so another number of processes may go on with the epoch
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
        }

    def batches_from(self, seed: int | None, start: int) -> Iterator[Batch]:
        """Build the batches of one epoch from number ``start`` on."""
        for index, (x, y) in enumerate(self.fetch(self._order(seed), start, seed), start):
            if self._transform is not None and seed is not None:
                x = self._transform(x, derived_generator(seed, index * self._world + self._rank))
            yield (x if self._prepare is None else self._prepare(x)), y

    def bounds(self, batch: int) -> tuple[int, int]:
        """First and one after the last place, in the order of the epoch, of the samples of a batch."""
        size = self._world * self.batch_size
        low = batch * size
        part = self.own_part(min(low + size, self._samples) - low)
        return low + part.start, low + part.stop

    def _order(self, seed: int | None) -> torch.Tensor | None:
        if not self.shuffle or seed is None:
            return self._indices
        order = torch.randperm(self._samples, generator=derived_generator(seed, _ORDER_STREAM))
        return order if self._indices is None else self._indices[order]


def check_shares(samples: int, batch_size: int, world: int, drop_last: bool) -> None:
    """Check that every one of several processes gets a part of every batch of ``world * batch_size`` samples.

    Raises:
        ValueError: If one would get nothing of the last batch, or there is no batch.
    """
    rest = samples % (world * batch_size)
    if rest < world and (rest > 0 or samples == 0) and not drop_last:
        raise ValueError(
            f"the last batch would have {rest} samples for {world} processes, and each needs at least one "
            f"({samples} samples, batch_size={batch_size} per process): use another batch_size (eval_batch_size for "
            "validation and test data), or drop_last=True for training data"
        )
    if drop_last and samples < world * batch_size:
        raise ValueError(
            f"the loader would be empty: drop_last=True drops the only batch, which has {samples} samples where "
            f"{world} processes with batch_size={batch_size} need {world * batch_size}"
        )


def _check_indices(indices: torch.Tensor, samples: int) -> None:
    if indices.ndim != 1 or indices.is_floating_point() or indices.dtype == torch.bool:
        raise ValueError(
            f"indices must be a 1-d integer tensor, got shape {tuple(indices.shape)} and type {indices.dtype}"
        )
    if len(indices) and not (int(indices.min()) >= 0 and int(indices.max()) < samples):
        raise ValueError(
            f"indices must lie between 0 and {samples - 1}, got {int(indices.min())} to {int(indices.max())}"
        )
