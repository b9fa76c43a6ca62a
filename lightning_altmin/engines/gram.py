"""The Gram form: repeated gradients of a squared coupling through a linear layer, one matrix product each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_altmin.engines.base import CouplingGradient
from lightning_altmin.engines.chain import Chain
from lightning_altmin.engines.rule import Rule


class GramCoupling(CouplingGradient):
    r"""Gradient of ``1/2 ||f(c) - f(c_forward) - t||^2`` with respect to ``c``, for ``f`` ending in a linear layer.

    With ``a`` the layer's input and ``s`` what comes before it,

    .. math::
        \nabla = J_s^T \left( W^T W (a - a_{forward}) - W^T t \right)

    where ``W^T W`` and ``W^T t`` are formed once per batch. The plain form multiplies by ``W`` and by ``W^T`` for every
    gradient but the first.

    Args:
        rules: The stage's layers before the linear one.
        linear: The linear layer.
        base: The forward code, shape ``(batch, *code)``.
        states: What encode fixed in ``rules`` for this batch.
        target_move: ``t``, shape ``(batch, out_features)``.
    """

    def __init__(
        self, rules: Sequence[Rule], linear: nn.Linear, base: Tensor, states: Sequence[Any], target_move: Tensor
    ) -> None:
        weight = linear.weight.detach()
        self._below = Chain(rules, base, states)
        self._gram = weight.t() @ weight
        self._pull = target_move @ weight

    def __call__(self, move: Tensor | None) -> Tensor:
        if move is None:
            return self._below.input_gradient(self._pull.neg(), own=True)
        below = self._below.moved(move)
        return below.input_gradient(torch.addmm(self._pull, below.change(None), self._gram, beta=-1), own=True)


def gram_pays(batch: int, linear: nn.Linear, gradients: int) -> bool:
    """Whether the Gram form needs fewer multiply-adds for this many gradients.

    With ``i`` inputs, ``o`` outputs, ``n`` gradients and ``B`` samples the plain form needs ``(2 n - 1) B i o``; this
    one ``B i o`` for the pull, ``i i o`` for the Gram matrix and ``B i i`` for each gradient but the first.
    """
    i, o, repeated = linear.in_features, linear.out_features, gradients - 1
    return i * i * o + repeated * batch * i * i < 2 * repeated * batch * i * o
