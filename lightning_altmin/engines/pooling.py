"""Pooling and reshaping in closed form."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.utils import _pair

from lightning_altmin.engines.closed_form import closed_form
from lightning_altmin.engines.rule import Point, Rule, selected


class MaxPool2dRule(Rule):
    """Each window's gradient goes to the position of its maximum.

    Encode's maxima serve the later phases, which ask for them, and for their positions, at the same code.
    """

    def encode(self, x: Tensor) -> tuple[Tensor, Any]:
        maxima = self.maxima(x)
        return maxima.y, maxima

    def joined(self, states: Sequence[Any]) -> Any:
        return states[0] if len(states) == 1 else None  # found again at the whole batch

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        maxima = state if state is not None and state.x is x else self.maxima(x)
        return maxima.y, maxima

    def maxima(self, x: Tensor) -> Maxima | TiledMaxima:
        """The maximum of each window of ``x``."""
        pool = self.module
        found = functional.max_pool2d_with_indices(
            x, pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode
        )
        return Maxima(x, *found)

    def change(self, difference: Tensor, base: Point, here: Point) -> Tensor:
        """How far a window's maximum moved: as far as the entry that was largest, if it still is."""
        moved = difference.flatten(-2).gather(-1, base.saved.positions.flatten(-2)).view_as(base.y)
        return selected(base.y + moved == here.y, moved, here.y - base.y)

    def input_gradient(self, grad: Tensor, at: Point) -> Tensor:
        pool = self.module
        windows = (_pair(pool.kernel_size), _pair(pool.stride), _pair(pool.padding), _pair(pool.dilation))
        gradient: Tensor = torch.ops.aten.max_pool2d_with_indices_backward(
            grad, at.x, *windows, pool.ceil_mode, at.saved.positions
        )
        return gradient


class TiledMaxPool2dRule(MaxPool2dRule):
    """The same for windows that tile the image: maxima of slices, an order of magnitude faster on a CPU."""

    def maxima(self, x: Tensor) -> Maxima | TiledMaxima:
        height, width = _pair(self.module.kernel_size)
        # Rows first: their slices are contiguous.
        y = _tile_max(_tile_max(x, height, -2), width, -1)
        return TiledMaxima(x, y, height, width)


class Maxima:
    """The maximum of each window.

    Attributes:
        x: The images, shape ``(batch, channels, height, width)``.
        y: The maxima.
        positions: Where each stands in its image, counted along rows; the first of equals.
    """

    def __init__(self, x: Tensor, y: Tensor, positions: Tensor) -> None:
        self.x, self.y, self.positions = x, y, positions


class TiledMaxima:
    """`Maxima` of tiles, whose positions are found when first asked for."""

    def __init__(self, x: Tensor, y: Tensor, height: int, width: int) -> None:
        self.x, self.y = x, y
        self._height, self._width = height, width
        self._positions: Tensor | None = None

    @property
    def positions(self) -> Tensor:
        """Where each maximum stands in its image, counted along rows; the first of equals."""
        if self._positions is None:
            self._positions = self._find()
        return self._positions

    def _find(self) -> Tensor:
        rows, columns = self.y.shape[-2:]
        across = self.x.shape[-1]
        corners = torch.arange(rows, device=self.x.device).mul_(self._height * across).unsqueeze(1)
        corners = corners + torch.arange(columns, device=self.x.device).mul_(self._width)
        positions = corners.expand(self.y.shape).clone(memory_format=torch.contiguous_format)
        entries = [r[..., c :: self._width][..., :columns] for r in self._rows(rows) for c in range(self._width)]
        steps = [1] * self._width
        steps[-1] = across - self._width + 1  # from a row of the tile to the next
        passed: Tensor | None = None
        for index, entry in enumerate(entries[:-1]):  # go on where no maximum was met; a tile's last entry is one
            passed = entry < self.y if passed is None else passed & (entry < self.y)
            # Sums of integers: picking by a mask (torch.where) takes five times as long on a CPU.
            positions.add_(passed, alpha=steps[index % self._width])
        return positions

    def _rows(self, count: int) -> list[Tensor]:
        return [self.x[..., r :: self._height, :][..., :count, :] for r in range(self._height)]


def _tile_max(x: Tensor, size: int, dim: int) -> Tensor:
    """The largest entry of every tile of ``size`` along ``dim``; what fills no tile is left out."""
    whole = x.narrow(dim, 0, x.shape[dim] // size * size)
    slices = [whole[..., j::size] if dim == -1 else whole[..., j::size, :] for j in range(size)]
    return functools.reduce(torch.maximum, slices)


def _tiles(pool: nn.MaxPool2d) -> bool:
    return (
        _pair(pool.kernel_size) == _pair(pool.stride)
        and _pair(pool.padding) == (0, 0)
        and _pair(pool.dilation) == (1, 1)
        and not pool.ceil_mode
    )


@closed_form(nn.MaxPool2d, when=lambda pool: not pool.return_indices)
def max_pool2d_rule(pool: nn.Module) -> Rule:
    """The cheapest rule for a pooling's windows."""
    return TiledMaxPool2dRule(pool) if isinstance(pool, nn.MaxPool2d) and _tiles(pool) else MaxPool2dRule(pool)


@closed_form(nn.AvgPool2d)
class AvgPool2dRule(Rule):
    """Each window's gradient is shared equally by its positions."""

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self.module(x), None

    def change(self, difference: Tensor, base: Point, here: Point) -> Tensor:
        return self.module(difference)

    def input_gradient(self, grad: Tensor, at: Point) -> Tensor:
        pool = self.module
        gradient: Tensor = torch.ops.aten.avg_pool2d_backward(
            grad,
            at.x,
            _pair(pool.kernel_size),
            _pair(pool.stride),
            _pair(pool.padding),
            pool.ceil_mode,
            pool.count_include_pad,
            pool.divisor_override,
        )
        return gradient


@closed_form(nn.AdaptiveAvgPool2d)
class AdaptiveAvgPool2dRule(Rule):
    """Average over windows chosen so that the output has a given size."""

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self.module(x), None

    def change(self, difference: Tensor, base: Point, here: Point) -> Tensor:
        return self.module(difference)

    def input_gradient(self, grad: Tensor, at: Point) -> Tensor:
        gradient: Tensor = torch.ops.aten._adaptive_avg_pool2d_backward(grad.contiguous(), at.x)
        return gradient


@closed_form(nn.Flatten, nn.Unflatten)
class ReshapeRule(Rule):
    """A change of shape; its derivative is the change back."""

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self.module(x), None

    def change(self, difference: Tensor, base: Point, here: Point) -> Tensor:
        return self.module(difference)

    def input_gradient(self, grad: Tensor, at: Point) -> Tensor:
        return grad.reshape(at.x.shape)
