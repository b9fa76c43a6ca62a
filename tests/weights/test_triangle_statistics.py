"""Oracle: all of A and B, written down at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_altmin import AltMin, CoactivationMemory
from lightning_altmin.weights.least_squares_layer import LeastSquaresLayer
from lightning_altmin.weights.triangle_statistics import TriangleStatistics
from tests.weights.problems import batch, mlp


def statistics(inputs: int, dtype: torch.dtype = torch.float64, bias: bool = False) -> TriangleStatistics:
    layer = LeastSquaresLayer(nn.Linear(inputs, 2, bias=bias).double())
    return TriangleStatistics(layer, dtype, torch.float64)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.booleans(), st.lists(st.integers(1, 6), min_size=1, max_size=4), st.floats(0.1, 1.0))
def test_sums_are_those_of_the_whole_matrix(inputs: int, bias: bool, sizes: list[int], forgetting: float) -> None:
    """Catches blocks that share an entry of the rectangle, a diagonal counted twice, blocks changed about, and an even
    or odd number of inputs, or one alone, that does not fit; a discount that leaves out one of the parts.
    """
    kept = statistics(inputs, bias=bias)
    A, B, rows = 0.0, 0.0, 0.0
    for size in sizes:
        a, c = torch.randn(size, inputs, dtype=torch.float64), torch.randn(size, 2, dtype=torch.float64)
        kept.add(a, c, forgetting=forgetting)
        ones = torch.cat([a, a.new_ones(size, 1)], 1) if bias else a
        A, B = forgetting * A + ones.t() @ ones, forgetting * B + c.t() @ ones
        rows = forgetting * rows + size
    torch.testing.assert_close(kept.sums(), (A, B), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(float(kept.rows), rows, rtol=1e-12, atol=0)
    torch.testing.assert_close(kept.energy(), A.diagonal().sum(), rtol=1e-12, atol=0)
    n = inputs + bias
    assert kept.triangles.numel() + kept.across.numel() == n * (n + 1) // 2
    kept.discount(0.5)
    torch.testing.assert_close(kept.sums(), (A / 2, B / 2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("inputs", [4, 5])
def test_a_sample_of_weight_k_is_k_samples(inputs: int) -> None:
    """Catches a sample of weight 0 whose input, target or row still counts, and a weight squared or left out."""
    a, c = torch.randn(6, inputs, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    weighted, repeated = statistics(inputs), statistics(inputs)
    weighted.add(a, c, torch.tensor([1.0, 0, 3, 1, 0, 2], dtype=torch.float64))
    repeated.add(a[[0, 2, 2, 2, 3, 5, 5]], c[[0, 2, 2, 2, 3, 5, 5]])
    for ours, expected in zip(weighted.buffers(), repeated.buffers(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("network", ["mlp", "convolution"])
def test_the_weights_are_those_of_the_full_memory(network: str) -> None:
    """Catches a triangle unfolded the wrong way: the same network, trained with either storage, step by step."""

    def trained(storage: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        chosen: nn.Sequential = mlp()
        if network == "convolution":
            layers = [nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 4)]
            chosen = nn.Sequential(*layers).double()
        core = AltMin(chosen, nn.CrossEntropyLoss(), weights=CoactivationMemory("solve", every=2, storage=storage))
        for number in range(6):
            torch.manual_seed(number)
            if network == "convolution":
                core.step(torch.randn(9, 1, 6, 6, dtype=torch.float64), torch.randint(4, (9,)))
            else:
                core.step(*batch(chosen))
        return list(chosen.parameters())

    torch.testing.assert_close(trained("triangle"), trained("full"), rtol=1e-7, atol=1e-9)


def test_bytes_and_rounding_of_single_precision() -> None:
    """Catches sums kept in double precision after all, and ones that lose more than what the documentation says: the
    error of a sum of 400 batches, relative to its largest entry, stays below five times 3e-8 sqrt(400).
    """
    single, double = statistics(40, torch.float32), statistics(40)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        a = torch.rand(10, 40, generator=generator, dtype=torch.float64)
        for kept in (single, double):
            kept.add(a, a[:, :2])
    held = [sum(b.numel() * b.element_size() for b in (s.triangles, s.across)) for s in (single, double)]
    assert held == [40 * 41 // 2 * 4, 40 * 41 // 2 * 8]
    (ours, _), (exact, _) = single.sums(), double.sums()
    error = float((ours - exact).abs().max() / exact.abs().max())
    assert 0 < error < 5 * 3e-8 * 400**0.5
