"""Gradient steps on each code, with momentum: the code step of the paper."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_altmin.codes.base import CodeProblem, CodeSolver


class GradientCodes(CodeSolver):
    """``steps`` gradient steps on a code at rate ``lr / mu`` on the objective (arXiv 1806.09077, updateCodes).

    The update is that of ``torch.optim.SGD``: ``v = momentum * v + g``; the code moves by ``-lr * v``, or with
    Nesterov momentum by ``-lr * (g + momentum * v)``.

    Args:
        steps: Number of gradient steps, >= 1.
        lr: Rate, > 0. A hidden code's problem has curvature ``1 + ||J||^2`` with ``J`` the stage above, so rates
            beyond ``2 / (1 + ||J||^2)`` overshoot; `LineSearchCodes` finds the step by itself.
        momentum: In [0, 1).
        nesterov: Use Nesterov momentum; needs ``momentum > 0``.

    Raises:
        ValueError: If an argument is out of its range.
    """

    lr: Tensor

    def __init__(self, steps: int = 5, lr: float = 0.2, momentum: float = 0.0, nesterov: bool = False) -> None:
        super().__init__()
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps must be an integer >= 1, got {steps}")
        if not (math.isfinite(lr) and lr > 0):
            raise ValueError(f"lr must be a positive number, got {lr}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {momentum}")
        if nesterov and momentum == 0:
            raise ValueError("nesterov=True needs momentum > 0, got momentum=0")
        self.steps = steps
        self.momentum = momentum
        self.nesterov = nesterov
        # A buffer, so that a schedule can change the rate in place and a checkpoint keeps it.
        self.register_buffer("lr", torch.tensor(float(lr), dtype=torch.float64))

    def solve(self, problem: CodeProblem) -> Tensor:
        move = velocity = None
        problem.expect(self.steps)
        for _ in range(self.steps):
            change = gradient = problem.gradient(move)
            if self.momentum > 0:
                velocity = gradient.clone() if velocity is None else velocity.mul_(self.momentum).add_(gradient)
                change = gradient.add(velocity, alpha=self.momentum) if self.nesterov else velocity
            change = change * -self.lr
            move = change if move is None else move.add_(change)
        assert move is not None  # steps >= 1
        return move

    def extra_repr(self) -> str:
        return f"steps={self.steps}, lr={float(self.lr):g}, momentum={self.momentum:g}, nesterov={self.nesterov}"
