"""A trained network of staircases as integer arithmetic: sums of integer weights, compared with integer thresholds."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_altmin.nn.staircase import Staircase

_FRACTION = 2**16  # of one step of a sum: how finely the biases of the output are kept


@dataclass(frozen=True, eq=False)
class _Layer:
    """One hidden layer: it gives each unit's level, the number of thresholds that its sum has reached."""

    weight: Tensor  # (out, in), int32
    thresholds: Tensor  # (steps, out), int64

    def __call__(self, levels: Tensor) -> Tensor:
        sums = levels @ self.weight.t()
        return (sums.unsqueeze(0) >= self.thresholds.unsqueeze(1)).sum(0, dtype=torch.int32)


class IntegerNetwork:
    r"""``[Flatten] (Linear Staircase) * n Linear`` computed without a float between input and prediction.

    Weights are rounded to ``bits`` bits with one scale per layer, ``W = scale * Q``. A staircase gives the integers
    ``0 .. steps``, so a layer is the sum ``Q n`` in 32 bits (for a sign, additions and subtractions alone); instead of
    adding the bias and comparing with the activation's threshold, the sum is compared with the integer

    .. math::
        \lceil (threshold - bias - scale \, low \sum_j Q_j) / (scale \, rise) \rceil

    so the result is that of the network with rounded weights, `rounded`, in exact arithmetic.

    Args:
        network: The trained network, left as it is.
        zero: The integer input that stands for 0.
        unit: What one step of the integer input stands for: the network is given ``(pixel - zero) * unit``. May be
            fractional, as ``zero``: both go into the first layer's thresholds.
        bits: Bits of a weight with its sign, 2 to 16.

    Raises:
        ValueError: If the network is something else, or ``bits`` is out of range.
    """

    def __init__(self, network: nn.Sequential, zero: float = 0.0, unit: float = 1.0, bits: int = 8) -> None:
        if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 16:
            raise ValueError(f"bits must be an integer from 2 to 16, got {bits}")
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
                self._output = whole
                self._output_fixed = (fixed / (scale * rise) * _FRACTION).round().long()
                return
            staircase = staircases[len(self._layers)]
            assert isinstance(staircase, Staircase)
            levels = torch.arange(1, staircase.steps + 1, dtype=torch.float64).unsqueeze(1)
            thresholds = ((staircase.threshold(levels) - fixed) / (scale * rise)).ceil().long()
            self._layers.append(_Layer(whole, thresholds))
            low, rise = staircase.low, staircase.rise

    def predict(self, pixels: Tensor) -> Tensor:
        """The class with the largest output.

        Args:
            pixels: Integers, shape ``(batch, ...)``.

        Returns:
            Shape ``(batch,)``.

        Raises:
            ValueError: If the input is not of an integer type.
        """
        if pixels.is_floating_point() or pixels.dtype == torch.bool:
            raise ValueError(f"pixels must be integers, got {pixels.dtype}")
        levels = pixels.flatten(1).to(torch.int32)
        for layer in self._layers:
            levels = layer(levels)
        sums = (levels @ self._output.t()).long() * _FRACTION + self._output_fixed
        return sums.argmax(1)


@torch.no_grad()
def _round(linear: nn.Linear, bits: int) -> tuple[Tensor, float]:
    """Round the weights in place; returns them as integers, and the scale."""
    largest = float(linear.weight.abs().max())
    # A power of two, so that scale * integer is exact in floating point.
    scale = 2.0 ** math.ceil(math.log2(largest / (2 ** (bits - 1) - 1))) if largest > 0 else 1.0
    whole = (linear.weight / scale).round()
    linear.weight.copy_(whole * scale)
    return whole.to(torch.int32), scale
