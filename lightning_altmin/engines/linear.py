"""Linear layers in closed form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_altmin.engines.base import Gradients
from lightning_altmin.engines.closed_form import closed_form
from lightning_altmin.engines.rule import Point, Rule, product


@closed_form(nn.Linear)
class LinearRule(Rule):
    """``y = x W^T + b`` over the last dimension; leading dimensions are summed over in the weight gradient.

    Products may run in 16 bits under autocast; what they return is stored as what they were given.
    """

    reads_base = False
    makes_gradients = True

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return functional.linear(x, self.module.weight, self.module.bias).to(x.dtype), None

    def change(self, difference: Tensor, base: Point, here: Point) -> Tensor:
        return product(lambda d: functional.linear(d, self.module.weight), difference)

    def residual(self, difference: Tensor, base: Point, here: Point, target: Tensor, spend: bool) -> Tensor:
        if target.dim() != 2 or torch.is_autocast_enabled(target.device.type):
            return self.change(difference, base, here).sub_(target)
        out = target if spend and target.is_contiguous() else None
        return torch.addmm(target, difference, self.module.weight.t(), beta=-1, out=out)

    def input_gradient(self, grad: Tensor, at: Point) -> Tensor:
        return product(lambda g: g @ self.module.weight, grad)

    def parameter_gradients(self, grad: Tensor, at: Point) -> Gradients:
        weight, bias = self.module.weight, self.module.bias
        rows, inputs = _rows(grad), _rows(at.x)
        gradients: Gradients = []
        if weight.requires_grad:
            gradients.append((weight, product(lambda g: g.t() @ inputs, rows)))
        if bias is not None and bias.requires_grad:
            gradients.append((bias, rows.sum(0)))
        return gradients


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
