"""Activations with finitely many values: sign, step, hard threshold, k-bit quantiser. Exact, with no gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_altmin.arguments import check_count, check_number

_MOST_BITS = 16


class Staircase(nn.Module):
    """``y = low + rise * n``, with ``n`` the number of thresholds that ``x`` has reached (``x >= threshold``).

    Thresholds and values are evenly spaced. The derivative is what it is: zero. There is no surrogate (no
    straight-through estimator), so backprop trains nothing below such an activation; `DiscreteCodes` does.

    Args:
        low: The lowest value.
        rise: Height of a step, > 0.
        first: The lowest threshold.
        gap: Distance of two thresholds, > 0; of no importance where there is only one.
        steps: Number of thresholds, >= 1; there is one value more.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(self, low: float, rise: float, first: float, gap: float = 1.0, steps: int = 1) -> None:
        super().__init__()
        check_number("low", low)
        check_number("rise", rise, above=0)
        check_number("first", first)
        check_number("gap", gap, above=0)
        check_count("steps", steps)
        self.low, self.rise, self.first, self.gap, self.steps = low, rise, first, gap, steps

    def level(self, x: Tensor) -> Tensor:
        """How many thresholds ``x`` has reached, 0 to ``steps``, as floats; NaN stays NaN."""
        # floor has the derivative zero for autograd, too; a comparison would leave no graph at all
        if self.steps == 1 and x.dtype == _wide(x).dtype:  # a difference has the right sign, however it is rounded
            return (torch.floor(x - self.first) + 1).clamp(0, 1)
        near = (torch.floor((_wide(x) - self.first) / self.gap) + 1).clamp(0, self.steps)
        # The quotient is rounded otherwise than the thresholds, and may miss a level by one: they have the last word.
        reached = x >= self.threshold(near + 1).to(x.dtype)
        missed = x < self.threshold(near).to(x.dtype)
        return (near + reached.to(near.dtype) - missed.to(near.dtype)).clamp(0, self.steps).to(x.dtype)

    def value(self, level: Tensor) -> Tensor:
        """The output at a level."""
        return level * self.rise + self.low

    def threshold(self, level: Tensor) -> Tensor:
        """The threshold below a level from 1 to ``steps``."""
        return ((_wide(level) - 1) * self.gap + self.first).to(level.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.value(self.level(x))


def _wide(x: Tensor) -> Tensor:
    """In single precision at least: a level above 256 is no bfloat16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Sign(Staircase):
    """``+1`` where ``x >= 0``, else ``-1``."""

    def __init__(self) -> None:
        super().__init__(low=-1.0, rise=2.0, first=0.0)


class Heaviside(Staircase):
    """``1`` where ``x >= threshold``, else ``0``.

    Args:
        threshold: Where the step is.

    Raises:
        ValueError: If it is not a finite number.
    """

    def __init__(self, threshold: float = 0.0) -> None:
        check_number("threshold", threshold)
        super().__init__(low=0.0, rise=1.0, first=threshold)

    def extra_repr(self) -> str:
        return f"threshold={self.first:g}"


class HardThreshold(Staircase):
    """``+1`` where ``x >= threshold``, ``-1`` where ``x < -threshold``, ``0`` between: a sparse sign.

    Args:
        threshold: > 0.

    Raises:
        ValueError: If it is not.
    """

    def __init__(self, threshold: float = 0.5) -> None:
        check_number("threshold", threshold, above=0)
        super().__init__(low=-1.0, rise=1.0, first=-threshold, gap=2 * threshold, steps=2)

    def extra_repr(self) -> str:
        return f"threshold={-self.first:g}"


class Quantise(Staircase):
    """``x`` rounded to the nearest of ``2 ** bits`` evenly spaced values from ``low`` to ``high``; halves go up.

    Args:
        bits: 1 to 16.
        low: The lowest value.
        high: The highest value, above ``low``.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(self, bits: int = 2, low: float = -1.0, high: float = 1.0) -> None:
        check_count("bits", bits, 1, _MOST_BITS)
        check_number("low", low)
        check_number("high", high)
        if low >= high:
            raise ValueError(f"low must be a number below high, got low={low} and high={high}")
        steps = 2**bits - 1
        rise = (high - low) / steps
        super().__init__(low, rise, first=low + rise / 2, gap=rise, steps=steps)
        self.bits = bits

    def extra_repr(self) -> str:
        return f"bits={self.bits}, low={self.low:g}, high={self.low + self.rise * self.steps:g}"
