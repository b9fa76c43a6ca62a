"""Pooling and reshaping in closed form."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.utils import _pair

from lightning_altmin.engines.base import CouplingGradient
from lightning_altmin.engines.closed_form import closed_form
from lightning_altmin.engines.rule import Point, Rule, selected
from lightning_altmin.engines.tiled import TiledCoupling

aten = torch.ops.aten


class MaxPool2dRule(Rule):
    """Each window's gradient goes to the position of its maximum.

    Encode's maxima serve the later phases, which ask for them, and for their positions, at the same code.
    """

    makes_gradients = True

    def encode(self, x: Tensor) -> tuple[Tensor, Any]:
        y, positions = self._maxima(x)
        return y, (x, y, positions)

    def joined(self, states: Sequence[Any]) -> Any:
        return states[0] if len(states) == 1 else None  # found again at the whole batch

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        if state is not None and state[0] is x:
            return state[1], state[2]
        return self._maxima(x)

    def _maxima(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The maximum of each window, and where it stands in its image, counted along rows; the first of equals."""
        pool = self.module
        return functional.max_pool2d_with_indices(
            x, pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode
        )

    def change(self, difference: Tensor, base: Point, here: Point) -> Tensor:
        """How far a window's maximum moved: as far as the entry that was largest, if it still is."""
        change = difference.flatten(-2).gather(-1, base.saved.flatten(-2)).view_as(base.y)
        return selected(base.y + change == here.y, change, here.y - base.y)

    def input_gradient(self, grad: Tensor, at: Point) -> Tensor:
        pool = self.module
        windows = (_pair(pool.kernel_size), _pair(pool.stride), _pair(pool.padding), _pair(pool.dilation))
        gradient: Tensor = torch.ops.aten.max_pool2d_with_indices_backward(
            grad, at.x, *windows, pool.ceil_mode, at.saved
        )
        return gradient


class TiledMaxPool2dRule(Rule):
    r"""The same for windows that tile the image, which the library's kernel serves badly on a CPU.

    Everything is done for one entry of all tiles at a time, so that temporary tensors have the size of the output. With
    ``m`` the move of an entry ``x`` and ``y`` the maximum of its tile,

    .. math::
        \max_j (x_j + m_j) - \max_j x_j = \max_j (m_j - (y - x_j))

    which keeps the digits of the moves, for the entry that was largest has ``y - x = 0``.
    """

    makes_gradients = True

    def encode(self, x: Tensor) -> tuple[Tensor, Any]:
        y = self._pooled(x)
        return y, (x, y)

    def joined(self, states: Sequence[Any]) -> Any:
        return states[0] if len(states) == 1 else None  # found again at the whole batch

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return (state[1] if state is not None and state[0] is x else self._pooled(x)), None

    def change(self, difference: Tensor, base: Point, here: Point) -> Tensor:
        moves = _Tiles(base.x, self._entries(base.x), base.y, self._entries(difference))
        change = moves.entry(0)
        for index in range(1, moves.count):
            torch.maximum(change, moves.entry(index), out=change)
        here.found(base.y + change, (moves, change))
        return change

    def last_change(self, difference: Tensor, base: Point, here: Point) -> Tensor:
        y = base.y
        for entry, move in zip(self._entries(base.x), self._entries(difference), strict=True):
            entry.sub_(y).add_(move)
        change = self._pooled(base.x)
        here.spent(y + change)
        return change

    def input_gradient(self, grad: Tensor, at: Point) -> Tensor:
        return self.last_input_gradient(grad.clone(), at)

    def last_input_gradient(self, grad: Tensor, at: Point) -> Tensor:
        """To the first entry, along rows, that is its tile's largest: the entries before it are smaller."""
        tiles, largest = (_Tiles(at.x, self._entries(at.x)), at.y) if at.saved is None else at.saved
        gradient = torch.empty_like(tiles.x) if self.fills(tiles.x) else torch.zeros_like(tiles.x)
        entries = self._entries(gradient)
        for index in range(tiles.count - 1):
            entries[index].copy_(grad)
            # What goes on to later entries is the gradient where this one falls short of the largest.
            aten.threshold_backward.grad_input(grad, tiles.below(largest, index), 0, grad_input=grad)
            entries[index].sub_(grad)
        entries[-1].copy_(grad)
        return gradient

    def compiled(self) -> Rule:
        return FusedTiledMaxPool2dRule(self.module)

    def coupling(
        self, base: Tensor, state: Any, above: Callable[[Tensor], CouplingGradient]
    ) -> CouplingGradient | None:
        if base.dim() != 4 or not self.fills(base):
            return None
        maxima, _ = self.forward(base, state)
        return TiledCoupling(self, base, maxima, above(maxima))

    def by_entries(self, x: Tensor) -> Tensor:
        """Images of shape ``(batch, channels, height, width)`` as ``(batch, entries, channels, rows, columns)``."""
        return torch.stack(self._entries(x), 1)

    def image(self, entries: Tensor) -> Tensor:
        """The images of which these are the `by_entries`, if their tiles fill them."""
        height, width = _pair(self.module.kernel_size)
        batch, _, channels, rows, columns = entries.shape
        tiles = entries.view(batch, height, width, channels, rows, columns).permute(0, 3, 4, 1, 5, 2)
        return tiles.reshape(batch, channels, rows * height, columns * width)

    def fills(self, x: Tensor) -> bool:
        """Whether the tiles leave nothing out."""
        height, width = _pair(self.module.kernel_size)
        return x.shape[-2] % height == 0 and x.shape[-1] % width == 0

    def _entries(self, x: Tensor) -> list[Tensor]:
        """The first entry of every tile, the second, and so on along rows; what fills no tile is left out."""
        height, width = _pair(self.module.kernel_size)
        rows, columns = x.shape[-2] // height, x.shape[-1] // width
        return [x[..., r::height, c::width][..., :rows, :columns] for r in range(height) for c in range(width)]

    def _pooled(self, x: Tensor) -> Tensor:
        first, second, *others = self._entries(x)
        y = torch.maximum(first, second)
        for entry in others:
            torch.maximum(y, entry, out=y)
        return y


class FusedTiledMaxPool2dRule(TiledMaxPool2dRule):
    """The same for a compiler, which fuses expressions, and does badly with writes to every second entry."""

    def change(self, difference: Tensor, base: Point, here: Point) -> Tensor:
        entries = zip(self._entries(base.x), self._entries(difference), strict=True)
        moved = [move - (base.y - entry) for entry, move in entries]
        change = functools.reduce(torch.maximum, moved)
        here.found(base.y + change, (moved, change))
        return change

    def last_change(self, difference: Tensor, base: Point, here: Point) -> Tensor:
        return self.change(difference, base, here)

    def input_gradient(self, grad: Tensor, at: Point) -> Tensor:
        entries, largest = (self._entries(at.x), at.y) if at.saved is None else at.saved
        parts = []
        for entry in entries[:-1]:
            rest = torch.where(entry < largest, grad, 0)
            parts.append(grad - rest)
            grad = rest
        return self._image([*parts, grad], at.x)

    def last_input_gradient(self, grad: Tensor, at: Point) -> Tensor:
        return self.input_gradient(grad, at)

    def coupling(
        self, base: Tensor, state: Any, above: Callable[[Tensor], CouplingGradient]
    ) -> CouplingGradient | None:
        return None  # the compiler finds its own order

    def _image(self, entries: list[Tensor], like: Tensor) -> Tensor:
        """The image of which these are the `_entries`, zero where no tile is, shaped like ``like``."""
        height, width = _pair(self.module.kernel_size)
        rows = [torch.stack(entries[r * width :][:width], -1).flatten(-2) for r in range(height)]
        image = torch.stack(rows, -2).flatten(-3, -2)
        right, below = like.shape[-1] - image.shape[-1], like.shape[-2] - image.shape[-2]
        return functional.pad(image, (0, right, 0, below)) if right or below else image

    def _pooled(self, x: Tensor) -> Tensor:
        return functools.reduce(torch.maximum, self._entries(x))


class _Tiles:
    """Images by the entries of their tiles, or ``m - (y - x)`` of images that have moved.

    Attributes:
        x: The images.
        count: Number of entries in a tile.
    """

    def __init__(
        self, x: Tensor, entries: list[Tensor], largest: Tensor | None = None, moves: list[Tensor] | None = None
    ) -> None:
        self.x, self.count = x, len(entries)
        self._entries, self._largest, self._moves = entries, largest, moves

    def entry(self, index: int) -> Tensor:
        """The given entry of every tile; of moved images a new tensor."""
        if self._largest is None or self._moves is None:
            return self._entries[index]
        return torch.sub(self._entries[index], self._largest).add_(self._moves[index])

    def below(self, largest: Tensor, index: int) -> Tensor:
        """How far the given entry of every tile is below the largest: a new tensor."""
        entry = self.entry(index)
        return largest - entry if self._moves is None else torch.sub(largest, entry, out=entry)


def _tiles(pool: nn.MaxPool2d) -> bool:
    return (
        _pair(pool.kernel_size) == _pair(pool.stride) != (1, 1)
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

    reads_base = False

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

    reads_base = False

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

    reads_base = False

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self.module(x), None

    def change(self, difference: Tensor, base: Point, here: Point) -> Tensor:
        return self.module(difference)

    def input_gradient(self, grad: Tensor, at: Point) -> Tensor:
        return grad.reshape(at.x.shape)
