"""Gradient descent whose steps are bounded by the size that what they change had at the start."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_altmin.arguments import check_number


class LimitedDescent(Optimizer):
    """``W -= lr * grad``, each parameter group's step no longer than a share of the norm it had at its first step.

    Not of the norm it has now: steps that are mostly noise make weights grow, and a bound that grows with them would
    let them grow exponentially. Weights that were all zero have no size: they are bounded by the norm they have, and
    not at all while that is zero. Nothing waits for an accelerator.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, > 0.
        limit: Longest step of a group relative to its norm at the first step, > 0; infinite for no bound.

    Raises:
        ValueError: If a number is out of its range.
    """

    def __init__(self, params: Iterable[Any], lr: float, limit: float = math.inf) -> None:
        check_number("lr", lr, above=0)
        if limit != math.inf:
            check_number("limit", limit, above=0, otherwise="math.inf for no bound")
        # "size", the first norm, is in the group and not in the state: a bad batch need not take it back.
        super().__init__(params, {"lr": lr, "limit": limit, "size": None})

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
            rate = group["lr"] if group["limit"] == math.inf else _bounded(group, gradients)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(gradient * rate)
        return loss


def _bounded(group: dict[str, Any], gradients: list[Tensor]) -> Tensor:
    """The group's learning rate, or the smaller one that keeps its bound."""
    now = _norm(group["params"])
    if group["size"] is None:
        group["size"] = now.clone()
    first = group["size"].to(now.device)  # a checkpoint may have been read elsewhere
    size = first.where(first > 0, now)
    asked = _norm(gradients) * group["lr"]
    share = group["limit"] * size / asked.clamp_min(torch.finfo(asked.dtype).tiny)
    return group["lr"] * share.clamp_max(1.0).where(size > 0, 1.0)


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors)).norm()
