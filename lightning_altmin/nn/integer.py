"""A trained network of staircases as integer arithmetic: sums of integer weights, compared with integer thresholds."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_altmin.arguments import check_count, check_number
from lightning_altmin.nn.staircase import Staircase

_FRACTION = 2**16  # of one step of a sum: how finely the biases of the output are kept
_MOST = 2**61  # of a sum, and of what it is compared with or added to: together they stay within 64 bits
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32)


class _Sums:
    """``Q n`` for integer inputs n, in 32 bits where the sums cannot leave them, or else in 64.

    Args:
        weight: Q, shape ``(out, in)``.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight.to(torch.int32)
        self._reach = int(weight.abs().sum(1).max())  # of a sum, where no input is beyond 1

    def __call__(self, levels: Tensor, largest: int) -> Tensor:
        dtype = torch.int32 if self._reach * largest < 2**31 else torch.int64  # so do all parts of a sum
        return levels.to(dtype) @ self._weight.to(dtype).t()

    def limit(self, factor: int = 1) -> int:
        """The largest input for which sums times ``factor`` stay where 64 bits hold them."""
        return (_MOST - 1) // max(self._reach * factor, 1)


@dataclass(frozen=True, eq=False)
class _Layer:
    """One hidden layer: it gives each unit's level, the number of thresholds that its sum has reached."""

    sums: _Sums
    thresholds: Tensor  # (steps, out), int64

    def __call__(self, levels: Tensor, largest: int) -> Tensor:
        sums = self.sums(levels, largest)
        return (sums.unsqueeze(0) >= self.thresholds.unsqueeze(1)).sum(0, dtype=torch.int32)


class IntegerNetwork:
    r"""``[Flatten] (Linear Staircase) * n Linear`` computed without a float between input and prediction.

    Weights are rounded to ``bits`` bits with one scale per layer, ``W = scale * Q``. A staircase gives the integers
    ``0 .. steps``, so a layer is the sum ``Q n`` (for a sign, additions and subtractions alone), in 32 bits unless its
    weights and inputs are so large that it needs 64; instead of adding the bias and comparing with the activation's
    threshold, the sum is compared with the integer

    .. math::
        \lceil (threshold - bias - scale \, low \sum_j Q_j) / (scale \, rise) \rceil

    so the result is that of the network with rounded weights, `rounded`, in exact arithmetic.

    Args:
        network: The trained network, left as it is.
        zero: The integer input that stands for 0.
        unit: What one step of the integer input stands for: the network is given ``(pixel - zero) * unit``. May be
            fractional, as ``zero``, but is positive: both go into the first layer's thresholds.
        bits: Bits of a weight with its sign, 2 to 16.

    Raises:
        ValueError: If the network is something else, its output does not fit 64 bits, or a number is out of range.
    """

    def __init__(self, network: nn.Sequential, zero: float = 0.0, unit: float = 1.0, bits: int = 8) -> None:
        check_number("zero", zero)
        check_number("unit", unit, above=0)
        check_count("bits", bits, 2, 16)
        modules = [m for m in network if not isinstance(m, nn.Flatten)]
        linears, staircases = modules[::2], modules[1::2]
        fits = len(modules) % 2 == 1 and all(type(m) is nn.Linear for m in linears)
        if not fits or not all(isinstance(m, Staircase) for m in staircases):
            raise ValueError(
                "network must be Linear layers with a staircase (Sign, Heaviside, ...) after each but the last, got "
                f"{[type(m).__name__ for m in network]}"
            )
        self.rounded = copy.deepcopy(network).double()
        """The network with rounded weights, in double precision."""
        self._layers: list[_Layer] = []
        low, rise = -zero * unit, unit  # of what a layer reads
        for linear in (m for m in self.rounded if isinstance(m, nn.Linear)):
            whole, scale = _round(linear, bits)
            fixed = linear.weight.detach().sum(1) * low
            if linear.bias is not None:
                fixed = fixed + linear.bias.detach()
            if len(self._layers) == len(staircases):
                self._output, self._output_fixed = _Sums(whole), _whole_bias(fixed / (scale * rise))
                _refuse_beyond_64_bits(self._output, staircases, bits)
                return
            staircase = staircases[len(self._layers)]
            assert isinstance(staircase, Staircase)
            levels = torch.arange(1, staircase.steps + 1, dtype=torch.float64).unsqueeze(1)
            thresholds = ((staircase.threshold(levels) - fixed) / (scale * rise)).ceil()
            # One that no sum reaches need not be exact, but must not come round to the other side.
            self._layers.append(_Layer(_Sums(whole), thresholds.clamp(-_MOST, _MOST).long()))
            low, rise = staircase.low, staircase.rise

    def predict(self, pixels: Tensor) -> Tensor:
        """The class with the largest output.

        Args:
            pixels: Integers, shape ``(batch, ...)``.

        Returns:
            Shape ``(batch,)``.

        Raises:
            ValueError: If the input is not of an integer type of at most 64 bits with a sign, or so large that sums of
                it do not fit 64 bits.
        """
        if pixels.dtype not in _INTEGERS:
            raise ValueError(f"pixels must be integers, got {pixels.dtype}; round them, or convert them to torch.int64")
        levels = pixels.flatten(1).to(torch.int64)
        largest = max(-int(levels.min()), int(levels.max())) if levels.numel() else 0
        most = self._layers[0].sums.limit() if self._layers else self._output.limit(_FRACTION)
        if largest > most:
            raise ValueError(f"pixels must lie between -{most} and {most} for sums that fit 64 bits, got {largest}")
        for layer in self._layers:
            levels, largest = layer(levels, largest), len(layer.thresholds)
        sums = self._output(levels, largest).long() * _FRACTION + self._output_fixed
        return sums.argmax(1)


def _whole_bias(steps: Tensor) -> Tensor:
    """The biases of the output, given in steps of its sums, in units of a fraction of a step."""
    whole = (steps * _FRACTION).round()
    if not bool((whole.abs() < _MOST).all()):
        raise ValueError(
            f"network: what is added to the sums of the output, its bias, is {float(steps.abs().max()):.3g} times the "
            "step of its rounded weights, which does not fit 64 bits: its weights are (nearly) zero beside it; train "
            "them, or leave the bias out"
        )
    return whole.long()


def _refuse_beyond_64_bits(output: _Sums, staircases: Sequence[nn.Module], bits: int) -> None:
    if staircases and isinstance(last := staircases[-1], Staircase) and last.steps > output.limit(_FRACTION):
        raise ValueError(
            f"bits={bits} and {last.steps} steps of the last staircase make sums that do not fit 64 bits; use fewer of "
            "either"
        )


@torch.no_grad()
def _round(linear: nn.Linear, bits: int) -> tuple[Tensor, float]:
    """Round the weights in place; returns them as integers, and the scale."""
    largest = float(linear.weight.abs().max())
    # A power of two, so that scale * integer is exact in floating point.
    scale = 2.0 ** math.ceil(math.log2(largest / (2 ** (bits - 1) - 1))) if largest > 0 else 1.0
    whole = (linear.weight / scale).round()
    linear.weight.copy_(whole * scale)
    return whole.to(torch.int32), scale
