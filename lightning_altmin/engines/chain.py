"""A stage as a chain of rules: its value, how far a move of its input changes it, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lightning_altmin.engines.base import CouplingGradient, Gradients, StageMap
from lightning_altmin.engines.rule import Point, Rule


class Chain(StageMap):
    """Rules one after the other at one input.

    Args:
        rules: The rules.
        x: Input of the first.
        states: What encode fixed in them for this batch.
    """

    def __init__(self, rules: Sequence[Rule], x: Tensor, states: Sequence[Any]) -> None:
        self._points: list[Point] = []
        self._move: Tensor | None = None
        below: Point | None = None
        for rule, state in zip(rules, states, strict=True):
            below = Point(rule, state, x if below is None else None, below)
            self._points.append(below)

    def moved(self, move: Tensor) -> Chain:
        """The same rules at ``x + move``; what is found here serves there, too."""
        chain = Chain([], move, [])
        chain._move = move
        below: Point | None = None
        for base in self._points:
            below = Point(base.rule, base.state, None, below, base, move if below is None else None)
            chain._points.append(below)
        return chain

    def output(self) -> Tensor:
        return self._points[-1].y

    def change(self, base_output: Tensor | None) -> Tensor:
        return self._changed(self._points, spend=False)

    def residual(self, base_output: Tensor | None, target_move: Tensor, spend: bool = False) -> Tensor:
        last = self._points[-1]
        difference = self._changed(self._points[:-1], spend)
        assert last.base is not None
        return last.rule.residual(difference, last.base, last, target_move, spend)

    def layer_input(self, layer: nn.Module) -> Tensor:
        return next(point.x for point in self._points if point.rule.module is layer)

    def input_gradient(self, grad_output: Tensor, own: bool = False) -> Tensor:
        """As the base class says; with ``own``, ``grad_output`` may be overwritten."""
        for point in reversed(self._points):
            rule = point.rule
            own = own and not grad_output.requires_grad  # a graph holds what it was made of
            grad_output = (rule.last_input_gradient if own else rule.input_gradient)(grad_output, point)
            own = own or rule.makes_gradients
        return grad_output

    def parameter_gradients(self, grad_output: Tensor) -> Gradients:
        trained = [point.rule.trained for point in self._points]
        if not any(trained):
            return []
        lowest = trained.index(True)  # nothing below the lowest trained layer needs a gradient
        gradients: Gradients = []
        for index in range(len(self._points) - 1, lowest - 1, -1):
            point = self._points[index]
            gradients += point.rule.parameter_gradients(grad_output, point)
            if index > lowest:
                grad_output = point.rule.input_gradient(grad_output, point)
        return gradients

    def _changed(self, points: Sequence[Point], spend: bool) -> Tensor:
        """How far the move changes the last output; ``spend``: what the first input was before may be overwritten."""
        difference = self._move
        assert difference is not None  # at x itself nothing has changed
        for index, here in enumerate(points):
            assert here.base is not None
            if spend and index == 0:
                if any(point.rule.reads_base for point in self._points[1:]):
                    _ = here.base.y  # which cannot be found afterwards
                difference = here.rule.last_change(difference, here.base, here)
            else:
                difference = here.rule.change(difference, here.base, here)
        return difference


class ChainCoupling(CouplingGradient):
    """Gradient of ``1/2 ||f(c) - f(c_forward) - t||^2`` with respect to ``c``, ``f`` a chain of rules.

    Args:
        rules: The rules.
        base: The forward code.
        states: What encode fixed in ``rules`` for this batch.
        target_move: ``t``.
    """

    def __init__(self, rules: Sequence[Rule], base: Tensor, states: Sequence[Any], target_move: Tensor) -> None:
        self._chain, self._target = Chain(rules, base, states), target_move

    def __call__(self, move: Tensor | None) -> Tensor:
        if move is None:
            return self._chain.input_gradient(self._target.neg(), own=True)
        there = self._chain.moved(move)
        return there.input_gradient(there.residual(None, self._target), own=True)
