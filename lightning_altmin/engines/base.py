"""What an engine is: one stage of the network and its local derivatives, with no chain through the other stages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_altmin.engines.shared_samples import SharedSamples

BatchState = Any
"""What one batch fixes in a stage (BatchNorm statistics, dropout masks); opaque outside the engine that made it."""

Gradients = list[tuple[nn.Parameter, Tensor]]
"""Trainable parameters of one stage, each with the gradient of that stage's own local problem."""


class StageMap(ABC):
    """One stage at one input; its value and its two local derivatives are computed on demand.

    An engine computes only what is asked for: a caller that already knows the output (the encode phase computed it)
    does not pay for it a second time.
    """

    @abstractmethod
    def output(self) -> Tensor:
        """Output of the stage, shape ``(batch, *features_out)``."""

    def change(self, base_output: Tensor) -> Tensor:
        """``output() - base_output``, for a map at ``x + move`` of a stage whose output at ``x`` is ``base_output``.

        An engine that knows its layers passes the move through them, which keeps its digits where two outputs that are
        nearly equal would lose them. It does not look at ``base_output`` if its ``reads_base_output`` is false.
        """
        return self.output() - base_output

    def residual(self, base_output: Tensor, target_move: Tensor, spend: bool = False) -> Tensor:
        """``output() - (base_output + target_move)``, by `change`: a new tensor, which the caller may overwrite.

        Args:
            base_output: Output at ``x``.
            target_move: How far the output was to move.
            spend: Whether ``x`` and ``target_move`` may be overwritten: nothing but this map will read them.
        """
        return self.change(base_output) - target_move

    @abstractmethod
    def layer_input(self, layer: nn.Module) -> Tensor:
        """What one of the stage's own modules is given, for a solver that keeps statistics of it."""

    @abstractmethod
    def input_gradient(self, grad_output: Tensor) -> Tensor:
        """Vector-Jacobian product with respect to the stage's input: a new tensor, which the caller may overwrite."""

    @abstractmethod
    def parameter_gradients(self, grad_output: Tensor) -> Gradients:
        """Vector-Jacobian products with respect to the stage's trainable parameters."""


class CouplingGradient(ABC):
    """Gradient of ``1/2 ||f(c) - f(c_forward) - t||^2`` with respect to a stage's input, asked for many times.

    Moves and gradients may have their entries in an order of the coupling's own, the batch first: then `restored`
    differs.
    """

    @abstractmethod
    def __call__(self, move: Tensor | None) -> Tensor:
        """At ``c = c_forward + move``; ``None`` is no move. A new tensor, which the caller may overwrite."""

    def restored(self, move: Tensor) -> Tensor:
        """A move in the order of the code."""
        return move


class StageEngine(ABC):
    """Evaluates one stage in the three phases of a batch.

    ``encode`` runs first and alone touches running statistics and the random state. ``fixed`` is the stage as the
    code step sees it: everything that depends on the batch is held at what encode found, so a BatchNorm is a fixed
    affine map and a dropout mask does not change. ``live`` is the stage as the weight step sees it: BatchNorm
    recomputes its batch statistics and is differentiated through them, running statistics stay untouched.
    """

    kind: ClassVar[str]
    reads_base_output: ClassVar[bool] = True
    """Whether `StageMap.change` and `StageMap.residual` look at the output that they are given."""

    @abstractmethod
    def encode(self, x: Tensor) -> tuple[Tensor, BatchState]:
        """Training-time forward pass of the stage, without a graph."""

    def joined(self, states: Sequence[BatchState]) -> BatchState:
        """The state of a batch that was encoded in parts, from theirs in order.

        Raises:
            ValueError: If a state of parts does not make one of the whole.
        """
        if len(states) == 1:
            return states[0]
        raise ValueError(f"{type(self).__name__} does not define joined, so that a batch cannot be encoded in parts")

    def share(self, samples: SharedSamples | None) -> None:
        """Take the batch statistics of BatchNorms over the samples of several processes from now on.

        Args:
            samples: Who has them; ``None`` for this process alone. Given to stages with a BatchNorm only.

        Raises:
            ValueError: If the engine cannot do it.
        """
        if samples is not None:
            raise ValueError(f"{type(self).__name__} does not define share, so that BatchNorms cannot be synchronised")

    def suit_compiler(self) -> None:  # noqa: B027  (most have nothing to suit)
        """Be a part of a compiled function from now on."""

    @abstractmethod
    def fixed(self, x: Tensor, state: BatchState, move: Tensor | None = None) -> StageMap:
        """The stage at ``x``, or at ``x + move``, with the batch's state held fixed (code step)."""

    def repeated_coupling(
        self, base: Tensor, state: BatchState, target_move: Tensor, gradients: int, any_order: bool = False
    ) -> CouplingGradient | None:
        """A cheaper way to this many gradients of the coupling around ``base``, the state fixed; ``None`` if none.

        With ``any_order`` it may be one that has an order of entries of its own.
        """
        return None

    @abstractmethod
    def live(self, x: Tensor, state: BatchState, move: Tensor | None = None) -> StageMap:
        """The stage at ``x``, or at ``x + move``, with batch statistics recomputed (weight step)."""
