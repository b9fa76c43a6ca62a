"""A loss in the two forms the algorithm needs, as the user gave it and summed over samples; and one at an output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_ROWS = 2**16  # outputs evaluated at once

Loss = Callable[[Tensor, Any], Tensor]
"""``loss(output, target) -> scalar``, a mean over the batch as in PyTorch."""


class LocalLoss(ABC):
    """A loss with its gradient with respect to the network's output, shape ``(batch, *output)``.

    ``mean`` is the loss as given (the output layer's weight step). ``total`` is the same loss averaged over
    non-batch dimensions and *summed* over samples (the code step), so that a sample's code does not depend on the
    batch it came in.
    """

    @abstractmethod
    def mean(self, output: Tensor, target: Any) -> Tensor:
        """The loss as the user gave it, a scalar."""

    @abstractmethod
    def mean_gradient(self, output: Tensor, target: Any) -> Tensor:
        """Gradient of ``mean`` with respect to ``output``."""

    @abstractmethod
    def total(self, output: Tensor, target: Any) -> Tensor:
        """Sum over samples of each sample's loss, a scalar."""

    @abstractmethod
    def total_gradient(self, output: Tensor, target: Any) -> Tensor:
        """Gradient of ``total`` with respect to ``output``."""

    def values(self, output: Tensor, target: Any) -> Tensor:
        """Each sample's loss, shape ``(batch,)``, the terms of `total`.

        Raises:
            ValueError: If the loss is known as a mean over the batch only.
        """
        raise ValueError(f"{type(self).__name__} has no value per sample")

    def at(self, output: Tensor, target: Any) -> LossAt:
        """This loss at one output."""
        return LossAt(self, output, target)

    def weight(self, output: Tensor, target: Any) -> Tensor:
        """How much `mean` counts for in an average of several batches' means: a scalar, here the number of samples."""
        return torch.full((), float(output.shape[0]), device=output.device)

    def readable(self, output: Tensor, target: Any) -> Any:
        """The targets, or ones that a kernel can read where reading the given ones would break the device."""
        return target

    def evidence(self, output: Tensor, target: Any) -> list[Tensor]:
        """Scalars, true if `readable` had nothing to replace: what `check` does not look at, for it would sync."""
        return []

    def check(self, output: Tensor, target: Any) -> None:
        """Refuse targets this loss cannot take, before anything is changed.

        Raises:
            ValueError: If shapes or labels do not fit.
        """
        if isinstance(target, Tensor) and (target.dim() == 0 or target.shape[0] != output.shape[0]):
            raise ValueError(
                f"y has shape {tuple(target.shape)} for a batch of {output.shape[0]} samples; "
                "give one target per sample in the first dimension"
            )


class LossAt:
    """A loss at one output of the network. What the phases of a batch ask for is computed once, when first asked for.

    Attributes:
        loss: The loss.
        output: The network's output, shape ``(batch, *output)``.
        target: The batch's targets.
    """

    def __init__(self, loss: LocalLoss, output: Tensor, target: Any) -> None:
        self.loss = loss
        self.output = output
        self.target = target
        self._total_gradient: Tensor | None = None

    def elsewhere(self, output: Tensor) -> LossAt:
        """The same loss, for the same targets, at another output."""
        return self.loss.at(output, self.target)

    def mean(self) -> Tensor:
        """The loss as the user gave it, a scalar."""
        return self.loss.mean(self.output, self.target)

    def mean_gradient(self) -> Tensor:
        """Gradient of `mean` with respect to the output."""
        return self.loss.mean_gradient(self.output, self.target)

    def total(self) -> Tensor:
        """Sum over samples of each sample's loss, a scalar."""
        return self.loss.total(self.output, self.target)

    def values(self) -> Tensor:
        """Each sample's loss, shape ``(batch,)``."""
        return self.loss.values(self.output, self.target)

    def changes(self, moves: Tensor) -> Tensor:
        """How each sample's loss changes if its output moves by each row of ``moves``, one row at a time.

        Args:
            moves: Shape ``(rows, outputs)``, for outputs of shape ``(batch, outputs)``.

        Returns:
            Shape ``(batch, rows)``.
        """
        batch, here, changes = len(self.output), self.values().unsqueeze(1), []
        for rows in torch.split(moves, max(1, _ROWS // batch)):
            moved = (self.output.unsqueeze(1) + rows).flatten(0, 1)
            values = self.loss.values(moved, self.target.repeat_interleave(len(rows), 0))
            changes.append(values.view(batch, len(rows)) - here)
        return torch.cat(changes, 1)

    def total_gradient(self) -> Tensor:
        """Gradient of `total` with respect to the output; not to be changed in place."""
        if self._total_gradient is None:
            self._total_gradient = self.loss.total_gradient(self.output, self.target)
        return self._total_gradient
