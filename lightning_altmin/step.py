"""What one mini-batch carries through the three phases."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_altmin.engines import BatchState, Gradients
from lightning_altmin.guard import Buffers
from lightning_altmin.losses import LossAt
from lightning_altmin.margins import MarginLoss


@dataclass
class Step:
    """What one mini-batch carries through the three phases; also the result of ``AltMin.step``.

    Attributes:
        x: Inputs, shape ``(batch, *features)``.
        y: Targets.
        output: The network's output before the update, shape ``(batch, *output)``.
        loss: The loss at ``output``, a scalar (not yet looked at: no device sync).
        codes_forward: Forward codes, one tensor ``(batch, *code)`` per hidden stage.
        moves: How far the code step moved each code, shaped like the codes.
        residuals: Per hidden stage ``||f_l(input) - c_l||^2``, batch mean, before the weights moved;
            empty where codes are not kept.
        code_steps: Per code, how many steps a sample took on average, a scalar; ``None`` where the code solver's
            number is fixed.
        number: Number of the batch, counted from 0 since training began.

    What one phase leaves to the next:

    Attributes:
        loss_at: The loss at ``output``.
        signals: Per code, the share of a plain step of rate 1 that reached it, a scalar; see ``CodeProblem.signal``.
        margins: Per code, how it is judged where a staircase reads it.
        states: What each stage's engine keeps of the forward pass.
        read_changes: Of the codes that a recurrent network's output layer reads: a move, and how far it has changed
            the output.
        given: The targets as they came; ``y`` differs from them where labels could not be read.
        keeps: Whether codes and moves are kept for the caller.
        measures: Whether the code solver measures something in this batch.
        buffers: The network's buffers as they were before encode, to be put back if the batch is bad.
        solved: Gradients and verdict, where a compiled function has computed all phases at once.
    """

    x: Tensor
    y: Any
    output: Tensor
    loss: Tensor
    codes_forward: list[Tensor]
    moves: list[Tensor]
    loss_at: LossAt = field(repr=False)
    residuals: list[Tensor] = field(default_factory=list)
    code_steps: list[Tensor | None] = field(default_factory=list)
    number: int = 0
    signals: list[Tensor | None] = field(default_factory=list, repr=False)
    margins: list[MarginLoss | None] = field(default_factory=list, repr=False)
    states: list[BatchState] = field(default_factory=list, repr=False)
    read_changes: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    given: Any = field(default=None, repr=False)
    keeps: bool = field(default=True, repr=False)
    measures: bool = field(default=False, repr=False)
    buffers: Buffers | None = field(default=None, repr=False)
    solved: tuple[Gradients, Tensor] | None = field(default=None, repr=False)

    @property
    def codes(self) -> list[Tensor]:
        """The moved codes, ``codes_forward + moves``."""
        return [forward + move for forward, move in zip(self.codes_forward, self.moves, strict=True)]

    def undone_on_error(self) -> AbstractContextManager[None]:
        """Put back the buffers that encode moved if a later phase fails."""
        return nullcontext() if self.buffers is None else self.buffers.restored_on_error()
