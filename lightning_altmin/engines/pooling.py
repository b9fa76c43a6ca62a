"""Pooling and reshaping in closed form."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.utils import _pair

from lightning_altmin.engines.closed_form import closed_form
from lightning_altmin.engines.rule import Point, Rule


class MaxPool2dRule(Rule):
    """Each window's gradient goes to the position of its maximum."""

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        pool = self.module
        return functional.max_pool2d_with_indices(
            x, pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode
        )

    def change(self, difference: Tensor, base: Point, here: Point) -> Tensor:
        moved = difference.flatten(-2).gather(-1, base.saved.flatten(-2)).view_as(base.y)
        return _unless_another_won(moved, base, here)

    def input_gradient(self, grad: Tensor, at: Point) -> Tensor:
        pool = self.module
        windows = (_pair(pool.kernel_size), _pair(pool.stride), _pair(pool.padding), _pair(pool.dilation))
        gradient: Tensor = torch.ops.aten.max_pool2d_with_indices_backward(
            grad, at.x, *windows, pool.ceil_mode, at.saved
        )
        return gradient


class TiledMaxPool2dRule(Rule):
    """The same for windows that tile the image: maxima of slices, an order of magnitude faster on a CPU.

    Maxima are taken along rows, then along columns, the first of equals winning; that is PyTorch's order too.
    """

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        height, width = _pair(self.module.kernel_size)
        rows = _tile_max(x, width, -1)
        return _tile_max(rows, height, -2), rows

    def change(self, difference: Tensor, base: Point, here: Point) -> Tensor:
        height, width = _pair(self.module.kernel_size)
        rows = base.saved
        moved = _of_maxima(_of_maxima(difference, base.x, rows, width, -1), rows, base.y, height, -2)
        return _unless_another_won(moved, base, here)

    def input_gradient(self, grad: Tensor, at: Point) -> Tensor:
        height, width = _pair(self.module.kernel_size)
        rows = at.saved
        return _to_maxima(_to_maxima(grad, rows, at.y, height, -2), at.x, rows, width, -1)


def _slices(x: Tensor, size: int, dim: int) -> list[Tensor]:
    """Entry j of every tile of ``size`` along ``dim``, for each j; what fills no tile is left out."""
    whole = x.shape[dim] // size * size
    x = x.narrow(dim, 0, whole)
    if dim == -1:
        return [x[..., j::size] for j in range(size)]
    return [x[..., j::size, :] for j in range(size)]


def _tile_max(x: Tensor, size: int, dim: int) -> Tensor:
    return functools.reduce(torch.maximum, _slices(x, size, dim))


def _of_maxima(values: Tensor, x: Tensor, maxima: Tensor, size: int, dim: int) -> Tensor:
    """The value of each tile at the first of its maxima in ``x``; the other way round than `_to_maxima`."""
    *others, found = _slices(values, size, dim)
    for value, entry in reversed(list(zip(others, _slices(x, size, dim), strict=False))):
        found = torch.where(entry == maxima, value, found)
    return found


def _unless_another_won(moved: Tensor, base: Point, here: Point) -> Tensor:
    """How far a window's maximum moved: as far as the entry that was largest, if it still is."""
    return torch.where(base.y + moved == here.y, moved, here.y - base.y)


def _to_maxima(grad: Tensor, x: Tensor, maxima: Tensor, size: int, dim: int) -> Tensor:
    """Each tile's gradient at the first of its maxima, zero elsewhere; shaped like ``x``."""
    parts, rest, nothing = [], grad, grad.new_zeros(())
    for value in _slices(x, size, dim)[:-1]:
        part = torch.where(value == maxima, rest, nothing)
        parts.append(part)
        rest = rest - part
    parts.append(rest)
    gradient = torch.stack(parts, dim if dim == -2 else x.dim()).flatten(x.dim() + dim, x.dim() + dim + 1)
    unread = x.shape[dim] % size
    if not unread:
        return gradient
    return functional.pad(gradient, (0, unread) if dim == -1 else (0, 0, 0, unread))


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
