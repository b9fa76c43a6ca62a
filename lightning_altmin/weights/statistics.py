"""What a memory keeps of one layer: the interface of all kinds of statistics, and how processes share them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from lightning_altmin.weights.least_squares_layer import LeastSquaresLayer


class Statistics(nn.Module, ABC):
    """Discounted sums over all that a layer has seen.

    Several processes hold *shares*: the statistics are the sum of what the processes hold. Adding and discounting are
    linear, so each process goes on by itself, and what `packed` gives, summed over processes, is the whole.

    Args:
        layer: The layer.

    Attributes:
        rows: Discounted number of rows in the sums, a scalar.
        is_share: Whether this is one process's share, a bool scalar; a buffer, so that a bad batch takes it back with
            the others.
    """

    replaces_buffers = True  # see `Buffers`: what a batch adds is undone by setting the old tensors again

    rows: Tensor
    is_share: Tensor

    def __init__(self, layer: LeastSquaresLayer, dtype: torch.dtype) -> None:
        super().__init__()
        device = layer.layer.weight.device
        self.register_buffer("rows", torch.zeros((), dtype=dtype, device=device))
        self.register_buffer("is_share", torch.tensor(False, device=device), persistent=False)
        self._layer = layer

    @abstractmethod
    def add(
        self,
        x: Tensor,
        target: Tensor | None = None,
        weights: Tensor | None = None,
        forgetting: float = 1.0,
        processes: int = 1,
    ) -> None:
        """Discount what is there and add a batch.

        Args:
            x: The layer's input, or an input of it per sample and position.
            target: What its output should be, where targets are kept.
            weights: How much each sample counts, for layers without positions; all the same if not given.
            forgetting: Discount, in (0, 1].
            processes: Number of processes that hold shares.
        """

    @abstractmethod
    def discount(self, factor: float) -> None:
        """Let all that has been seen so far count ``factor`` times as much."""

    def count(self) -> Tensor:
        """Discounted number of rows in all the sums."""
        return self.rows

    @abstractmethod
    def packed(self) -> Tensor:
        """All that is to be summed over processes, as one vector."""

    @abstractmethod
    def unpack(self, vector: Tensor) -> None:
        """Take the sums of `packed` over all processes as the whole."""

    @abstractmethod
    def energy(self) -> Tensor:
        """A scalar that is finite if the statistics are."""

    @property
    @abstractmethod
    def shape(self) -> str:
        """What is kept, for a table."""

    @property
    @abstractmethod
    def products(self) -> tuple[int, int]:
        """Multiply-adds per row measured, and per renewal."""

    def _decay(self, forgetting: float, processes: int) -> float | Tensor:
        """What the sums are multiplied by before a batch is added; a whole becomes equal shares."""
        if processes == 1:
            return forgetting
        # On the device: whether this is a share goes back with a bad batch, and to look would stall it in every layer.
        decay = torch.where(self.is_share, self.rows.new_full((), forgetting), forgetting / processes)
        self.is_share = torch.ones_like(self.is_share)
        return decay

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        super()._load_from_state_dict(*arguments, **keywords)
        self.is_share = torch.zeros_like(self.is_share)  # what is saved is the whole


class Preconditioner(Statistics):
    """Statistics with a damped inverse of the mean of ``a a^T``, kept from one renewal to the next.

    Until the first renewal the inverse is zero, so that nothing moves.
    """

    @abstractmethod
    def renew(self, ridge: float) -> None:
        """Compute the damped inverse from the statistics; ``ridge`` is relative to the mean of A's diagonal."""

    @abstractmethod
    def preconditioned(self, matrix: Tensor) -> Tensor:
        """``matrix @ (A + ridge)^-1``, shape ``(any, inputs)``."""
