"""What a code that a staircase reads is judged by: not its distance to a target, but the side of each threshold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class MarginLoss:
    r"""The objective's change when a code's units cross the thresholds next to them, each crossing weighed by a ramp.

    .. math::
        T(c) = \sum_j up_j \, \rho(c_j - above_j) + down_j \, \rho(below_j - c_j), \qquad
        \rho(u) = \min(\max(\tfrac{u + margin}{2\, margin}, 0), 1)

    ``up_j`` is by how much the objective rises if unit j alone moves one level up, ``down_j`` one level down; a
    negative rise is a decrease. A step from 0 to 1 in place of the ramp would make T the sum of the changes of the
    units that cross. For a unit with one threshold it is, up to a constant, a margin loss of ``t (c - threshold)``
    with weight ``w``: the sign ``t`` is the wanted side, ``w`` what being on it is worth, and the ramp is the hinge cut
    off at the far side, beyond which a sample no longer pulls (other samples need a unit that is far away there).

    The ramp's slope is a derivative with respect to the layer's own output; none is taken of the staircase.

    Attributes:
        above: The threshold above each unit's forward code, shape ``(batch, *code)``.
        below: The threshold below it.
        up: Rise of J if the unit moves one level up; 0 where there is no level above.
        down: Rise of J if it moves one level down; 0 where there is none.
        margin: Half-width of the ramp, > 0.
    """

    above: Tensor
    below: Tensor
    up: Tensor
    down: Tensor
    margin: float

    def gradient(self, code: Tensor) -> Tensor:
        """Of ``T``, summed over samples, with respect to the code; shape ``(batch, *code)``."""
        rising = torch.where((code - self.above).abs() < self.margin, self.up, 0)
        return (rising - torch.where((self.below - code).abs() < self.margin, self.down, 0)) / (2 * self.margin)

    def values(self, code: Tensor) -> Tensor:
        """``T`` of each sample, shape ``(batch,)``."""
        value = self.up * self._ramp(code - self.above) + self.down * self._ramp(self.below - code)
        return value.flatten(1).sum(1)

    def _ramp(self, distance: Tensor) -> Tensor:
        return ((distance + self.margin) / (2 * self.margin)).clamp(0, 1)
