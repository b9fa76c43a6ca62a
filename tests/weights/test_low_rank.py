"""Oracles: the whole matrix where low rank is exact, and one process that sees what two see between them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_altmin import AltMin, CoactivationMemory
from lightning_altmin.weights.least_squares_layer import LeastSquaresLayer
from lightning_altmin.weights.low_rank_statistics import LowRankStatistics


def test_low_rank_of_all_directions_is_the_memory_itself() -> None:
    """Catches a low-rank memory that is not used, or used with another ridge: with little beyond `rank` directions in
    the data, both take the same steps.
    """
    torch.manual_seed(1)
    networks = [nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)).double()]
    networks.append(copy.deepcopy(networks[0]))
    few = torch.randn(3, 12, dtype=torch.float64)
    cores = [
        AltMin(n, nn.CrossEntropyLoss(), weights=CoactivationMemory(rank=r, every=1))
        for n, r in zip(networks, (None, 4), strict=True)
    ]
    for _ in range(5):
        x, y = torch.randn(30, 3, dtype=torch.float64) @ few, torch.randint(4, (30,))
        for core in cores:
            core.step(x, y)
    # The first layer's inputs have 3 directions and the appended one; the second layer's do not fit into 4.
    torch.testing.assert_close(networks[0][0].weight, networks[1][0].weight, rtol=0.02, atol=1e-3)
    assert "13x4" in cores[1].explain()
    assert "13x13" in cores[0].explain()


@pytest.mark.parametrize("rank", [4, 6])
def test_low_rank_is_exact_where_it_can_be(rank: int) -> None:
    """Catches a wrong share for the directions that are left out, a ridge relative to the leading ones only, and
    a discount that misses the trace: inputs in 4 directions over an equal level in all others.
    """
    basis = torch.linalg.qr(torch.randn(10, 10, dtype=torch.float64)).Q
    scale = torch.tensor([9.0, 7, 5, 3] + [0.5] * 6, dtype=torch.float64)
    rows = 10**0.5 * (basis * scale).t()  # 10 rows whose mean of a a^T has these squares as eigenvalues
    layer = LeastSquaresLayer(nn.Linear(10, 3, bias=False).double())
    low = LowRankStatistics(layer, rank, torch.float64)
    for _ in range(60):
        low.add(rows, None, None, 0.5)
    low.renew(0.3)
    A = (basis * scale**2) @ basis.t()
    damped = A + 0.3 * A.diagonal().mean() * torch.eye(10, dtype=A.dtype)
    matrix = torch.randn(3, 10, dtype=torch.float64)
    torch.testing.assert_close(low.preconditioned(matrix), matrix @ torch.linalg.inv(damped), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(low.trace / low.rows, A.trace(), rtol=1e-12, atol=0)


def test_low_rank_forgets_in_proportion() -> None:
    """Catches a discount that misses a part: the inverse is that of a mean, which no factor changes."""
    low = LowRankStatistics(LeastSquaresLayer(nn.Linear(10, 3).double()), 4, torch.float64)
    low.add(torch.randn(50, 10, dtype=torch.float64), None, None, 1.0)
    matrix, results = torch.randn(2, 11, dtype=torch.float64), []
    for factor in (1.0, 0.3):
        low.discount(factor)
        low.renew(1.0)
        results.append(low.preconditioned(matrix))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_low_rank_refuses_several_processes() -> None:
    """Catches directions of one process used as if they were those of all."""
    low = LowRankStatistics(LeastSquaresLayer(nn.Linear(10, 3)), 4, torch.float32)
    with pytest.raises(ValueError, match="rank is for one process, there are 2"):
        low.add(torch.randn(5, 10), None, None, 1.0, processes=2)


def test_no_bad_batch_raises() -> None:
    """Catches eigh's error on NaN, which would end a run that is to skip bad batches; the trace tells the guard."""
    low = LowRankStatistics(LeastSquaresLayer(nn.Linear(3, 2)), 2, torch.float32)
    low.add(torch.tensor([[1.0, torch.nan, 2.0]]), None, None, 1.0)
    assert not low.energy().isfinite()
