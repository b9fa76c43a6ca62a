"""Convolutions in closed form, through the library's own convolution gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_altmin.engines.base import Gradients
from lightning_altmin.engines.closed_form import closed_form
from lightning_altmin.engines.rule import Point, Rule, product


def _is_plain(conv: _ConvNd) -> bool:
    return conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


@closed_form(nn.Conv1d, nn.Conv2d, nn.Conv3d, when=_is_plain)
class ConvRule(Rule):
    """Cross-correlation with zero padding; stride, dilation and groups as the module says."""

    reads_base = False
    makes_gradients = True

    def encode(self, x: Tensor) -> tuple[Tensor, Any]:
        return self._apply(x, self.module.bias), x.shape

    def joined(self, states: Sequence[Any]) -> Any:
        return states[0]  # of which the size of an image is read, and not that of the batch

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self._apply(x, self.module.bias), None

    def change(self, difference: Tensor, base: Point, here: Point) -> Tensor:
        return product(lambda d: self._apply(d, None), difference)

    def residual(self, difference: Tensor, base: Point, here: Point, target: Tensor, spend: bool) -> Tensor:
        return self.change(difference, base, here).sub_(target)

    def _apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        conv = self.module
        return torch.convolution(
            x, conv.weight, bias, conv.stride, conv.padding, conv.dilation, False, _zeros(conv), conv.groups
        ).to(x.dtype)

    def input_gradient(self, grad: Tensor, at: Point) -> Tensor:
        # The transposed convolution, and not convolution_backward, which would ask for an input to read its shape.
        conv = self.module
        covered = [
            (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1
            for size, stride, padding, dilation, kernel in zip(
                grad.shape[-len(conv.stride) :], conv.stride, conv.padding, conv.dilation, conv.kernel_size, strict=True
            )
        ]
        left_over = [size - part for size, part in zip(at.state[-len(conv.stride) :], covered, strict=True)]
        return product(
            lambda g: torch.convolution(
                g, conv.weight, None, conv.stride, conv.padding, conv.dilation, True, left_over, conv.groups
            ),
            grad,
        )

    def parameter_gradients(self, grad: Tensor, at: Point) -> Gradients:
        conv = self.module
        wanted = (conv.weight.requires_grad, conv.bias is not None and conv.bias.requires_grad)
        _, weight, bias = torch.ops.aten.convolution_backward(
            grad,
            at.x,
            conv.weight,
            None if conv.bias is None else [conv.out_channels],
            conv.stride,
            conv.padding,
            conv.dilation,
            False,
            _zeros(conv),
            conv.groups,
            (False, *wanted),
        )
        return [(p, g) for p, g, w in zip((conv.weight, conv.bias), (weight, bias), wanted, strict=True) if w]


def _zeros(conv: _ConvNd) -> list[int]:
    return [0] * len(conv.stride)
