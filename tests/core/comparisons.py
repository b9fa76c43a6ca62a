"""Comparing nested states bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def assert_bit_equal(a: Any, b: Any) -> None:
    """Compare tensors, numbers and nested containers of them; tensors must agree in type and every bit."""
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_bit_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_bit_equal(left, right)
    else:
        assert a == b
