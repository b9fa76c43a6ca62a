"""The elementwise half of a least-squares code step: the move that makes an activation change as asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Value = Callable[[Any, Tensor], Tensor]
Derivative = Callable[[Any, Tensor, Tensor], Tensor]

_CELLS = 16  # of the bracket, among which the one with the lowest value is chosen
_STEPS = 8  # of a safeguarded Newton method inside it

# type -> (s(x); s' given x and s; s'' given s and s'; the largest slope). The bracket relies on rising everywhere.
_RISING: dict[type[nn.Module], tuple[Value, Derivative, Derivative, float]] = {
    nn.Sigmoid: (lambda m, x: torch.sigmoid(x), lambda m, x, y: y * (1 - y), lambda m, y, d: d * (1 - 2 * y), 0.25),
    nn.Tanh: (lambda m, x: torch.tanh(x), lambda m, x, y: 1 - y * y, lambda m, y, d: -2 * y * d, 1.0),
    nn.Softplus: (
        lambda m, x: functional.softplus(x, m.beta, m.threshold),
        lambda m, x, y: torch.sigmoid(m.beta * x),
        lambda m, y, d: m.beta * d * (1 - d),
        1.0,
    ),
}
INVERTIBLE: tuple[type[nn.Module], ...] = (nn.Identity, nn.ReLU, nn.LeakyReLU, *_RISING)
"""Types of activations that `activation_move` knows."""


def is_invertible(activation: nn.Module) -> bool:
    """Whether `activation_move` can invert this activation; a LeakyReLU that falls below 0 it cannot."""
    return type(activation) in INVERTIBLE and getattr(activation, "negative_slope", 0.0) >= 0


def activation_move(activation: nn.Module, code: Tensor, change: Tensor, weight: float) -> Tensor:
    r"""The move ``m`` that minimises ``(s(c + m) - s(c) - change)^2 + weight m^2``, for each unit by itself.

    Args:
        activation: ``s``, one that `is_invertible`.
        code: ``c``, any shape.
        change: How far ``s(c)`` is asked to move, shaped like ``code``.
        weight: Price of a move, > 0.

    Returns:
        The move, shaped like ``code``.
    """
    if type(activation) is nn.Identity:
        return change / (1 + weight)
    if type(activation) is nn.ReLU:
        return _two_slopes(code, change, weight, 0.0)
    if type(activation) is nn.LeakyReLU:
        return _two_slopes(code, change, weight, activation.negative_slope)
    return _rising(activation, code, change, weight)


def _two_slopes(code: Tensor, change: Tensor, weight: float, slope: float) -> Tensor:
    """For ``s(x) = x`` above 0 and ``slope * x`` below it.

    Three cases: the optimum lies inside the upper side, inside the lower side, or at 0, where both end. A side's
    parabola clamped to the side is its best; the better of the two sides is the answer.
    """
    here = torch.where(code > 0, code, code * slope)
    wanted = here + change
    # Where the code is on the side, here = steepness * code, and the move keeps the digits of the change.
    up = torch.where(code > 0, change, wanted - code) / (1 + weight)
    up = torch.maximum(up, -code)
    down = torch.where(code > 0, wanted - slope * code, change) * (slope / (slope * slope + weight))
    down = torch.minimum(down, -code)
    cost_up = (code + up - wanted).square() + weight * up.square()
    cost_down = (slope * (code + down) - wanted).square() + weight * down.square()
    return torch.where(cost_up <= cost_down, up, down)


def _rising(activation: nn.Module, code: Tensor, change: Tensor, weight: float) -> Tensor:
    """For smooth rising activations: the lowest cell of a bracket, then safeguarded Newton steps in it.

    The optimum has the sign of the change. Its cost is at most that of staying, ``change^2``, so its size is at most
    ``|change| / sqrt(weight)``; its derivative is zero, so also at most ``|change| max s' / weight``. The cost may have
    two minima in between (a code deep in the flat part of a sigmoid), so the bracket is sampled first, more finely
    towards 0, where most optima are. Two minima in one cell are possible only for weights well below 0.1.
    """
    value, slope, bend, steepest = _RISING[type(activation)]
    wanted = value(activation, code) + change
    span = change * min(weight**-0.5, steepest / weight)  # with its sign, as all moves below
    price = weight * span.square()
    best, lowest = torch.zeros_like(span), change.square()
    shares = [(cell / _CELLS) ** 2 for cell in range(_CELLS + 1)]
    for cell in range(1, _CELLS + 1):
        gap = value(activation, torch.add(code, span, alpha=shares[cell])).sub_(wanted)
        cost = gap.square_().add_(price, alpha=shares[cell] ** 2)
        best = torch.where(cost < lowest, float(cell), best)
        lowest = torch.minimum(cost, lowest)
    move = span * (best / _CELLS).square()
    inner = span * ((best - 1).clamp_min_(0) / _CELLS).square_()  # the ends of the cells on both sides
    outer = span * ((best + 1).clamp_max_(_CELLS) / _CELLS).square_()
    outwards = span.sign()
    for _ in range(_STEPS):
        x = code + move
        y = value(activation, x)
        first = slope(activation, x, y)
        excess = y - wanted
        gradient = excess * first + weight * move
        curvature = excess * bend(activation, y, first) + first.square() + weight
        beyond = gradient * outwards > 0
        outer, inner = torch.where(beyond, move, outer), torch.where(beyond, inner, move)
        newton = move - gradient / curvature
        inside = (newton - inner) * (newton - outer) <= 0
        move = torch.where(inside, newton, (inner + outer) / 2)
    return move
