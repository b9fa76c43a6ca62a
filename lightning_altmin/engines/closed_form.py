"""The closed-form engine: a stage as a chain of layers whose derivatives are written down, with no autograd graph."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from lightning_altmin.engines.base import BatchState, Gradients, StageEngine, StageMap


class Rule(ABC):  # noqa: B024  (every method has a meaningful default or is overridden in pairs)
    """Closed-form derivatives of one module type. A new layer type is a new subclass, registered with `closed_form`.

    Args:
        module: The module whose mathematics the rule states. It is read at every call, so weights may change.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    def encode(self, x: Tensor) -> tuple[Tensor, Any]:
        """Training-time forward; returns the output and what this batch fixes (``None`` if nothing)."""
        return self.forward(x, None)[0], None

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Output given the batch's state, and whatever the derivatives want to keep of the computation."""
        raise TypeError(f"{type(self).__name__} must define forward")

    def change(self, difference: Tensor, base: Point, here: Point) -> Tensor:
        """Output here minus output at ``base``, given that the inputs differ by ``difference``.

        To be overridden where it can be had from ``difference`` itself, however small that is beside the inputs.
        """
        return here.y - base.y

    def input_gradient(self, grad: Tensor, at: Point) -> Tensor:
        """Vector-Jacobian product with respect to the input."""
        raise TypeError(f"{type(self).__name__} must define input_gradient")

    def parameter_gradients(self, grad: Tensor, at: Point) -> Gradients:
        """Vector-Jacobian products with respect to the module's trainable parameters."""
        return []

    @property
    def trained(self) -> bool:
        """Whether the module, a leaf, has a parameter to be trained; asked anew, for freezing may come and go."""
        return any(p is not None and p.requires_grad for p in self.module._parameters.values())

    def live(self) -> Rule:
        """The rule to use in the weight step; differs from this one only where batch statistics are recomputed."""
        return self


class Point:
    """One rule at one input. Values are computed when first asked for, and kept for the life of the stage's map.

    The laziness is where the engine saves work: ``g W`` needs no forward pass of a Linear, ``g * relu'(c)`` needs
    no output, so the first code iteration costs one matrix product and not two.
    """

    __slots__ = ("_below", "_evaluated", "_saved", "_x", "_y", "rule", "state")

    def __init__(self, rule: Rule, state: Any, x: Tensor | None, below: Point | None) -> None:
        self.rule = rule
        self.state = state
        self._x = x
        self._below = below
        self._y: Tensor | None = None
        self._saved: Any = None
        self._evaluated = False

    @property
    def x(self) -> Tensor:
        """Input of the rule."""
        if self._x is None:
            assert self._below is not None
            self._x = self._below.y
        return self._x

    @property
    def y(self) -> Tensor:
        """Output of the rule."""
        self._evaluate()
        assert self._y is not None
        return self._y

    @property
    def saved(self) -> Any:
        """What the rule's forward kept for its derivatives (pooling indices, normalised inputs)."""
        self._evaluate()
        return self._saved

    def _evaluate(self) -> None:
        if not self._evaluated:
            self._y, self._saved = self.rule.forward(self.x, self.state)
            self._evaluated = True


class ClosedFormMap(StageMap):
    """A chain of rules at one input."""

    def __init__(self, rules: Sequence[Rule], x: Tensor, states: Sequence[Any]) -> None:
        self._points = _chain(rules, x, states)

    def output(self) -> Tensor:
        return self._points[-1].y

    def change(self, base: Tensor, base_output: Tensor, move: Tensor) -> Tensor:
        below = _chain([p.rule for p in self._points], base, [p.state for p in self._points])
        for there, here in zip(below, self._points, strict=True):
            move = here.rule.change(move, there, here)
        return move

    def input_gradient(self, grad_output: Tensor) -> Tensor:
        for point in reversed(self._points):
            grad_output = point.rule.input_gradient(grad_output, point)
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


def _chain(rules: Sequence[Rule], x: Tensor, states: Sequence[Any]) -> list[Point]:
    points: list[Point] = []
    below: Point | None = None
    for rule, state in zip(rules, states, strict=True):
        below = Point(rule, state, x if below is None else None, below)
        points.append(below)
    return points


class ClosedFormEngine(StageEngine):
    """Evaluates a stage by the rules of its layers. Exact: it agrees with autograd to rounding."""

    kind: ClassVar[str] = "closed_form"

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._fixed = [_RULES[type(m)](m) for m in pooled_first(modules)]
        self._live = [rule.live() for rule in self._fixed]

    @torch.no_grad()
    def encode(self, x: Tensor) -> tuple[Tensor, BatchState]:
        states = []
        for rule in self._fixed:
            x, state = rule.encode(x)
            states.append(state)
        return x, states

    def fixed(self, x: Tensor, state: BatchState) -> StageMap:
        return ClosedFormMap(self._fixed, x, state)

    def live(self, x: Tensor, state: BatchState) -> StageMap:
        return ClosedFormMap(self._live, x, state)


def pooled_first(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """The same function with max-pooling before a directly preceding activation that never falls.

    The largest of s(x) is s of the largest x, at the same place, so nothing changes but the cost: the activation and
    its derivative then see only what the pooling leaves.
    """
    ordered = list(modules)
    for index in range(1, len(ordered)):
        never_falls = type(ordered[index - 1]) in (nn.ReLU, nn.Tanh, nn.Sigmoid)
        if type(ordered[index]) is nn.MaxPool2d and never_falls:
            ordered[index - 1 : index + 1] = ordered[index], ordered[index - 1]
    return ordered


_RULES: dict[type[nn.Module], Callable[[nn.Module], Rule]] = {}
_CONDITIONS: dict[type[nn.Module], Callable[[Any], bool]] = {}
_R = TypeVar("_R", bound=Callable[[Any], Rule])


def closed_form(*types: type[nn.Module], when: Callable[[Any], bool] | None = None) -> Callable[[_R], _R]:
    """Decorator of a `Rule`, or of a function that makes one: serve modules of exactly these types by it.

    Args:
        types: Module types. Subclasses are not included, for they may compute something else.
        when: Optional condition on the module (padding mode, options the rule does not cover).
    """

    def register(rule: _R) -> _R:
        for module_type in types:
            _RULES[module_type] = rule
            if when is not None:
                _CONDITIONS[module_type] = when
        return rule

    return register


def has_closed_form(module: nn.Module) -> bool:
    """Whether a rule covers this module as it stands: its type, its options, and no hooks that change its result."""
    if type(module) not in _RULES or module._forward_hooks or module._forward_pre_hooks:
        return False
    condition = _CONDITIONS.get(type(module))
    return condition is None or condition(module)
