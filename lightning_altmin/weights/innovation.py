"""The innovation form: the memory as preconditioner of each layer's local gradient."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_altmin.weights.base import WeightProblem
from lightning_altmin.weights.memory_form import Memory, MemoryForm

Positions = Literal["root", "mean"]


class InnovationForm(MemoryForm):
    r"""Direction :math:`\frac{1}{n \sqrt p} \sum d a^\top (A + ridge)^{-1}`, ``A`` the discounted mean of ``a a^T``.

    ``d`` is the gradient of a sample's local problem with respect to the layer's output, the wanted change with its
    sign turned; the sum runs over the ``n`` samples of the batch and their ``p`` positions.

    Args:
        ridge: Relative to the mean of A's diagonal, > 0.
        every: Batches from one measurement of A to the next; before batch ``every``, at 0 and all powers of two.
        positions: What the sum over positions is divided by: their number (``"mean"``) or its ``"root"``.
    """

    keeps_targets = False
    keeps_inverse = True

    def __init__(self, ridge: float, every: int, positions: Positions) -> None:
        self._ridge, self._every = ridge, every
        self._power = 0.5 if positions == "root" else 1.0

    def check(self, memory: Memory) -> None:
        pass  # a gradient exists for any layer in any place

    def measures(self, number: int) -> bool:
        early = number & (number - 1) == 0  # 0, 1, 2, 4, 8: a young mean changes fast
        return number % self._every == 0 or (early and number < self._every)

    def renews(self, number: int) -> bool:
        return self.measures(number)

    def targets(self, problem: WeightProblem, memory: Memory) -> tuple[Tensor | None, Tensor | None]:
        return None, None

    def direction(self, problem: WeightProblem, memory: Memory) -> Tensor:
        layer = memory.layer
        alone = problem.stage.affine == [layer.layer] and problem.forward_output.dim() == 2
        if not alone or problem.input.shape[0] >= layer.outputs:
            return memory.statistics.preconditioned(self.pending(problem, memory))
        # With fewer rows than outputs, preconditioning the inputs costs less than preconditioning their products.
        inputs = layer.rows(problem.live.layer_input(layer.layer))
        with torch.autocast(inputs.device.type, enabled=False):
            turned = memory.statistics.preconditioned(inputs)
            return problem.output_gradient.t().to(turned.dtype) @ turned

    def pending(self, problem: WeightProblem, memory: Memory) -> Tensor:
        layer = memory.layer
        gradients = dict(problem.smooth_gradients)
        positions = layer.positions(problem.live.layer_input(layer.layer))
        return layer.join([gradients[p] for p in layer.parameters]) / positions**self._power

    def renewed_direction(self, memory: Memory, pending: Tensor | None) -> Tensor:
        assert pending is not None
        memory.statistics.renew(self._ridge)
        return memory.statistics.preconditioned(pending)
