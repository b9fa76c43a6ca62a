"""Gradient descent whose steps are bounded by the size of what they change."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class LimitedDescent(Optimizer):
    """``W -= lr * grad``, each parameter group's step no longer than a share of the group's own norm.

    A layer whose weights are all zero has no size yet, and its step no bound. There is no state, and nothing waits for
    an accelerator.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, > 0.
        limit: Largest relative change of a group in one step, > 0; infinite for no bound.

    Raises:
        ValueError: If a number is out of its range.
    """

    def __init__(self, params: Iterable[Any], lr: float, limit: float = math.inf) -> None:
        if not lr > 0:
            raise ValueError(f"lr must be a positive number, got {lr}")
        if not limit > 0:
            raise ValueError(f"limit must be a positive number, got {limit}")
        super().__init__(params, {"lr": lr, "limit": limit})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            gradients: list[Tensor] = [p.grad for p in parameters]
            rate: Tensor | float = group["lr"]
            if group["limit"] < math.inf:
                size, asked = _norm(parameters), _norm(gradients) * group["lr"]
                share = group["limit"] * size / asked.clamp_min(torch.finfo(asked.dtype).tiny)
                rate = group["lr"] * share.clamp_max(1.0).where(size > 0, 1.0)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(gradient * rate)
        return loss


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors)).norm()
