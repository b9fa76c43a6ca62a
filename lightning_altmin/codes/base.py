"""What a code solver is given (one code's problem) and what it must do (move the code)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_altmin.engines import BatchState
from lightning_altmin.losses import LocalLoss
from lightning_altmin.network import Stage
from lightning_altmin.objective import AltMinObjective


@dataclass
class CodeProblem:
    """The problem of one code c_l, all other codes held: the terms of the objective in which it appears.

    Attributes:
        objective: Constants and reductions.
        above: The stage that reads this code.
        state: What encode fixed in that stage for this batch.
        forward: c_l at its forward value, where the problem starts and to which it is anchored; shape
            ``(batch, *code)``.
        forward_output: ``above`` at ``forward``, known from encode.
        target: The moved code above, or ``None`` for the top code, whose stage above is judged by the loss.
        loss: The network's loss.
        y: Targets of the batch.
    """

    objective: AltMinObjective
    above: Stage
    state: BatchState
    forward: Tensor
    forward_output: Tensor
    target: Tensor | None
    loss: LocalLoss
    y: Any

    def gradient(self, code: Tensor) -> Tensor:
        """Gradient of ``J / mu`` summed over samples, at ``code``. Costs no forward pass at ``self.forward``."""
        stage = self.above.fixed(code, self.state)
        at_start = code is self.forward
        output = self.forward_output if at_start else stage.output()
        gradient = stage.input_gradient(self._output_gradient(output))
        anchor = None if at_start else self.objective.code_anchor_gradient(code - self.forward)
        if anchor is not None:
            gradient = gradient + anchor
        if self.objective.lambda_c > 0:
            gradient = gradient + self.objective.code_sparsity_gradient(code)
        return gradient

    def curvature(self, code: Tensor, direction: Tensor) -> Tensor:
        """``<d, H d>`` per sample along ``d = direction``, ``H`` the Hessian of ``J / mu``; shape ``(batch,)``.

        By a secant between ``code`` and ``code - d``: with ``o`` the output above, ``<o - o', G(o) - G(o')>`` plus
        the anchor's share. Costs one forward pass; exact for a linear stage and a quadratic loss. The l1 term has no
        curvature.
        """
        output = self.forward_output if code is self.forward else self.above.fixed(code, self.state).output()
        stepped = self.above.fixed(code - direction, self.state).output()
        bend = self._output_gradient(output) - self._output_gradient(stepped)
        curvature = ((output - stepped) * bend).flatten(1).sum(1)
        anchor = self.objective.code_anchor_gradient(direction)
        return curvature if anchor is None else curvature + (anchor * direction).flatten(1).sum(1)

    def value(self, code: Tensor) -> Tensor:
        """Value of this problem at ``code`` (the terms of ``J`` that contain it), a scalar."""
        output = self.forward_output if code is self.forward else self.above.fixed(code, self.state).output()
        if self.target is None:
            value = self.objective.code_loss_value(self.loss, output, self.y)
        else:
            value = self.objective.code_coupling_value(output - self.target)
        value = value + self.objective.code_anchor_value(code - self.forward)
        return value + self.objective.code_sparsity_value(code)

    def _output_gradient(self, output: Tensor) -> Tensor:
        if self.target is None:
            return self.objective.code_loss_gradient(self.loss, output, self.y)
        return self.objective.code_coupling_gradient(output - self.target)


class CodeSolver(nn.Module, ABC):
    """Moves one code to lower its problem. Subclass and write `solve`; the sweep over codes is the algorithm's."""

    @abstractmethod
    def solve(self, problem: CodeProblem) -> Tensor:
        """Return the moved code, shaped like ``problem.forward``, which must not be changed in place."""
