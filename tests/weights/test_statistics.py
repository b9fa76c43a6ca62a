"""Oracles: sums over rows written down at once, closed forms of the discount, and the layer's own forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_altmin.weights.layer_statistics import LayerStatistics
from lightning_altmin.weights.least_squares_layer import LeastSquaresLayer
from lightning_altmin.weights.low_rank_statistics import LowRankStatistics

CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "strided": {"stride": 2},
    "padded": {"padding": 1},
    "uneven": {"kernel_size": (2, 3), "stride": (2, 1), "padding": (0, 2), "dilation": (2, 1)},
    "reflected": {"padding": 2, "padding_mode": "reflect"},
    "same, even kernel": {"kernel_size": (2, 3), "padding": "same"},
    "valid": {"padding": "valid"},
    "without bias": {"bias": False},
}


def convolution(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(3, 5, **({"kernel_size": 3} | options)).double()


def statistics(inputs: int, outputs: int = 2, bias: bool = True) -> LayerStatistics:
    layer = LeastSquaresLayer(nn.Linear(inputs, outputs, bias=bias).double())
    return LayerStatistics(layer, torch.float64, targets=True, inverse=True)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_rows_times_matrix_is_the_convolution(options: dict[str, Any]) -> None:
    """Catches patches in another order than the weights, a wrong padding or stride, and outputs that belong to other
    rows; the number of positions is that of the layer's output.
    """
    layer = LeastSquaresLayer(convolution(**options))
    x = torch.randn(4, 3, 7, 8, dtype=torch.float64)
    y = layer.layer(x)
    torch.testing.assert_close(layer.rows(x) @ layer.matrix().t(), layer.output_rows(y), rtol=1e-12, atol=1e-12)
    assert layer.positions(x) == y[0, 0].numel()


@pytest.mark.parametrize("frozen", [False, True])
def test_rows_of_a_linear_layer(frozen: bool) -> None:
    """Catches a one appended where the bias is not trained, and further dimensions of the input mixed up."""
    linear = nn.Linear(4, 3).double()
    linear.bias.requires_grad_(not frozen)
    layer, x = LeastSquaresLayer(linear), torch.randn(5, 6, 4, dtype=torch.float64)
    expected = linear(x) - (linear.bias if frozen else 0)
    torch.testing.assert_close(layer.rows(x) @ layer.matrix().t(), layer.output_rows(expected), rtol=1e-12, atol=1e-12)
    assert (layer.inputs, layer.positions(x)) == (4 if frozen else 5, 6)


@pytest.mark.parametrize("make", [convolution, lambda: nn.Linear(6, 4)])
def test_split_undoes_join(make: Any) -> None:
    """Catches a bias taken from another column, and gradients whose memory is laid out unlike their parameter's: a
    fused optimizer would silently read them in the wrong order.
    """
    layer = LeastSquaresLayer(make())
    for parameter, part in layer.split(layer.matrix() * 2):
        torch.testing.assert_close(part, parameter * 2)
        assert part.is_contiguous()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_order_and_split_of_a_stream_make_no_difference(sizes: list[int], random: Any) -> None:
    """Catches means in the place of sums, and anything that depends on the batch a row came in."""
    a, c = torch.randn(sum(sizes), 3, dtype=torch.float64), torch.randn(sum(sizes), 2, dtype=torch.float64)
    whole, parts = statistics(3), statistics(3)
    whole.add(a, c)
    order = list(range(len(a)))
    random.shuffle(order)
    for start, size in zip([sum(sizes[:i]) for i in range(len(sizes))], sizes, strict=True):
        chosen = order[start : start + size]
        parts.add(a[chosen], c[chosen])
    ones = torch.cat([a, a.new_ones(len(a), 1)], 1)
    for each in (whole, parts):
        torch.testing.assert_close(each.A, ones.t() @ ones, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(each.B, c.t() @ ones, rtol=1e-12, atol=1e-12)
        assert each.rows == len(a)


@pytest.mark.parametrize("forgetting", [0.3, 0.9, 1.0])
def test_forgetting_against_its_closed_form(forgetting: float) -> None:
    """Catches a discount per row or of the new batch, one that leaves out B or the number of rows, and a mean that is
    not corrected for its start at zero: batch t of T counts forgetting^(T - 1 - t).
    """
    batches = [torch.randn(n, 3, dtype=torch.float64) for n in (4, 7, 2, 5)]
    targets = [torch.randn(len(batch), 2, dtype=torch.float64) for batch in batches]
    kept = statistics(3, bias=False)
    for batch, target in zip(batches, targets, strict=True):
        kept.add(batch, target, forgetting=forgetting)
    shares = [forgetting ** (3 - t) for t in range(4)]
    A = sum(w * b.t() @ b for w, b in zip(shares, batches, strict=True))
    B = sum(w * c.t() @ b for w, b, c in zip(shares, batches, targets, strict=True))
    rows = sum(w * len(b) for w, b in zip(shares, batches, strict=True))
    torch.testing.assert_close((kept.A, kept.B), (A, B), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(kept.mean(), A / rows, rtol=1e-12, atol=1e-12)


def test_a_sample_of_weight_k_is_k_samples() -> None:
    """Catches a sample of weight 0 whose appended one or target still counts, and a weight that is squared or left out
    of one of the sums.
    """
    a, c = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    weighted, repeated = statistics(3), statistics(3)
    weighted.add(a, c, torch.tensor([1.0, 0, 3, 1, 0, 2], dtype=torch.float64))
    repeated.add(a[[0, 2, 2, 2, 3, 5, 5]], c[[0, 2, 2, 2, 3, 5, 5]])
    for ours, expected in zip(weighted.buffers(), repeated.buffers(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-13)


def test_large_inputs_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches samples lost or paired with other targets where a convolution's patches are unfolded in parts."""
    conv = convolution(padding=1)
    x, c = torch.randn(5, 3, 6, 6, dtype=torch.float64), torch.randn(5, 5, 6, 6, dtype=torch.float64)
    results = []
    for chunk in (2**23, 2000):  # all at once; two samples at a time
        monkeypatch.setattr("lightning_altmin.weights.least_squares_layer._CHUNK", chunk)
        kept = LayerStatistics(LeastSquaresLayer(conv), torch.float64, targets=True, inverse=False)
        kept.add(x, c)
        results.append(kept.state_dict())
    assert len(list(LeastSquaresLayer(conv).chunks(x))) == 3
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_shares_of_processes_sum_to_the_whole() -> None:
    """Catches statistics discounted once per process, or counted once per process, over several sums of the shares."""
    whole, shares = statistics(3), [statistics(3), statistics(3)]
    for round_ in range(3):
        for _ in range(2):
            parts = [(torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)) for _ in shares]
            for share, (a, c) in zip(shares, parts, strict=True):
                share.add(a, c, forgetting=0.8, processes=2)
            whole.add(*(torch.cat(each) for each in zip(*parts, strict=True)), forgetting=0.8)
        if round_ < 2:
            total = sum(share.packed() for share in shares)
            assert total.numel() == 4 * 5 // 2 + 1 + 2 * 4  # A's upper triangle, the rows, B
            for share in shares:
                share.unpack(total)
                torch.testing.assert_close((share.A, share.B), (whole.A, whole.B), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sum(share.A for share in shares), whole.A, rtol=1e-12, atol=1e-12)


def test_shares_are_added_to_without_a_look_at_the_device() -> None:
    """Catches a wait for an accelerator per layer and batch: tensors without data cannot be looked at at all."""
    layer = LeastSquaresLayer(nn.Linear(4, 2, device="meta"))
    kept = LayerStatistics(layer, torch.float32, targets=False, inverse=True)
    for _ in range(2):  # autocast knows no such device, so this is what `add` begins with
        assert isinstance(kept._decay(0.9, processes=2), torch.Tensor)


@pytest.mark.parametrize("processes", [1, 3])
def test_a_share_is_discounted_in_full_precision(processes: int) -> None:
    """Catches a factor in single precision: of rows counted in double, 0.7 / processes and then 0.7 of what is held."""
    kept = statistics(3)
    a, c = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    kept.add(a, c)
    kept.add(a, c, forgetting=0.7, processes=processes)
    kept.add(a, c, forgetting=0.7, processes=processes)
    assert float(kept.rows) == pytest.approx((4 * 0.7 / processes + 4) * 0.7 + 4, rel=1e-14)


def test_autocast_does_not_reach_the_statistics() -> None:
    """Catches products in 16 bits: 4097 is no bfloat16."""
    layer = LeastSquaresLayer(nn.Linear(1, 1, bias=False))
    kept = LayerStatistics(layer, torch.float32, targets=False, inverse=True)
    low = LowRankStatistics(LeastSquaresLayer(nn.Linear(2, 1, bias=False)), 1, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        kept.add(torch.ones(4097, 1))
        low.add(torch.ones(4097, 2))
    assert kept.A.dtype == torch.float32
    assert kept.A.item() == 4097
    assert low.trace.item() == 2 * 4097
