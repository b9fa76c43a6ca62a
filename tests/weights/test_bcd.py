"""Oracles: the released code's results, a loop over columns, and the surrogate that no column's step may raise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_altmin.weights import bcd

GOLDEN = Path(__file__).parent.parent / "golden"


def problem(seed: int, inputs: int, outputs: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, c = (torch.randn(rows, n, generator=generator, dtype=torch.float64) for n in (inputs, outputs))
    return torch.randn(outputs, inputs, generator=generator, dtype=torch.float64), a.t() @ a, c.t() @ a


def written_out(W: Tensor, A: Tensor, B: Tensor, lambda_w: float, sweeps: int, bias: bool) -> Tensor:
    """The paper's update, one column and one entry at a time."""
    W = W.clone()
    for _ in range(sweeps):
        for j in range(A.shape[0]):
            for i in range(W.shape[0]):
                z = float(W[i, j] + (B[i, j] - W[i] @ A[:, j]) / (A[j, j] + 1e-10))
                shrink = 0.0 if bias and j == A.shape[0] - 1 else lambda_w
                W[i, j] = np.sign(z) * max(abs(z) - shrink, 0.0)
    return W


def surrogate(W: Tensor, A: Tensor, B: Tensor, lambda_w: float, bias: bool) -> float:
    pull = A.diagonal() * W.abs().sum(0)
    return float((W @ A * W).sum() / 2 - (W * B).sum() + lambda_w * (pull[:-1] if bias else pull).sum())


@pytest.mark.parametrize("name", ["bcd", "bcd_l1"])
def test_reproduces_the_released_code(name: str) -> None:
    """Catches another order of columns, a threshold of another size, a wrong sign, or another floor of the diagonal."""
    data = np.load(GOLDEN / f"{name}.npz")
    meta = json.loads(str(data["meta"]))
    W, A, B = (torch.from_numpy(data[key]) for key in ("w_in", "A", "B"))
    result = bcd(W, A, B, meta["lambda_w"], meta["sweeps"])
    np.testing.assert_allclose(result.numpy(), data["w_out"], rtol=0, atol=1e-12)
    np.testing.assert_array_equal(W.numpy(), data["w_in"])  # the given weights are left alone


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.integers(1, 70), st.sampled_from([0.0, 0.01, 0.3]), st.booleans(), st.integers(1, 3))
def test_blocks_do_not_change_the_result(seed: int, inputs: int, lambda_w: float, bias: bool, sweeps: int) -> None:
    """Catches blocks that read stale columns, at any number of inputs: less than a block, its multiple, more."""
    W, A, B = problem(seed, inputs, 3, inputs + 5)
    expected = written_out(W, A, B, lambda_w, sweeps, bias)
    torch.testing.assert_close(bcd(W, A, B, lambda_w, sweeps, bias), expected, rtol=1e-8, atol=1e-8)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.integers(1, 40), st.integers(1, 60), st.sampled_from([0.0, 0.05, 1.0]), st.booleans())
def test_surrogate_never_rises(seed: int, inputs: int, rows: int, lambda_w: float, bias: bool) -> None:
    """Catches a step that is not the minimum over its column, also where A is singular (fewer rows than inputs)."""
    W, A, B = problem(seed, inputs, 4, rows)
    values = [surrogate(W, A, B, lambda_w, bias)]
    for _ in range(6):
        W = bcd(W, A, B, lambda_w, bias=bias)
        values.append(surrogate(W, A, B, lambda_w, bias))
    slack = 1e-9 * (1 + abs(values[0]))
    assert all(after <= before + slack for before, after in zip(values, values[1:], strict=False))


def test_converges_to_the_least_squares_solution() -> None:
    """Catches a fixed point that is not the minimum."""
    W, A, B = problem(0, 8, 3, 200)
    torch.testing.assert_close(bcd(W, A, B, sweeps=500), torch.linalg.solve(A, B.t()).t(), rtol=1e-10, atol=1e-10)


def test_a_column_without_data_stays() -> None:
    """Catches a division by a zero diagonal: a unit that was never active has zeros in its row and column."""
    W, A, B = problem(0, 6, 3, 50)
    A[2], A[:, 2], B[:, 2] = 0.0, 0.0, 0.0
    torch.testing.assert_close(bcd(W, A, B, sweeps=3)[:, 2], W[:, 2], rtol=0, atol=0)
    torch.testing.assert_close(bcd(W, A, B, 0.01, 3)[:, 2], torch.nn.functional.softshrink(W[:, 2], 0.03))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"A": torch.eye(3)}, r"A must have \(4, 4\)"),
        ({"B": torch.ones(2, 3)}, r"B \(2, 4\)"),
        ({"lambda_w": -1.0}, "lambda_w must be a number >= 0, got -1.0"),
        ({"lambda_w": float("nan")}, "lambda_w"),
        ({"sweeps": 0}, "sweeps must be an integer >= 1, got 0"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, object], message: str) -> None:
    """Catches shapes that broadcast and numbers that make nonsense without a word."""
    given: dict[str, object] = {"W": torch.ones(2, 4), "A": torch.eye(4), "B": torch.ones(2, 4)}
    with pytest.raises(ValueError, match=message):
        bcd(**(given | arguments))  # type: ignore[arg-type]
