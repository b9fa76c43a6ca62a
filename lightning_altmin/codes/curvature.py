"""Gradient steps whose length follows a running estimate of each code's curvature: the default code step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_altmin.arguments import check_count, check_number
from lightning_altmin.codes.base import CodeProblem, CodeSolver

_DECAY = 0.8  # of the estimate per measurement where the curvature falls; where it rises, the rise counts at once
_FIRST = 5  # batches measured one by one before the interval counts


class CurvatureCodes(CodeSolver):
    r"""Steepest descent on a code at the rate ``share / kappa``, ``kappa`` its problem's curvature so far.

    .. math::
        c \leftarrow c - \frac{share}{\kappa} g, \qquad
        \kappa = \frac{\sum_i \langle g_i, H_i g_i \rangle}{\sum_i \langle g_i, g_i \rangle} \ge 1

    with ``g`` the gradient of ``J / mu`` and ``H g`` from a secant (`CodeProblem.curvature`), measured over the samples
    of every ``every``-th batch and used from the next batch on. So a rate suits every layer at every time, costs
    next to nothing, and the codes of a sample do not depend on the batch it came in. The first five batches of training
    all measure.

    The shares taken on the way down are divided out again in the weight step (`WeightProblem.signal`): a layer's
    weight gradient keeps the size of backprop's at any depth and does not change when the curvature does, which an
    optimizer with a memory (momentum, Adam) would take for a change of the problem.

    Moves shrink on the way down, by about ``share / kappa`` per layer. Single precision holds them through some 25
    hidden layers; deeper networks need a larger share.

    Args:
        share: Share of the exact step, in (0, 1]. Small shares keep the moved inputs of the weight step close to the
            forward ones, and with them the update close to backprop's; 1 lets codes move as far as their problem asks.
            The curvature is that of the gradient's own direction: along others it may be several times as large, so
            convolutions want small shares.
        steps: Number of steps per code, >= 1.
        every: Batches from one measurement to the next, >= 1; a measurement costs one forward pass of each stage.

    Raises:
        ValueError: If an argument is out of its range.
    """

    reads_outputs = False
    curvature: Tensor
    _sums: Tensor

    def __init__(self, share: float = 0.05, steps: int = 1, every: int = 10) -> None:
        super().__init__()
        check_number("share", share, above=0, most=1)
        for name, value in (("steps", steps), ("every", every)):
            check_count(name, value)
        self.share = share
        self.steps = steps
        self.every = every

    def prepare(self, depth: int) -> None:
        if hasattr(self, "curvature"):
            raise ValueError("codes: this CurvatureCodes belongs to another model; make one for each")
        # 1 is the anchor's share, the least that the curvature can be.
        self.register_buffer("curvature", torch.ones(depth, dtype=torch.float64))
        # Numerator and denominator of each code, over the samples seen since the estimate was last renewed.
        self.register_buffer("_sums", torch.zeros(depth, 2, dtype=torch.float64), persistent=False)

    def measures(self, batch: int) -> bool:
        return batch < _FIRST or batch % self.every == 0

    def solve(self, problem: CodeProblem) -> Tensor:
        rate = self.share / self.curvature[problem.level]
        problem.expect(self.steps, any_order=True)
        gradient = problem.gradient()
        if problem.measures:
            self._measure(problem, gradient)
        move = gradient.mul_(-rate)
        for _ in range(self.steps - 1):
            move.sub_(problem.gradient(move).mul_(rate))
        # n steps against the anchor alone: the share of the code's whole way that they cover.
        problem.rate = rate if self.steps == 1 else 1 - (1 - rate) ** self.steps
        return problem.restored(move)

    def measured(self) -> list[Tensor]:
        return [self._sums]

    def learn(self, sums: Sequence[Tensor]) -> None:
        (bend_and_slope,) = sums
        bend, slope = bend_and_slope.unbind(1)
        # A batch without a gradient says nothing; the smallest number keeps it from saying NaN.
        found = bend / slope.clamp_min(torch.finfo(torch.float32).tiny)
        risen = torch.maximum(found, self.curvature * _DECAY + found * (1 - _DECAY)).clamp_min(1.0)
        self.curvature.copy_(risen)
        self._sums.zero_()

    def _measure(self, problem: CodeProblem, gradient: Tensor) -> None:
        bend, slope = problem.curvature(gradient).sum(), gradient.square().sum()
        self._sums[problem.level] += torch.stack([bend, slope])

    def extra_repr(self) -> str:
        return f"share={self.share:g}, steps={self.steps}, every={self.every}"
