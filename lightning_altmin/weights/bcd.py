"""Block coordinate descent on a least-squares surrogate, column by column, with the l1 shrinkage of the paper."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_altmin.arguments import check_count, check_number

_BLOCK = 32  # columns between two products with all of A
_FLOOR = 1e-10  # added to the diagonal, as the released code does: a column without data stays as it is


def bcd(W: Tensor, A: Tensor, B: Tensor, lambda_w: float = 0.0, sweeps: int = 1, bias: bool = False) -> Tensor:
    r"""Sweeps of exact minimisation over one column of ``W`` after the other (arXiv 1806.09077, updateWeights).

    .. math::
        w_j \leftarrow S_{\lambda}\left(w_j + \frac{b_j - W a_j}{A_{jj}}\right),
        \qquad S_\lambda(z) = sign(z) \max(|z| - \lambda, 0)

    Each column's step is the exact minimum over it of ``tr(W A W^T)/2 - tr(W B^T) + lambda_w sum_j A_jj |w_j|_1``,
    which therefore never rises.

    Args:
        W: Weights to start from, shape ``(outputs, inputs)``; not changed.
        A: Sum of ``a a^T`` over inputs ``a``, shape ``(inputs, inputs)``.
        B: Sum of ``c a^T`` over targets ``c``, shape ``(outputs, inputs)``.
        lambda_w: Threshold of the shrinkage, >= 0.
        sweeps: Sweeps over all columns, >= 1.
        bias: Whether the last column is a bias, which is not shrunk.

    Returns:
        The new weights.

    Raises:
        ValueError: If shapes do not fit or a number is out of its range.
    """
    inputs = W.shape[1]
    if A.shape != (inputs, inputs) or B.shape != W.shape:
        raise ValueError(
            f"W has shape {tuple(W.shape)}, so A must have {(inputs, inputs)} and B {tuple(W.shape)}; got "
            f"{tuple(A.shape)} and {tuple(B.shape)}"
        )
    check_number("lambda_w", lambda_w, least=0)
    check_count("sweeps", sweeps)
    for _ in range(sweeps):
        W = _sweep(W, A, B) if lambda_w == 0 else _shrinking_sweep(W, A, B, lambda_w, bias)
    return W


def _sweep(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Without shrinkage a sweep is Gauss-Seidel: the changes solve one triangular system."""
    upper = A.triu() + torch.diag_embed(torch.full_like(A.diagonal(), _FLOOR))
    return W + torch.linalg.solve_triangular(upper, B - W @ A, upper=True, left=False)


def _shrinking_sweep(W: Tensor, A: Tensor, B: Tensor, lambda_w: float, bias: bool) -> Tensor:
    """Blocks of columns by matrix products, the columns of a block by rank-one updates within the block."""
    W, inputs = W.clone(), A.shape[0]
    diagonal = A.diagonal() + _FLOOR
    for start in range(0, inputs, _BLOCK):
        block = slice(start, min(start + _BLOCK, inputs))
        residual, coupling = B[:, block] - W @ A[:, block], A[block, block]
        for column in range(block.stop - start):
            index = start + column
            moved = W[:, index] + residual[:, column] / diagonal[index]
            if not (bias and index == inputs - 1):
                moved = torch.nn.functional.softshrink(moved, lambda_w)
            residual -= torch.outer(moved - W[:, index], coupling[column])
            W[:, index] = moved
    return W
