"""Elementwise activations in closed form: each is a pair of functions, value and vector-Jacobian product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_altmin.engines.closed_form import closed_form
from lightning_altmin.engines.rule import Point, Rule, selected

aten = torch.ops.aten
Value = Callable[[Any, Tensor], Tensor]
Slope = Callable[[Any, Tensor, Point], Tensor]

# module type -> (value(module, x), vjp(module, grad, point)). Values never work in place: the input is a code.
_ACTIVATIONS: dict[type[nn.Module], tuple[Value, Slope]] = {
    nn.Identity: (lambda m, x: x, lambda m, g, at: g),
    nn.ReLU: (lambda m, x: torch.relu(x), lambda m, g, at: aten.threshold_backward(g, at.x, 0)),
    nn.LeakyReLU: (
        lambda m, x: functional.leaky_relu(x, m.negative_slope),
        lambda m, g, at: aten.leaky_relu_backward(g, at.x, m.negative_slope, False),
    ),
    nn.ReLU6: (lambda m, x: functional.relu6(x), lambda m, g, at: aten.hardtanh_backward(g, at.x, 0.0, 6.0)),
    nn.Hardtanh: (
        lambda m, x: functional.hardtanh(x, m.min_val, m.max_val),
        lambda m, g, at: aten.hardtanh_backward(g, at.x, m.min_val, m.max_val),
    ),
    nn.Sigmoid: (lambda m, x: torch.sigmoid(x), lambda m, g, at: aten.sigmoid_backward(g, at.y)),
    nn.Tanh: (lambda m, x: torch.tanh(x), lambda m, g, at: aten.tanh_backward(g, at.y)),
    nn.GELU: (
        lambda m, x: functional.gelu(x, approximate=m.approximate),
        lambda m, g, at: aten.gelu_backward(g, at.x, approximate=m.approximate),
    ),
    nn.SiLU: (lambda m, x: functional.silu(x), lambda m, g, at: aten.silu_backward(g, at.x)),
    nn.ELU: (
        lambda m, x: functional.elu(x, m.alpha),
        lambda m, g, at: aten.elu_backward(g, m.alpha, 1.0, 1.0, False, at.x),
    ),
    nn.Softplus: (
        lambda m, x: functional.softplus(x, m.beta, m.threshold),
        lambda m, g, at: aten.softplus_backward(g, at.x, m.beta, m.threshold),
    ),
}

_KINKED = (nn.LeakyReLU, nn.ReLU6, nn.Hardtanh, nn.ELU)


@closed_form(*_ACTIVATIONS)
class ActivationRule(Rule):
    """``y = s(x)`` elementwise, ``grad * s'(x)``."""

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        value, _ = _ACTIVATIONS[type(self.module)]
        return value(self.module, x), None

    def change(self, difference: Tensor, base: Point, here: Point) -> Tensor:
        # Where the two meet, both are exact to rounding: the slope's error is of second order.
        root = torch.finfo(difference.dtype).eps ** 0.5
        small, along = difference.abs() < root, self.input_gradient(difference, base)
        if type(self.module) in _KINKED:  # where a kink lies between the two, the slope says nothing
            small &= (self.input_gradient(difference, here) - along).abs() <= 4 * root * difference.abs()
        return selected(small, along, here.y - base.y)

    def input_gradient(self, grad: Tensor, at: Point) -> Tensor:
        _, slope = _ACTIVATIONS[type(self.module)]
        return slope(self.module, grad, at)


@closed_form(nn.ReLU)
class ReLURule(ActivationRule):
    """The most common activation, with a change in closed form and without needless memory."""

    def change(self, difference: Tensor, base: Point, here: Point) -> Tensor:
        # max(x + d, 0) - max(x, 0); written so that d keeps its digits where x > 0, and at most one term counts
        below = -base.x
        change = torch.maximum(difference, below)
        return change.sub_(below.clamp_min_(0))

    def last_change(self, difference: Tensor, base: Point, here: Point) -> Tensor:
        # The same, as max(d + min(x, 0), -max(x, 0)); what is subtracted to get it gives the output, too.
        change = base.x.clamp_max(0)
        before = torch.sub(change, base.x, out=base.x)  # -max(x, 0), without rounding
        torch.maximum(change.add_(difference), before, out=change)
        here.spent(torch.sub(change, before, out=before))
        return change

    def last_input_gradient(self, grad: Tensor, at: Point) -> Tensor:
        gradient: Tensor = aten.threshold_backward.grad_input(grad, at.x, 0, grad_input=grad)
        return gradient
