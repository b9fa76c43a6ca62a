"""Pooling and reshaping in closed form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.utils import _pair

from lightning_altmin.engines.closed_form import Point, Rule, closed_form


@closed_form(nn.MaxPool2d, when=lambda m: not m.return_indices)
class MaxPool2dRule(Rule):
    """Each window's gradient goes to the position of its maximum."""

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        pool = self.module
        return functional.max_pool2d_with_indices(
            x, pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode
        )

    def input_gradient(self, grad: Tensor, at: Point) -> Tensor:
        pool = self.module
        windows = (_pair(pool.kernel_size), _pair(pool.stride), _pair(pool.padding), _pair(pool.dilation))
        gradient: Tensor = torch.ops.aten.max_pool2d_with_indices_backward(
            grad, at.x, *windows, pool.ceil_mode, at.saved
        )
        return gradient


@closed_form(nn.AvgPool2d)
class AvgPool2dRule(Rule):
    """Each window's gradient is shared equally by its positions."""

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self.module(x), None

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

    def input_gradient(self, grad: Tensor, at: Point) -> Tensor:
        gradient: Tensor = torch.ops.aten._adaptive_avg_pool2d_backward(grad.contiguous(), at.x)
        return gradient


@closed_form(nn.Flatten, nn.Unflatten)
class ReshapeRule(Rule):
    """A change of shape; its derivative is the change back."""

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self.module(x), None

    def input_gradient(self, grad: Tensor, at: Point) -> Tensor:
        return grad.reshape(at.x.shape)
