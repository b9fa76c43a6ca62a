"""What a code solver is given (one code's problem) and what it must do (move the code)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_altmin.engines import BatchState, CouplingGradient, StageMap
from lightning_altmin.losses import LocalLoss, LossAt
from lightning_altmin.margins import MarginLoss
from lightning_altmin.nn.staircase import Staircase
from lightning_altmin.objective import AltMinObjective
from lightning_altmin.stage import Stage


@dataclass
class CodeProblem:
    """The problem of one code c_l, all other codes held: the terms of the objective in which it appears.

    The unknown is the code's *move* ``c_l - c_l_forward``, and not ``c_l``: moves get smaller on the way down, and a
    small difference of two stored codes would be rounding noise.

    Attributes:
        objective: Constants and reductions.
        above: The stage that reads this code.
        state: What encode fixed in that stage for this batch.
        forward: c_l at its forward value, where the problem starts and to which it is anchored; shape
            ``(batch, *code)``.
        forward_output: ``above`` at ``forward``, known from encode; NaN where it was freed, for nothing uses it.
        target_move: Move of the code above, or ``None`` for the top code, whose stage above is judged by the loss.
        loss: The network's loss at its forward output, with the batch's targets.
        level: Index of the code, counted from 0 at the bottom.
        measures: Whether the solver may measure in this batch, as its `CodeSolver.measures` said.
        signal: The share of a plain step of rate 1 that reached this code from above, if the solver's steps vary. The
            l1 term is scaled by it, to keep its weight against a signal that has become smaller.
        rate: Set by a solver whose step lengths vary from batch to batch: the share of a plain step of rate 1 that it
            took, a scalar. The weight step divides by these shares; see `WeightProblem.signal`.
        steps: Set by a solver that stops by itself: how many steps a sample took, averaged over the batch, a scalar.
        target_margins: How the code above is judged where its solver has said so: it takes the place of the squared
            distance to the moved code.
        margins: Set by a solver whose code is to be judged in this way, by its layer's weight step and by the code
            below.
    """

    objective: AltMinObjective
    above: Stage
    state: BatchState
    forward: Tensor
    forward_output: Tensor
    target_move: Tensor | None
    loss: LossAt
    level: int
    measures: bool
    signal: Tensor | None = None
    rate: Tensor | None = None
    steps: Tensor | None = None
    target_margins: MarginLoss | None = None
    margins: MarginLoss | None = None
    _coupling: CouplingGradient | None = field(default=None, repr=False)

    @property
    def is_top(self) -> bool:
        """Whether the stage above is the output stage, judged by the loss."""
        return self.target_move is None

    @property
    def target(self) -> Tensor:
        """The moved code above, shaped like ``forward_output``; the top code has none.

        Raises:
            ValueError: If this is the top code's problem.
        """
        if self.target_move is None:
            raise ValueError("the top code has no target: the stage above it is judged by the loss")
        return self.forward_output + self.target_move

    def expect(self, gradients: int, any_order: bool = False) -> None:
        """Say how many gradients will be asked for: from some number on, some stages have a cheaper way to them.

        Args:
            gradients: Their number.
            any_order: The solver treats all entries of a sample alike, asks for nothing but gradients (where the
                problem does not measure), and returns its move by `restored`: then gradients and moves may be in
                another order than the code's, samples first.
        """
        squares = self.target_margins is None and self.objective.couples_by_squares
        if gradients > 1 and self.target_move is not None and squares:
            any_order = any_order and not self.measures and self.objective.treats_entries_alike
            self._coupling = self.above.repeated_coupling(
                self.forward, self.state, self.target_move, gradients, any_order
            )

    def restored(self, move: Tensor) -> Tensor:
        """A move that was made of gradients, in the order of the code."""
        return move if self._coupling is None else self._coupling.restored(move)

    def gradient(self, move: Tensor | None = None) -> Tensor:
        """Gradient of ``J / mu``, summed over samples, at ``forward + move``; without a move it costs no forward."""
        gradient = self.smooth_gradient(move)
        if self.objective.lambda_c > 0:
            sparsity = self.objective.code_sparsity_gradient(self._code(move))
            gradient = gradient.add_(sparsity if self.signal is None else sparsity * self.signal)
        return gradient

    def smooth_gradient(self, move: Tensor | None = None) -> Tensor:
        """`gradient` without the l1 term, for solvers that treat that term exactly."""
        if self._coupling is not None:
            gradient = self._coupling(move)
        else:
            stage = self.above.fixed(self.forward, self.state, move)
            gradient = stage.input_gradient(self._gradient_above(stage, move))
        anchor = None if move is None else self.objective.code_anchor_gradient(move)
        if anchor is not None:
            gradient = gradient.add_(anchor)
        return gradient

    def curvature(self, direction: Tensor, move: Tensor | None = None) -> Tensor:
        """``<d, H d>`` per sample along ``d = direction``, ``H`` the Hessian of ``J / mu``; shape ``(batch,)``.

        By a secant between ``c = forward + move`` and ``c - d``: with ``o`` the output above,
        ``<o - o', G(o) - G(o')>`` plus the anchor's share. Costs one forward pass; exact for a linear stage and a
        quadratic loss. The l1 term has no curvature.
        """
        change = None if move is None else self._change(move)
        stepped = self._change(-direction if move is None else move - direction)
        bend = self._output_gradient(change) - self._output_gradient(stepped)
        curvature = ((-stepped if change is None else change - stepped) * bend).flatten(1).sum(1)
        anchor = self.objective.code_anchor_gradient(direction)
        return curvature if anchor is None else curvature + (anchor * direction).flatten(1).sum(1)

    def value(self, move: Tensor | None = None) -> Tensor:
        """Value of this problem at ``forward + move`` (the terms of ``J`` that contain the code), a scalar."""
        move = torch.zeros_like(self.forward) if move is None else move
        code = self.forward + move
        output = self.above.fixed(code, self.state).output()
        if self.target_move is None:
            value = self.objective.code_loss_value(self.loss.elsewhere(output))
        elif self.target_margins is not None:
            value = self.target_margins.values(output).sum()
        else:
            value = self.objective.code_coupling_value(output - self.target)
        value = value + self.objective.code_anchor_value(move)
        return value + self.objective.code_sparsity_value(code)

    def _code(self, move: Tensor | None) -> Tensor:
        return self.forward if move is None else self.forward + move

    def _change(self, move: Tensor) -> Tensor:
        """How far the output above is from ``forward_output``."""
        return self.above.fixed(self.forward, self.state, move).change(self.forward_output)

    def _gradient_above(self, stage: StageMap, move: Tensor | None) -> Tensor:
        """With respect to the output above, ``stage`` being there."""
        if move is None or self.target_move is None:
            return self._output_gradient(None if move is None else stage.change(self.forward_output))
        return self.objective.code_coupling_gradient(stage.residual(self.forward_output, self.target_move))

    def _output_gradient(self, change: Tensor | None) -> Tensor:
        """With respect to the output above, ``forward_output + change``."""
        if self.target_move is None:
            loss = self.loss if change is None else self.loss.elsewhere(self.forward_output + change)
            return self.objective.code_loss_gradient(loss)
        if self.target_margins is not None:
            output = self.forward_output if change is None else self.forward_output + change
            return self.target_margins.gradient(output) / self.objective.mu
        residual = -self.target_move if change is None else change - self.target_move
        return self.objective.code_coupling_gradient(residual)


class CodeSolver(nn.Module, ABC):
    """Moves one code to lower its problem. Subclass and write `solve`; the sweep over codes is the algorithm's.

    Attributes:
        reads_outputs: Whether `solve` asks a hidden code's problem for ``forward_output``, ``target`` or ``value``. A
            solver that only wants gradients and curvatures says no, and the codes above are freed before it is asked.
    """

    reads_outputs: bool = True

    def check(self, stages: Sequence[Stage], objective: AltMinObjective) -> None:
        """Called once with what it will be asked to solve; a solver that cannot do it refuses here.

        Here: activations whose derivative is zero, from which a solver that goes by gradients learns nothing.

        Raises:
            ValueError: If a stage or a term of the objective cannot be served, naming it.
        """
        for stage in stages:
            for module in stage.modules:
                if isinstance(module, Staircase):
                    raise ValueError(
                        f"codes={type(self).__name__} goes by derivatives, and that of {type(module).__name__} (stage "
                        f"{stage.name!r}) is zero: nothing below it would be trained. Use codes=DiscreteCodes()"
                    )

    def check_loss(self, loss: LocalLoss) -> None:
        """Called once with the loss; a solver that needs more of it than gradients refuses here.

        Raises:
            ValueError: If the loss cannot give it.
        """
        return

    def prepare(self, depth: int) -> None:
        """Called once with the number of codes; a solver that keeps something per code makes its buffers here."""
        return

    def measures(self, batch: int) -> bool:
        """Whether the solver wants to measure something in this batch, counted from 0 since training began."""
        return False

    def measured(self) -> Sequence[Tensor]:
        """What was measured in this batch as sums over its samples, for several processes to add up.

        Asked after the codes have moved, in batches for which `measures` is true; `learn` is then given the sums over
        all samples.
        """
        return []

    def learn(self, sums: Sequence[Tensor]) -> None:
        """Take over what `measured` returned, summed over the samples of all processes that share the batch."""
        return

    @abstractmethod
    def solve(self, problem: CodeProblem) -> Tensor:
        """Return the code's move, ``c_l - problem.forward``; the problem's tensors must not be changed in place.

        The move may be overwritten afterwards, if `reads_outputs` is false.
        """
