"""Replay: stored samples of the past in every training batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_altmin.arguments import check_count
from lightning_altmin.continual.buffers import SampleBuffer
from lightning_altmin.data.resumable_loader import Batch
from lightning_altmin.data.seeding import derived_generator
from lightning_altmin.trainer.progress import TrainingProgress

_DRAW_SEED = 1  # added to the buffer's seed, so that what is replayed does not depend on what is kept


class Replay:
    """Adds ``samples`` stored samples to every batch, and offers every new sample to a buffer (experience replay).

    Give it to a data module (``replay=``), which also keeps its state. A batch is then the new samples, followed by the
    replayed ones. A new sample is offered once, in the first epoch of its task, after its batch was trained: a batch
    whose training failed is not remembered. Samples are kept as they are before the stream's ``prepare``.

    With several processes, each has its share of the buffer's size and feeds it from its own share of the data, so
    that every sample has the same chance.

    Args:
        buffer: What is kept.
        samples: Samples added to a batch, >= 1; fewer while the buffer has fewer.

    Raises:
        TypeError: If ``buffer`` is no sample buffer.
        ValueError: If ``samples`` is not a positive integer.
    """

    def __init__(self, buffer: SampleBuffer, samples: int = 32) -> None:
        if not isinstance(buffer, SampleBuffer):
            raise TypeError(f"buffer must be a sample buffer, such as ReservoirBuffer(size=1000), got {buffer!r}")
        check_count("samples", samples)
        self.buffer = buffer
        self.samples = samples
        self._whole = (buffer.size, buffer.seed)
        self._pending: tuple[Tensor, Tensor, int] | None = None
        self._progress: TrainingProgress | None = None
        self._drawn = 0
        self.new_samples = 0
        """How many of the newest batch's samples are new; the replayed ones follow them."""

    def begin(self, rank: int = 0, world: int = 1) -> None:
        """Start a run: an empty buffer, with the share of this process.

        Raises:
            ValueError: If the buffer is smaller than the number of processes.
        """
        size, seed = self._whole
        if size < world:
            raise ValueError(f"the replay buffer's size={size} is smaller than the number of processes, {world}")
        self.buffer.size = size // world + (1 if rank < size % world else 0)
        self.buffer.seed = seed + 1000 * rank
        self.buffer.clear()
        self._pending, self._drawn = None, 0

    def mix(self, x: Tensor, y: Tensor, observes: bool, progress: TrainingProgress | None) -> Batch:
        """The batch with stored samples behind it.

        Args:
            x: Inputs of the new samples, shape ``(n, ...)``.
            y: Their labels, shape ``(n,)``.
            observes: Whether they are to be offered to the buffer.
            progress: Who knows whether the batch handed out before was trained; ``None`` takes it for trained.
        """
        self._progress = progress
        self.new_samples = len(y)
        self._settle()
        trained = self._trained()
        self._pending = (x, y, trained) if observes else None
        if len(self.buffer) == 0:
            return x, y
        generator = derived_generator(self.buffer.seed + _DRAW_SEED, trained)
        old_x, old_y = self.buffer.sample(self.samples, generator)
        return torch.cat([x, old_x.to(x.device)]), torch.cat([y, old_y.to(y.device)])

    def state_dict(self) -> dict[str, Any]:
        """The buffer as it is after the last trained batch."""
        self._settle(keep=True)
        return {"buffer": self.buffer.state_dict(), "drawn": self._drawn}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.buffer.load_state_dict(state_dict["buffer"])
        self._drawn, self._pending = state_dict["drawn"], None

    def finish(self) -> None:
        """Take in the last batch of a run."""
        self._settle()

    def _settle(self, keep: bool = False) -> None:
        """Offer the batch handed out last to the buffer, if it was trained; else drop it, or keep it waiting."""
        if self._pending is None:
            return
        x, y, before = self._pending
        if self._progress is None or self._progress.trained_batches() > before:
            self.buffer.add(x, y)
            self._pending = None
        elif not keep:
            self._pending = None

    def _trained(self) -> int:
        if self._progress is not None:
            return self._progress.trained_batches()
        self._drawn += 1
        return self._drawn
