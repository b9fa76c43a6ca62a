"""Oracles: the whole matrix where low rank is exact, and one process that sees what two see between them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_altmin import AltMin, CoactivationMemory
from lightning_altmin.weights.diagonal_statistics import DiagonalStatistics
from lightning_altmin.weights.least_squares_layer import LeastSquaresLayer
from lightning_altmin.weights.low_rank_statistics import LowRankStatistics
from lightning_altmin.weights.statistics import Preconditioner

KINDS: dict[str, Callable[[LeastSquaresLayer], Preconditioner]] = {
    "low rank": lambda layer: LowRankStatistics(layer, 3, torch.float64),
    "diagonal": lambda layer: DiagonalStatistics(layer, torch.float64),
}


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
        low.add(rows, forgetting=0.5)
        low.renew(0.3)
    A = (basis * scale**2) @ basis.t()
    damped = A + 0.3 * A.diagonal().mean() * torch.eye(10, dtype=A.dtype)
    matrix = torch.randn(3, 10, dtype=torch.float64)
    torch.testing.assert_close(low.preconditioned(matrix), matrix @ torch.linalg.inv(damped), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(low.trace / low.rows, A.trace(), rtol=1e-12, atol=0)


def test_low_rank_forgets_in_proportion() -> None:
    """Catches a discount that misses a part: the inverse is that of a mean, which no factor changes."""
    low = LowRankStatistics(LeastSquaresLayer(nn.Linear(10, 3).double()), 4, torch.float64)
    low.add(torch.randn(50, 10, dtype=torch.float64))
    matrix, results = torch.randn(2, 11, dtype=torch.float64), []
    for factor in (1.0, 0.3):
        low.discount(factor)
        low.renew(1.0)
        results.append(low.preconditioned(matrix))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def ones(rows: Tensor) -> Tensor:
    """Rows with a one appended."""
    return torch.cat([rows, rows.new_ones(len(rows), 1)], 1)


def nystrom(A: Tensor, directions: Tensor) -> Tensor:
    """``A U (U^T A U)^-1 U^T A``, written down."""
    product = A @ directions
    return product @ torch.linalg.pinv(directions.t() @ product, hermitian=True) @ product.t()


def test_directions_follow_the_stream() -> None:
    """Catches sums with a direction that has changed since, a discount missed between renewals, and an approximation of
    another matrix: what is known of A is its Nystrom approximation, taken from renewal to renewal.
    """
    low = LowRankStatistics(LeastSquaresLayer(nn.Linear(9, 3).double()), 3, torch.float64)
    known, trace, count = torch.zeros(10, 10, dtype=torch.float64), 0.0, 0.0
    for number in range(8):
        rows = torch.randn(6, 9, dtype=torch.float64)
        low.add(rows, forgetting=0.7)
        known = 0.7 * known + ones(rows).t() @ ones(rows)
        trace, count = 0.7 * trace + float(ones(rows).square().sum()), 0.7 * count + 6
        if number % 2:
            directions = low.directions
            low.renew(0.5)
            known = nystrom(known, directions)
            rest = (trace - float(known.trace())) / 7 * (torch.eye(10).double() - low.directions @ low.directions.t())
            damped = (known + rest + 0.5 * trace / 10 * torch.eye(10).double()) / count
            matrix = torch.randn(2, 10, dtype=torch.float64)
            torch.testing.assert_close(low.preconditioned(matrix), matrix @ damped.inverse(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("count", [1, 3])
def test_fewer_rows_than_directions(count: int) -> None:
    """Catches a division by directions that no row has reached: what is known is exact then, in float32 too."""
    low = LowRankStatistics(LeastSquaresLayer(nn.Linear(30, 3)), 12, torch.float32)
    rows = torch.randn(count, 30) + 2
    for _ in range(4):
        low.add(rows, forgetting=0.5)
        low.renew(1.0)
    A = (ones(rows).t() @ ones(rows) / count).double()
    damped = A + A.diagonal().mean() * torch.eye(31).double()
    matrix = torch.randn(2, 31)
    expected = matrix.double() @ damped.inverse()
    torch.testing.assert_close(low.preconditioned(matrix).double(), expected, rtol=1e-4, atol=1e-5)


def test_a_diagonal_is_no_smaller_than_what_it_stands_for() -> None:
    """Catches a step too long along the inputs' common part: the damped A is at most what is divided by, and meets it.

    The factor is the largest eigenvalue of the equilibrated matrix; inputs of unlike sizes with a large mean.
    """
    kept = DiagonalStatistics(LeastSquaresLayer(nn.Linear(20, 3).double()), torch.float64)
    rows = (torch.randn(40, 20, dtype=torch.float64) + 3) * torch.logspace(-1, 1, 20, dtype=torch.float64)
    for _ in range(80):
        kept.add(rows, forgetting=0.5)
        kept.renew(0.5)
    A = ones(rows).t() @ ones(rows) / 40
    D = A.diagonal() + 0.5 * A.diagonal().mean()
    root = D.rsqrt()
    largest = torch.linalg.eigvalsh(A * root * root.unsqueeze(1))[-1]
    assert largest > 2
    matrix = torch.randn(2, 21, dtype=torch.float64)
    torch.testing.assert_close(kept.preconditioned(matrix), matrix / (D * largest), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_shares_of_processes_sum_to_the_whole(kind: str) -> None:
    """Catches directions of one process used as if they were those of all, and parts discounted or counted per process:
    two processes that see a batch between them go where one goes that sees it all.
    """
    whole, *shares = (KINDS[kind](LeastSquaresLayer(nn.Linear(9, 3).double())) for _ in range(3))
    for _ in range(4):
        for _ in range(2):
            parts = [torch.randn(5, 9, dtype=torch.float64) for _ in shares]
            whole.add(torch.cat(parts), forgetting=0.8)
            for share, part in zip(shares, parts, strict=True):
                share.add(part, forgetting=0.8, processes=2)
        total = sum(share.packed() for share in shares)
        for each in (whole, *shares):
            if each is not whole:
                each.unpack(total)
            each.renew(1.0)
        matrix = torch.randn(2, 10, dtype=torch.float64)
        for share in shares:
            torch.testing.assert_close(share.preconditioned(matrix), whole.preconditioned(matrix), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(shares[0].state_dict(), shares[1].state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_no_bad_batch_raises(kind: str) -> None:
    """Catches eigh's error on NaN, which would end a run that is to skip bad batches; the energy tells the guard."""
    kept = KINDS[kind](LeastSquaresLayer(nn.Linear(3, 2).double()))
    for value in (torch.nan, torch.inf):
        kept.add(torch.tensor([[1.0, value, 2.0]]))
        kept.renew(1.0)
        assert not kept.energy().isfinite()


def test_wide_layers_only() -> None:
    """Catches a rank that is applied to layers with no more inputs than it, or reported as something else."""
    core = AltMin(
        nn.Sequential(nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 4)),
        nn.CrossEntropyLoss(),
        weights=CoactivationMemory(rank=6),
    )
    assert [line.split()[1] for line in core.weights.explain().splitlines()[1:]] == ["13x6", "6x6"]
    assert sum(b.numel() for n, b in core.named_buffers() if n.startswith("weights._statistics.0.")) < 13 * 13 + 30
