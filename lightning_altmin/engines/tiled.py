"""Repeated gradients of a coupling through a max-pooling of tiles, on codes that lie tile by tile."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_altmin.engines.base import CouplingGradient

if TYPE_CHECKING:
    from lightning_altmin.engines.pooling import TiledMaxPool2dRule


class TiledCoupling(CouplingGradient):
    r"""Coupling of a stage that begins with the pooling of tiles, in an order of entries that suits a CPU.

    Reading or writing every second entry of rows and columns takes several times as long as the same number of
    neighbours. So moves and gradients have the shape ``(batch, entries of a tile, channels, rows of tiles, columns of
    tiles)`` here, and are brought back to images once. With ``m`` the move of an entry, ``x`` its forward value and
    ``y`` the forward maximum of its tile, the maximum moves by :math:`\max_j (m_j - (y - x_j))`, and the gradient goes
    to the first entry, along rows, that attains it.

    Args:
        pool: The pooling, whose tiles fill the image.
        base: The forward code, shape ``(batch, channels, height, width)``.
        maxima: Of its tiles.
        above: The coupling as a function of how far ``maxima`` move.
    """

    def __init__(self, pool: TiledMaxPool2dRule, base: Tensor, maxima: Tensor, above: CouplingGradient) -> None:
        self._pool, self._above = pool, above
        self._short = pool.by_entries(base).sub_(maxima.unsqueeze(1))  # by how much an entry falls short

    def __call__(self, move: Tensor | None) -> Tensor:
        if move is None:
            entries, highest = self._short, self._short.new_zeros(()).expand(self._short[:, 0].shape)
            return self._to_first(self._above(None), entries, highest, torch.empty_like(entries))
        moved = self._short + move
        highest = moved.amax(1)
        return self._to_first(self._above(highest), moved, highest, moved)

    def restored(self, move: Tensor) -> Tensor:
        return self._pool.image(move)

    def _to_first(self, gradient: Tensor, entries: Tensor, highest: Tensor, out: Tensor) -> Tensor:
        """The gradient at the first entry that is its tile's highest; ``out`` may be ``entries``."""
        *places, last = out.unbind(1)
        for entry, place in zip(entries.unbind(1)[:-1], places, strict=True):
            # What goes on to later entries is the gradient where this one falls short of the highest.
            rest: Tensor = torch.ops.aten.threshold_backward(gradient, torch.sub(highest, entry, out=place), 0)
            torch.sub(gradient, rest, out=place)
            gradient = rest
        last.copy_(gradient)
        return out
