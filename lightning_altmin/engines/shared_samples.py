"""A batch whose other samples are with other processes: what BatchNorms ask of all of them together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor


class SharedSamples(ABC):
    """Moments and means per channel over the samples of all processes, each sample weighing the same.

    Every call waits for all processes: they must ask for the same things in the same order. What comes back is the same
    on all of them, to the last bit.
    """

    @abstractmethod
    def total(self, vector: Tensor) -> Tensor:
        """The sum over processes, which may be written into ``vector``."""

    @abstractmethod
    def rows(self, vector: Tensor) -> Tensor:
        """Every process's vector, shape ``(processes, len(vector))``."""

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and biased variance per channel, and the number of values behind each, a scalar.

        In one exchange, of each process's own moments: sums of squares would lose the digits of a variance that is
        small beside the mean.

        Args:
            x: This process's part, shape ``(batch, channels, *positions)``.
        """
        variance, mean = torch.var_mean(_at_least_single(x), dim=others(x), correction=0)
        own = torch.cat([mean, variance, mean.new_full((1,), x.numel() / x.shape[1])])
        means, variances, counts = torch.split(self.rows(own), [len(mean), len(mean), 1], 1)
        count = counts.sum()
        shares = counts / count
        mean = (means * shares).sum(0)
        return mean, ((variances + (means - mean).square()) * shares).sum(0), count

    def means(self, *values: Tensor) -> list[Tensor]:
        """Mean per channel of each of these, all of one shape ``(batch, channels, *positions)``, in one exchange."""
        first = values[0]
        sums = [_at_least_single(v).sum(others(v)) for v in values]
        total = self.total(torch.cat([*sums, sums[0].new_full((1,), first.numel() / first.shape[1])]))
        return list(torch.split(total[:-1] / total[-1], first.shape[1]))

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedSamples:
        return self  # a copied network has the same processes around it


def others(x: Tensor) -> list[int]:
    """All dimensions but the channels'."""
    return [dim for dim in range(x.dim()) if dim != 1]


def _at_least_single(x: Tensor) -> Tensor:
    """In a precision in which counts are exact and sums over a batch keep their digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
