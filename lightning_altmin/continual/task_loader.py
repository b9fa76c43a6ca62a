"""Loaders of tasks: one task's batches in an order of their own seed, and a whole stream's in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_altmin.arguments import check_count
from lightning_altmin.continual.replay import Replay
from lightning_altmin.continual.samples import Samples
from lightning_altmin.data.resumable_loader import Batch, BatchPreparation, ResumableLoader
from lightning_altmin.data.seeding import derived_generator
from lightning_altmin.trainer.progress import TrainingProgress

_ORDER = -1  # number of the derived generator that shuffles


class Share(NamedTuple):
    """Which part of every batch this process trains on."""

    rank: int = 0
    world: int = 1


_WHOLE = Share()


class TaskLoader(ResumableLoader):
    """Batches of a task's samples, resumable at any batch.

    With several processes each reads its share of common batches of ``batch_size * world`` samples, so that every
    sample is read once, all processes make as many steps, and shares differ by one sample at most. (A last batch with
    fewer samples than processes is joined to the one before.)

    Args:
        samples: What to read.
        batch_size: Samples per batch and process.
        seed: Of the order; ``None`` reads in stored order. Torch's global generator is not used.
        prepare: Deterministic last step of a batch's inputs.
        replay: Adds stored samples to every batch, before ``prepare``.
        observes: Whether the replay buffer is to learn the samples of this loader.
        share: The part of this process.
        progress: Who counts the trained batches, see ``ResumableLoader``.

    Raises:
        ValueError: If ``batch_size`` is not positive, or there are fewer samples than processes.
    """

    def __init__(
        self,
        samples: Samples,
        batch_size: int,
        seed: int | None = None,
        prepare: BatchPreparation | None = None,
        replay: Replay | None = None,
        observes: bool = True,
        share: Share = _WHOLE,
        progress: TrainingProgress | None = None,
    ) -> None:
        super().__init__(progress)
        check_count("batch_size", batch_size)
        if len(samples) < share.world:
            raise ValueError(f"{len(samples)} samples are too few for {share.world} processes")
        self.batch_size = batch_size
        self._samples = samples
        self._seed = seed
        self._prepare = prepare
        self._replay = replay
        self._observes = observes
        self._share = share
        self._bounds = _bounds(len(samples), batch_size * share.world, share.world)

    @property
    def is_random(self) -> bool:
        """No: the order comes from ``seed``."""
        return False

    @property
    def epoch_length(self) -> int:
        """Number of batches."""
        return len(self._bounds)

    def layout(self) -> dict[str, int | bool]:
        """The settings that say which samples a batch number stands for."""
        return {
            "samples": len(self._samples),
            "batch_size": self.batch_size,
            "seed": -1 if self._seed is None else self._seed,
            "processes": self._share.world,
        }

    def batches_from(self, seed: int | None, start: int) -> Iterator[Batch]:
        """Build the batches from number ``start`` on."""
        order = torch.arange(len(self._samples))
        if self._seed is not None:
            order = torch.randperm(len(order), generator=derived_generator(self._seed, _ORDER))
        rows = [self._own(order[low:high]) for low, high in self._bounds[start:]]
        for x, y in self._samples.batches(rows):
            if self._replay is not None:
                x, y = self._replay.mix(x, y, self._observes, self._progress)
            yield (x if self._prepare is None else self._prepare(x)), y

    def _own(self, rows: Tensor) -> Tensor:
        return rows[self._share.rank :: self._share.world]


class OnePassLoader(ResumableLoader):
    """Several loaders one after the other, as one epoch without visible boundaries.

    Args:
        loaders: The loaders.
        progress: Who counts the trained batches.
    """

    def __init__(self, loaders: Sequence[TaskLoader], progress: TrainingProgress | None = None) -> None:
        super().__init__(progress)
        self._loaders = list(loaders)

    @property
    def is_random(self) -> bool:
        """No: every part has a seed of its own."""
        return False

    @property
    def epoch_length(self) -> int:
        """Number of batches of all parts."""
        return sum(loader.epoch_length for loader in self._loaders)

    def layout(self) -> dict[str, int | bool]:
        """The layouts of all parts."""
        return {f"{index}.{k}": v for index, part in enumerate(self._loaders) for k, v in part.layout().items()}

    def batches_from(self, seed: int | None, start: int) -> Iterator[Batch]:
        """Build the batches from number ``start`` on."""
        for loader in self._loaders:
            if start < loader.epoch_length:
                yield from loader.batches_from(None, start)
            start = max(0, start - loader.epoch_length)


def _bounds(samples: int, size: int, least: int) -> list[tuple[int, int]]:
    """First and one after the last place of every batch of ``size``, the last of which has at least ``least``."""
    full, rest = divmod(samples, size)
    count = full + (1 if rest >= least or full == 0 else 0)
    return [(batch * size, (batch + 1) * size if batch < count - 1 else samples) for batch in range(count)]
