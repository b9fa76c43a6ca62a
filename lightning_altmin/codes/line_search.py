"""Gradient steps on each code with the exact step length for every sample."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_altmin.arguments import check_count, check_number
from lightning_altmin.codes.base import CodeProblem, CodeSolver


class LineSearchCodes(CodeSolver):
    r"""Steepest descent on a code, each sample with the step that minimises its own problem along the gradient.

    .. math::
        c \leftarrow c - \alpha g, \qquad \alpha = \frac{\langle g, g\rangle}{\langle g, H g\rangle}

    with ``g`` the gradient of ``J / mu`` and ``H g`` from a secant (`CodeProblem.curvature`): exact where the problem
    is quadratic along the step (a hidden code below a linear, convolutional or ReLU stage that keeps its signs).
    The anchor makes ``H >= 1``, so ``alpha <= 1``: where the layer above shrinks what it is given, the step is
    nearly 1 and the signal keeps its size on the way down; where it amplifies, a rate of 1 would overshoot its own
    optimum and send the layer below the wrong way, and the step is shorter.

    Args:
        steps: Number of steps, >= 1. Each costs one forward pass of the stage above more than a fixed rate.
        relaxation: Share of the exact step that is taken, in (0, 1]. Smaller shares keep the moved inputs of the
            weight step closer to the forward ones, and with them the update closer to backprop's; the signal then
            shrinks by this factor at each hidden code below the top one.

    Raises:
        ValueError: If an argument is out of its range.
    """

    reads_outputs = False

    def __init__(self, steps: int = 1, relaxation: float = 1.0) -> None:
        super().__init__()
        check_count("steps", steps)
        check_number("relaxation", relaxation, above=0, most=1)
        self.steps = steps
        self.relaxation = relaxation

    def solve(self, problem: CodeProblem) -> Tensor:
        move = None
        problem.expect(self.steps)
        for _ in range(self.steps):
            gradient = problem.gradient(move)
            slope = gradient.flatten(1).square().sum(1)
            curvature = problem.curvature(gradient, move)
            # A problem that is not convex along the step has no optimum to aim at; the anchor's step of 1 is safe.
            # The smallest number in the denominator lets a sample without a gradient stay where it is.
            length = slope / curvature.maximum(slope).clamp_min(torch.finfo(slope.dtype).tiny)
            change = gradient * (-self.relaxation * length).view(-1, *[1] * (gradient.dim() - 1))
            move = change if move is None else move + change
        assert move is not None  # steps >= 1
        return move

    def extra_repr(self) -> str:
        return f"steps={self.steps}, relaxation={self.relaxation:g}"
