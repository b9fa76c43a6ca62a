"""Proximal gradient steps on each code: the l1 term by its exact soft threshold, so that codes hold exact zeros."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_altmin.arguments import check_count, check_number
from lightning_altmin.codes.base import CodeProblem, CodeSolver


class ProximalCodes(CodeSolver):
    r"""ISTA, or FISTA if accelerated, on a code's problem with ``lambda_c ||c||_1`` (Beck and Teboulle, 2009).

    .. math::
        c \leftarrow S_{lr \lambda_c / \mu} \left( c - lr \, g \right), \qquad
        S_\tau(u) = sign(u) \max(|u| - \tau, 0)

    with ``g`` the gradient of ``J / mu`` without the l1 term. A code that is thresholded is exactly zero; the
    subgradient that the other solvers use only makes it small.

    Args:
        steps: Number of steps per code, >= 1.
        lr: Rate, > 0. Up to ``1 / (1 + ||J||^2)``, with ``J`` the stage above a hidden code, plain steps never raise
            the problem's value (for the top code ``||J||^2`` is times the loss's curvature over ``mu``).
        accelerated: Nesterov's extrapolation (FISTA): on a convex problem the error falls with ``1 / steps^2`` in place
            of ``1 / steps``, but not in every step.

    Raises:
        ValueError: If an argument is out of its range.
    """

    lr: Tensor

    def __init__(self, steps: int = 10, lr: float = 0.2, accelerated: bool = True) -> None:
        super().__init__()
        check_count("steps", steps)
        check_number("lr", lr, above=0)
        self.steps = steps
        self.accelerated = accelerated
        # A buffer, so that a schedule can change the rate in place and a checkpoint keeps it.
        self.register_buffer("lr", torch.tensor(float(lr), dtype=torch.float64))

    def solve(self, problem: CodeProblem) -> Tensor:
        threshold = self.lr * problem.objective.lambda_c / problem.objective.mu
        problem.expect(self.steps)
        move = self._step(problem, None, threshold)
        before, age = torch.zeros_like(move), 1.0
        for _ in range(self.steps - 1):
            ahead = move
            if self.accelerated:
                following = (1 + math.sqrt(1 + 4 * age * age)) / 2
                ahead = move + (move - before) * ((age - 1) / following)
                age = following
            before, move = move, self._step(problem, ahead, threshold)
        return move

    def _step(self, problem: CodeProblem, move: Tensor | None, threshold: Tensor) -> Tensor:
        change = problem.smooth_gradient(move) * -self.lr
        moved = change if move is None else move + change
        if problem.objective.lambda_c == 0:
            return moved
        # As a move: what is left of a code keeps the digits of its change, and forward - forward is exactly zero.
        code = problem.forward + moved
        return torch.where(code.abs() <= threshold, -problem.forward, moved - code.sign() * threshold)

    def extra_repr(self) -> str:
        return f"steps={self.steps}, lr={float(self.lr):g}, accelerated={self.accelerated}"
