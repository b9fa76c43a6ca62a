"""The innovation form: the memory as preconditioner of each layer's local gradient."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_altmin.arguments import check_count, check_number
from lightning_altmin.stage import Stage
from lightning_altmin.weights.base import Inputs, WeightProblem
from lightning_altmin.weights.diagonal_statistics import DiagonalStatistics
from lightning_altmin.weights.layer_statistics import LayerStatistics
from lightning_altmin.weights.least_squares_layer import LeastSquaresLayer
from lightning_altmin.weights.limited_descent import LimitedDescent
from lightning_altmin.weights.low_rank_statistics import LowRankStatistics
from lightning_altmin.weights.memory_form import Memory, MemoryForm, precision
from lightning_altmin.weights.statistics import Preconditioner

Positions = Literal["root", "mean"]


class InnovationForm(MemoryForm[Preconditioner]):
    r"""Direction :math:`\frac{1}{n \sqrt p} \sum d a^\top (A + ridge)^{-1}`, ``A`` the discounted mean of ``a a^T``.

    ``d`` is the gradient of a sample's local problem with respect to the layer's output, the wanted change with its
    sign turned; the sum runs over the ``n`` samples of the batch and their ``p`` positions.

    Args:
        ridge: Relative to the mean of A's diagonal, in [0.1, 10].
        forgetting: Discount of A per measurement, in (0, 1].
        step: The optimizer's learning rate, in (0, 1].
        limit: Largest change of a layer in one step, relative to its norm at the first, > 0; infinite for no bound.
        positions: What the sum over positions is divided by: their number (``"mean"``) or its ``"root"``.
        rank: Leading directions of A to keep in layers with more inputs than that, >= 0; 0 keeps its diagonal, ``None``
            all of A.
        every: Batches from one measurement of A to the next; before batch ``every``, at 0 and all powers of two.
    """

    sets_weights = False

    def __init__(
        self,
        ridge: float = 1.0,
        forgetting: float = 0.95,
        step: float = 0.8,
        limit: float = 0.2,
        positions: Positions = "root",
        rank: int | None = None,
        every: int = 10,
    ) -> None:
        super().__init__(forgetting, every)
        if positions not in ("root", "mean"):
            raise ValueError(f"positions must be 'root' or 'mean', got {positions!r}")
        if limit != math.inf:
            check_number("limit", limit, above=0, otherwise="math.inf for no bound")
        if rank is not None:
            check_count("rank", rank, 0)
        check_number("ridge", ridge, least=0.1, most=10)
        check_number("step", step, above=0, most=1)
        self._ridge, self._step, self._limit, self._rank = float(ridge), float(step), limit, rank
        self._power = 0.5 if positions == "root" else 1.0

    def inputs_of(self, stage: Stage) -> Inputs:
        return "forward"

    def statistics(self, layer: LeastSquaresLayer) -> Preconditioner:
        dtype = precision(layer, torch.float32)  # a moving average: sums do not grow
        if self._rank is None or layer.inputs <= self._rank:
            return LayerStatistics(layer, dtype, targets=False, inverse=True)
        return LowRankStatistics(layer, self._rank, dtype) if self._rank > 0 else DiagonalStatistics(layer, dtype)

    def optimizer(self, groups: list[dict[str, Any]]) -> LimitedDescent:
        return LimitedDescent(groups, lr=self._step, limit=self._limit)

    def check(self, memory: Memory[Preconditioner]) -> None:
        pass  # a gradient exists for any layer in any place

    def measures(self, number: int) -> bool:
        early = number & (number - 1) == 0  # 0, 1, 2, 4, 8: a young mean changes fast
        return number % self.every == 0 or (early and number < self.every)

    def renews(self, number: int) -> bool:
        return self.measures(number)

    def targets(self, problem: WeightProblem, memory: Memory[Preconditioner]) -> tuple[None, None]:
        return None, None

    def direction(self, problem: WeightProblem, memory: Memory[Preconditioner]) -> Tensor:
        layer = memory.layer
        alone = problem.stage.affine == [layer.layer] and problem.forward_output.dim() == 2
        if not alone or problem.input.shape[0] >= layer.outputs or layer.keeps_bias:
            return self._preconditioned(memory, self.pending(problem, memory))
        # With fewer rows than outputs, preconditioning the inputs costs less than preconditioning their products.
        inputs = layer.rows(problem.live.layer_input(layer.layer))
        with torch.autocast(inputs.device.type, enabled=False):
            turned = memory.statistics.preconditioned(inputs)
            return problem.output_gradient.t().to(turned.dtype) @ turned

    def pending(self, problem: WeightProblem, memory: Memory[Preconditioner]) -> Tensor:
        layer = memory.layer
        gradients = dict(problem.smooth_gradients)
        positions = layer.positions(problem.live.layer_input(layer.layer))
        # A bias that was frozen has none.
        asked = [gradients[p] if p in gradients else torch.zeros_like(p) for p in layer.parameters]
        return layer.join(asked) / positions**self._power

    def renewed_direction(self, memory: Memory[Preconditioner], pending: Tensor | None) -> Tensor:
        assert pending is not None
        memory.statistics.renew(self._ridge)
        return self._preconditioned(memory, pending)

    @staticmethod
    def _preconditioned(memory: Memory[Preconditioner], matrix: Tensor) -> Tensor:
        """``matrix (A + ridge)^-1``; where the bias keeps its value, with A that of the other inputs alone.

        That is row operations on the whole inverse P: of all ``[G, g] P`` the one whose column of biases is zero. Its
        other columns are G times the inverse of A's other block, by the formula of the Schur complement.
        """
        found = memory.statistics.preconditioned(matrix)
        if not memory.layer.keeps_bias:
            return found
        unit = matrix.new_zeros(1, matrix.shape[1])
        unit[0, -1] = 1.0
        of_bias = memory.statistics.preconditioned(unit)
        tiny = torch.finfo(of_bias.dtype).tiny  # of an inverse that is zero still
        return found - found[:, -1:] * (of_bias / of_bias[:, -1:].clamp_min(tiny))
