"""Codes by two exact sub-solves each: what the layer above should read, and the code that makes it read that."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_altmin.arguments import check_number
from lightning_altmin.codes.base import CodeProblem, CodeSolver
from lightning_altmin.codes.elementwise import INVERTIBLE, activation_move
from lightning_altmin.codes.plain_layer import activation_of, odd_modules
from lightning_altmin.objective import AltMinObjective
from lightning_altmin.stage import Stage


class LeastSquaresCodes(CodeSolver):
    r"""Moves a code so that the layer above, ``W s(c) + b``, meets its own moved code: a pseudo-inverse in two steps.

    With ``t`` the move of the code above and superscript ``f`` for forward values,

    .. math::
        \Delta a &= \arg\min_\Delta \|W \Delta - t\|^2 + damping\, \|\Delta\|^2 \\
        c &= \arg\min_c \|s(c) - s(c^f) - \Delta a\|^2 + weight\, \|c - c^f\|^2

    The first is linear: one Cholesky factorisation, of the smaller of ``W^T W`` and ``W W^T``, serves the whole batch.
    The second is elementwise: three cases for ReLU and LeakyReLU, a safeguarded Newton method for Sigmoid, Tanh and
    Softplus. Each is solved exactly; **the pair is not the optimum of the code's problem**, which has both at once.

    Backprop multiplies the signal by ``W^T`` and ``s'`` at each layer; this divides by them, as far as ``damping`` and
    ``weight`` allow. So it does not shrink with depth where slopes are small.

    The top code has the output's move ``-g / mu`` for its ``t``, with ``g`` the loss's gradient with respect to the
    output: the minimum of the loss's quadratic majoriser where ``mu`` is at least the loss's curvature (1/2 for
    cross-entropy), and a plain gradient step on the output in any case.

    Args:
        damping: Price of changing what the layer above reads, > 0. Directions of ``W`` with a singular value below
            its square root are left alone.
        weight: Price of moving a code, > 0. Units whose slope is below its square root are left alone.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(self, damping: float = 1.0, weight: float = 0.1) -> None:
        super().__init__()
        check_number("damping", damping, above=0)
        check_number("weight", weight, above=0)
        self.damping = damping
        self.weight = weight

    def check(self, stages: Sequence[Stage], objective: AltMinObjective) -> None:
        """Refuse what two least-squares problems cannot serve.

        That is an l1 term of the codes, a coupling that is not the squared distance, and stages above a code that are
        not an activation followed by one Linear.

        Raises:
            ValueError: If there is such a term, coupling or stage.
        """
        if objective.lambda_c > 0:
            raise ValueError(f"codes=LeastSquaresCodes has no l1 term: lambda_c={objective.lambda_c:g} must be 0")
        if not objective.couples_by_squares:
            raise ValueError(
                f"codes=LeastSquaresCodes meets the code above by least squares, and {type(objective).__name__} has a "
                "code_coupling_gradient of its own, which it would not follow; use CurvatureCodes()"
            )
        for stage in stages[1:]:
            if odd := odd_modules(stage):
                raise ValueError(
                    f"codes=LeastSquaresCodes needs one activation of {[t.__name__ for t in INVERTIBLE]} and one "
                    f"Linear after each code; stage {stage.name!r} has {odd[0]}. Use CurvatureCodes()"
                )

    def solve(self, problem: CodeProblem) -> Tensor:
        target = problem.target_move
        if target is None:
            target = -problem.objective.code_loss_gradient(problem.loss)
        transfer, linear = problem.above.transfer, problem.above.affine[0]
        assert isinstance(linear, nn.Linear)  # as `check` has seen
        change = damped_least_squares(linear.weight.detach(), target, self.damping).view_as(problem.forward)
        return activation_move(activation_of(transfer), problem.forward, change, self.weight)

    def extra_repr(self) -> str:
        return f"damping={self.damping:g}, weight={self.weight:g}"


def damped_least_squares(weight: Tensor, target: Tensor, damping: float) -> Tensor:
    """The rows ``d`` that minimise ``||W d - t||^2 + damping ||d||^2``.

    Args:
        weight: ``W``, shape ``(out, in)``.
        target: ``t``, shape ``(..., out)``.
        damping: > 0.

    Returns:
        Shape ``(..., in)``.
    """
    outputs, inputs = weight.shape
    if outputs <= inputs:  # W^T (W W^T + damping)^-1 t
        return _solve(weight @ weight.t(), damping, target) @ weight
    return _solve(weight.t() @ weight, damping, target @ weight)


def _solve(gram: Tensor, damping: float, rows: Tensor) -> Tensor:
    """``rows (gram + damping)^-1``, for a symmetric ``gram``."""
    factor = torch.linalg.cholesky_ex(gram + damping * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))[0]
    return torch.cholesky_solve(rows.reshape(-1, rows.shape[-1]).t(), factor).t().reshape(rows.shape)
