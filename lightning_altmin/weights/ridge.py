"""Ridge regression from its sufficient statistics, by Cholesky factors of the equilibrated matrix."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

TINY = 1e-30
"""Least mean square of a layer's inputs that a ridge is taken of, so that nothing is divided by zero."""

_JITTERS = (1e-10, 1e-8, 1e-6, 1e-4)  # of the equilibrated matrix, whose diagonal is 1


class SingularStatisticsWarning(UserWarning):
    """The statistics do not determine the weights, and more than the ridge asked for was added to them."""


def ridge_solution(A: Tensor, B: Tensor, ridge: float) -> Tensor:
    r"""The minimum over ``W`` of ``sum ||c - W a||^2 + ridge * mean(diag A) * ||W||^2``.

    Args:
        A: Sum of ``a a^T``, shape ``(inputs, inputs)``, in double precision unless a device has none.
        B: Sum of ``c a^T``, shape ``(outputs, inputs)``.
        ridge: Relative to the mean of A's diagonal, >= 0.

    Warns:
        SingularStatisticsWarning: If A with its ridge is not positive definite in floating point; the smallest jitter
            that makes it so is then added, relative to each input's own size.
    """
    scale, factor = _factor(A, ridge)
    solved = torch.cholesky_solve((B * scale).t(), factor)
    return solved.t() * scale


def damped_inverse(A: Tensor, ridge: float) -> Tensor:
    """``(A + ridge * mean(diag A) I)^-1``; not finite if A is not, and never a wait for an accelerator.

    Zero if A is: inputs that were all zero (a dead layer, black images) say nothing, so nothing is to move by them.

    Args:
        A: Symmetric, positive semi-definite, shape ``(inputs, inputs)``.
        ridge: Relative to the mean of A's diagonal, > 0.
    """
    diagonal = A.diagonal()
    damped = A + torch.diag_embed((ridge * diagonal.mean().clamp_min(TINY)).expand(A.shape[0]))
    factor, failed = torch.linalg.cholesky_ex(damped)
    inverse = torch.cholesky_inverse(factor).contiguous()  # as it will be once loaded: products round by the layout
    inverse = torch.where(failed == 0, inverse, torch.full_like(inverse, torch.nan))
    return zero_unless_seen(inverse, diagonal.sum())


def zero_unless_seen(inverse: Tensor, squares: Tensor) -> Tensor:
    """``inverse``, or zeros if the inputs' sum of squares is zero: then it is that of a floor, and no step to take."""
    return torch.where(squares != 0, inverse, 0.0)


def _damped(A: Tensor, ridge: float) -> Tensor:
    return A + torch.diag_embed((ridge * A.diagonal().mean()).expand(A.shape[0]))


def _factor(A: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """``D^-1/2`` and the Cholesky factor of ``D^-1/2 (A + ridge) D^-1/2``, ``D`` the diagonal."""
    damped = _damped(A, ridge)
    diagonal = damped.diagonal()
    # An input that was never active has an empty row: its weight becomes 0, which its target asks for as much as any.
    scale = diagonal.where(diagonal > 0, 1.0).rsqrt()
    equilibrated = damped * scale * scale.unsqueeze(1)
    equilibrated.diagonal().fill_(1.0)
    factor, failed = torch.linalg.cholesky_ex(equilibrated)
    # Success alone is no proof: a pivot of rounding size makes the solution noise.
    floor = equilibrated.shape[0] * torch.finfo(A.dtype).eps
    for jitter in _JITTERS:
        if not bool(A.diagonal().sum().isfinite()):  # a bad batch, which is judged as such later
            break
        if int(failed) == 0 and bool(factor.diagonal().min().square() > floor):
            break
        warnings.warn(
            f"the statistics of {A.shape[0]} inputs are singular to rounding at this ridge: a jitter of {jitter:g} of "
            "each input's mean square is added. Use a larger ridge, or solve after more samples",
            SingularStatisticsWarning,
            stacklevel=2,
        )
        jittered = equilibrated.clone()
        jittered.diagonal().fill_(1.0 + jitter)
        factor, failed = torch.linalg.cholesky_ex(jittered)
    return scale, factor
