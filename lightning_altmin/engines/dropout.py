"""Dropout in closed form: one mask per batch, drawn in encode and used in every phase."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_altmin.engines.closed_form import closed_form
from lightning_altmin.engines.rule import Point, Rule


@closed_form(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
class DropoutRule(Rule):
    """``y = x * mask`` with the batch's mask, scaled by ``1 / (1 - p)``; the identity in eval mode."""

    reads_base = False

    def encode(self, x: Tensor) -> tuple[Tensor, Any]:
        if not self.module.training or self.module.p == 0:
            return x, None
        # Dropping out ones draws the same numbers as dropping out x, so both engines see one mask. A module set to
        # work in place overwrites the ones, not x.
        mask = self.module(torch.ones_like(x))
        return x * mask, mask

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return (x if state is None else x * state), None

    def change(self, difference: Tensor, base: Point, here: Point) -> Tensor:
        return difference if here.state is None else difference * here.state

    def input_gradient(self, grad: Tensor, at: Point) -> Tensor:
        return grad if at.state is None else grad * at.state
