"""Gradient steps on each code, with momentum: the code step of the paper."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_altmin.arguments import check_count, check_number
from lightning_altmin.codes.base import CodeProblem, CodeSolver


class GradientCodes(CodeSolver):
    """``steps`` gradient steps on a code at rate ``lr / mu`` on the objective (arXiv 1806.09077, updateCodes).

    The update is that of ``torch.optim.SGD``: ``v = momentum * v + g``; the code moves by ``-lr * v``, or with
    Nesterov momentum by ``-lr * (g + momentum * v)``.

    Args:
        steps: Number of gradient steps, >= 1; with ``tol`` the largest number of them.
        lr: Rate, > 0. A hidden code's problem has curvature ``1 + ||J||^2`` with ``J`` the stage above, so rates
            beyond ``2 / (1 + ||J||^2)`` overshoot; `LineSearchCodes` finds the step by itself.
        momentum: In [0, 1).
        nesterov: Use Nesterov momentum; needs ``momentum > 0``.
        tol: In (0, 1); a sample's code stays where it is as soon as its gradient's norm is at most ``tol`` times its
            norm at the forward code. A step lowers the objective by ``lr mu ||g||^2`` to first order, so this is when
            it would bring no more than the share ``tol^2`` of what the first one brought. Each sample is judged by
            itself. On the CPU the step ends with the last sample; on an accelerator, and compiled, where asking would
            stall, all ``steps`` are computed. The steps taken are counted in ``Step.code_steps``; `CodeMonitor` logs
            them.

    Raises:
        ValueError: If an argument is out of its range.
    """

    reads_outputs = False
    lr: Tensor

    def __init__(
        self,
        steps: int = 5,
        lr: float = 0.2,
        momentum: float = 0.0,
        nesterov: bool = False,
        tol: float | None = None,
    ) -> None:
        super().__init__()
        check_count("steps", steps)
        check_number("lr", lr, above=0)
        check_number("momentum", momentum, least=0, below=1)
        if nesterov and momentum == 0:
            raise ValueError("nesterov=True needs momentum > 0, got momentum=0")
        if tol is not None:
            check_number("tol", tol, above=0, below=1, otherwise="None for a fixed number of steps")
        self.steps = steps
        self.momentum = momentum
        self.nesterov = nesterov
        self.tol = tol
        # A buffer, so that a schedule can change the rate in place and a checkpoint keeps it.
        self.register_buffer("lr", torch.tensor(float(lr), dtype=torch.float64))

    def solve(self, problem: CodeProblem) -> Tensor:
        move = velocity = None
        problem.expect(self.steps, any_order=True)
        # Where samples of other processes take part in a step, all processes must take equally many.
        far = None if self.tol is None else _Far(self.tol, asks=not problem.above.mixes_processes_in_code_step)
        for _ in range(self.steps):
            change = gradient = problem.gradient(move)
            if far is not None and far.are_none(gradient):
                break
            if self.momentum > 0:
                velocity = gradient.clone() if velocity is None else velocity.mul_(self.momentum).add_(gradient)
                change = gradient.add(velocity, alpha=self.momentum) if self.nesterov else velocity
            change = change.mul_(-self.lr) if change is not velocity else change * -self.lr
            if far is not None:
                change = far.alone(change)
            move = change if move is None else move.add_(change)
        assert move is not None  # steps >= 1
        problem.steps = None if far is None else far.steps
        return problem.restored(move)

    def extra_repr(self) -> str:
        settings = f"steps={self.steps}, lr={float(self.lr):g}, momentum={self.momentum:g}, nesterov={self.nesterov}"
        return settings if self.tol is None else f"{settings}, tol={self.tol:g}"


class _Far:
    """Which samples are still far from their code's optimum."""

    def __init__(self, tol: float, asks: bool) -> None:
        self._share = tol**2
        self._asks = asks
        self._bound: Tensor | None = None
        self._far: Tensor | None = None
        self.steps: Tensor | None = None
        """Steps taken so far, averaged over the samples."""

    def are_none(self, gradient: Tensor) -> bool:
        """Judge the samples by their gradients; whether all are known to be near enough."""
        squares = gradient.flatten(1).square().sum(1)
        if self._bound is None:
            self._bound, self._far = squares * self._share, torch.ones_like(squares, dtype=torch.bool)
            return False
        assert self._far is not None
        self._far = self._far & (squares > self._bound)
        # Asking an accelerator would stall it, and a compiled graph cannot ask.
        asks = self._asks and squares.device.type == "cpu" and not torch.compiler.is_compiling()
        return asks and not bool(self._far.any())

    def alone(self, change: Tensor) -> Tensor:
        """``change`` of the samples that are far, zero for the others; a step is counted."""
        assert self._far is not None
        steps = self._far.float().mean()
        self.steps = steps if self.steps is None else self.steps + steps
        return change * self._far.view(-1, *[1] * (change.dim() - 1))
