"""A rule states one layer's derivatives; a point is a rule at one input; a chain is a stage of them."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_altmin.engines.base import CouplingGradient, Gradients
from lightning_altmin.engines.shared_samples import SharedSamples


class Rule(ABC):  # noqa: B024  (every method has a meaningful default or is overridden in pairs)
    """Closed-form derivatives of one module type. A new layer type is a new subclass, registered with ``@closed_form``.

    Args:
        module: The module whose mathematics the rule states. It is read at every call, so weights may change.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    def encode(self, x: Tensor) -> tuple[Tensor, Any]:
        """Training-time forward; returns the output and what this batch fixes (``None`` if nothing)."""
        return self.forward(x, None)[0], None

    def joined(self, states: Sequence[Any]) -> Any:
        """The state of a batch that was encoded in parts, from theirs in order.

        Raises:
            ValueError: If there are states, and the rule does not say how to join them.
        """
        if len(states) == 1 or all(state is None for state in states):
            return states[0]
        raise ValueError(
            f"{type(self).__name__} fixes something per batch and does not define joined(states), so that a batch "
            "cannot be encoded in parts: define it, or use micro_batches=1"
        )

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Output given the batch's state, and whatever the derivatives want to keep of the computation."""
        raise TypeError(f"{type(self).__name__} must define forward")

    def change(self, difference: Tensor, base: Point, here: Point) -> Tensor:
        """Output here minus output at ``base``, given that the inputs differ by ``difference``.

        To be overridden where it can be had from ``difference`` itself, however small that is beside the inputs.
        """
        return here.y - base.y

    def residual(self, difference: Tensor, base: Point, here: Point, target: Tensor, spend: bool) -> Tensor:
        """`change` minus ``target``, a new tensor; with ``spend`` it may be written over ``target``."""
        return self.change(difference, base, here) - target

    def last_change(self, difference: Tensor, base: Point, here: Point) -> Tensor:
        """`change` where ``base.x`` may be overwritten, for nothing else will read it, and of ``here`` only ``y``."""
        return self.change(difference, base, here)

    def input_gradient(self, grad: Tensor, at: Point) -> Tensor:
        """Vector-Jacobian product with respect to the input."""
        raise TypeError(f"{type(self).__name__} must define input_gradient")

    def last_input_gradient(self, grad: Tensor, at: Point) -> Tensor:
        """`input_gradient` where ``grad`` may be overwritten, for nothing else will read it."""
        return self.input_gradient(grad, at)

    reads_base: ClassVar[bool] = True
    """Whether `change` looks at ``base``."""
    makes_gradients: ClassVar[bool] = False
    """Whether `input_gradient` returns memory of its own, neither ``grad`` nor a view of it."""

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

    def compiled(self) -> Rule:
        """The rule to use in a compiled function; differs from this one only where the compiler does better with it."""
        return self

    def coupling(
        self, base: Tensor, state: Any, above: Callable[[Tensor], CouplingGradient]
    ) -> CouplingGradient | None:
        """A better coupling of a stage that begins with this rule than a chain's; ``None`` if there is none.

        Args:
            base: The stage's input.
            state: What encode fixed in this rule.
            above: The coupling of the rules that follow, given their input.
        """
        return None

    def shared(self, samples: SharedSamples | None) -> Rule:
        """The rule where other processes have the rest of a batch; ``None``: this process has all of it.

        Differs from this one only where a sample's output depends on the others'.
        """
        return self


class Point:
    """One rule at one input. Values are computed when first asked for, and kept for the life of the stage's map.

    The laziness is where the engine saves work: ``g W`` needs no forward pass of a Linear, ``g * relu'(c)`` needs
    no output, so the first code iteration costs one matrix product and not two.

    Attributes:
        base: The same rule where it was moved from, if this is a point of a moved chain.
    """

    __slots__ = ("_below", "_evaluated", "_move", "_saved", "_x", "_y", "base", "rule", "state")

    def __init__(
        self,
        rule: Rule,
        state: Any,
        x: Tensor | None,
        below: Point | None,
        base: Point | None = None,
        move: Tensor | None = None,
    ) -> None:
        self.rule = rule
        self.state = state
        self.base = base
        self._x = x
        self._below = below
        self._move = move
        self._y: Tensor | None = None
        self._saved: Any = None
        self._evaluated = False

    @property
    def x(self) -> Tensor:
        """Input of the rule."""
        if self._x is None:
            if self._below is not None:
                self._x = self._below.y
            else:
                assert self.base is not None  # else it was spent
                assert self._move is not None
                self._x = self.base.x + self._move
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
        if self._saved is None:
            self._evaluate()
        return self._saved

    def knows(self, x: Tensor, saved: Any) -> None:
        """Take ``x`` and ``saved`` from a rule that has found them without ``y`` and the points below."""
        self._x, self._saved = x, saved

    def found(self, y: Tensor, saved: Any = None) -> None:
        """Take ``y`` and ``saved`` from a rule that has found them without `Rule.forward`."""
        self._y, self._saved, self._evaluated = y, saved, True

    def spent(self, y: Tensor) -> None:
        """Let go of everything but the output, once what the input was before it moved has been overwritten."""
        if self.base is not None:
            self.base._x = self.base.state = None
        self._x = self._move = self.base = self._below = self.state = None
        self.found(y)

    def _evaluate(self) -> None:
        if not self._evaluated:
            self._y, self._saved = self.rule.forward(self.x, self.state)
            self._evaluated = True


def selected(mask: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    """``torch.where(mask, chosen, other)`` of finite tensors, several times faster on a CPU.

    Each entry is a product with 1 plus a product with 0, so it is the chosen one to the last digit.
    """
    return (chosen * mask).add_(other * ~mask)


def product(linear_map: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A linear map of moves or gradients, in the precision of ``x``.

    Under float16 autocast ``x`` is scaled to a largest entry of 1 before the map and back after it: moves and gradients
    are often smaller than anything float16 holds. bfloat16 has the range of single precision and needs no scaling.
    """
    device = x.device.type
    if not (torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16):
        return linear_map(x).to(x.dtype)
    size = x.abs().amax().clamp_min(torch.finfo(x.dtype).tiny)
    return linear_map(x / size).to(x.dtype) * size
