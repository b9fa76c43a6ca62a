"""Oracle: the normal equations of data that are all there at once, solved by an orthogonal factorisation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_altmin.weights import SingularStatisticsWarning, ridge_solution
from lightning_altmin.weights.ridge import damped_inverse


def rows(count: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, inputs, dtype=torch.float64), torch.randn(count, outputs, dtype=torch.float64)


def batch_ridge(a: Tensor, c: Tensor, ridge: float) -> Tensor:
    """Least squares over the rows and one more row per input, which is what a ridge is; by QR, never forming A."""
    penalty = (ridge * a.square().sum(0).mean()).sqrt() * torch.eye(a.shape[1], dtype=a.dtype)
    stacked = torch.cat([a, penalty]), torch.cat([c, c.new_zeros(a.shape[1], c.shape[1])])
    return torch.linalg.lstsq(*stacked, driver="gels").solution.t()


@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 1.0])
def test_equals_the_batch_ridge_solution(ridge: float) -> None:
    """Catches a ridge that is not relative to mean(diag A), and one that is scaled with the equilibration."""
    a, c = rows(300, 20, 4)
    a = a * torch.logspace(-2, 2, 20, dtype=torch.float64)  # inputs of unlike size: a scaled ridge would be another
    torch.testing.assert_close(
        ridge_solution(a.t() @ a, c.t() @ a, ridge), batch_ridge(a, c, ridge), rtol=1e-10, atol=1e-10
    )


def test_equilibration_keeps_digits() -> None:
    """Catches a factorisation of A as it is: inputs from 1e-6 to 1e6 in size, no ridge, the weights known exactly."""
    a, _ = rows(200, 12, 1)
    scale = torch.logspace(-6, 6, 12, dtype=torch.float64)
    weights = torch.randn(3, 12, dtype=torch.float64)
    a = a * scale
    found = ridge_solution(a.t() @ a, weights @ (a.t() @ a), 0.0)
    torch.testing.assert_close(found * scale, weights * scale, rtol=1e-8, atol=1e-8)


def test_singular_statistics_warn_and_still_fit() -> None:
    """Catches a silent jitter, and a solution made of rounding noise: one input is a copy of another."""
    a, _ = rows(100, 6, 1)
    a = torch.cat([a, a[:, :1]], 1)
    c = a @ torch.randn(7, 2, dtype=torch.float64)
    with pytest.warns(SingularStatisticsWarning, match="singular to rounding"):
        W = ridge_solution(a.t() @ a, c.t() @ a, 0.0)
    assert (a @ W.t() - c).abs().max() < 1e-6 * c.abs().max()


def test_an_input_that_was_never_active_gets_no_weight() -> None:
    """Catches 0/0 in the equilibration, and a warning where nothing is wrong."""
    a, c = rows(100, 5, 2)
    a[:, 3] = 0.0
    W = ridge_solution(a.t() @ a, c.t() @ a, 0.0)
    assert W[:, 3].abs().max() == 0
    kept = a[:, [0, 1, 2, 4]]
    torch.testing.assert_close(W[:, [0, 1, 2, 4]], torch.linalg.lstsq(kept, c).solution.t(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("ridge", [0.1, 10.0])
def test_damped_inverse(ridge: float) -> None:
    """Catches a ridge that is not relative to mean(diag A)."""
    a, _ = rows(5, 8, 1)  # singular without the ridge
    A = a.t() @ a
    damped = A + ridge * A.diagonal().mean() * torch.eye(8, dtype=A.dtype)
    torch.testing.assert_close(damped_inverse(A, ridge) @ damped, torch.eye(8, dtype=A.dtype), rtol=0, atol=1e-12)


def test_damped_inverse_of_bad_statistics_is_not_finite() -> None:
    """Catches an exception in mid-batch, or a finite inverse that hides a NaN from the guard."""
    A = torch.eye(4)
    A[1, 1] = torch.nan
    assert not damped_inverse(A, 1.0).isfinite().all()


def test_damped_inverse_of_inputs_that_were_all_zero() -> None:
    """Catches an exception from a factor with zeros on its diagonal, and a huge inverse by which one later batch would
    move the layer anywhere: without an input there is nothing to divide by, and nothing to move.
    """
    assert damped_inverse(torch.zeros(4, 4), 1.0).abs().max() == 0
    tiny = damped_inverse(torch.eye(4) * 1e-42, 1.0)  # below what single precision can divide by
    assert tiny.isfinite().all()
