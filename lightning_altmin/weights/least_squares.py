"""The solve form: weights are the solution of the least-squares problem over all that a layer has seen."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_altmin.losses import CrossEntropy
from lightning_altmin.weights.base import WeightProblem
from lightning_altmin.weights.bcd import bcd
from lightning_altmin.weights.layer_statistics import LayerStatistics
from lightning_altmin.weights.memory_form import Memory, MemoryForm
from lightning_altmin.weights.ridge import ridge_solution


class NormalEquations(ABC):
    """How the least-squares problem of one layer is solved."""

    @abstractmethod
    def __call__(self, weights: Tensor, A: Tensor, B: Tensor, has_bias: bool) -> Tensor:
        """The new weights, shape ``(outputs, inputs)``, given those of now and the statistics."""


class CoordinateDescent(NormalEquations):
    """One sweep of `bcd` from the weights as they are: the paper's update."""

    def __init__(self, lambda_w: float) -> None:
        self._lambda_w = lambda_w

    def __call__(self, weights: Tensor, A: Tensor, B: Tensor, has_bias: bool) -> Tensor:
        return bcd(weights, A, B, self._lambda_w, bias=has_bias)


class Cholesky(NormalEquations):
    """The ridge solution, in closed form."""

    def __init__(self, ridge: float) -> None:
        self._ridge = ridge

    def __call__(self, weights: Tensor, A: Tensor, B: Tensor, has_bias: bool) -> Tensor:
        return ridge_solution(A, B, self._ridge)


class SolveForm(MemoryForm):
    """``W`` from ``A`` and ``B``, every k batches (arXiv 1806.09077, updateMemory and updateWeights).

    Hidden layers are fitted to their moved codes, the output layer to one-hot labels or to the targets themselves.

    Args:
        equations: How the problem is solved.
        every: Batches from one solution to the next; all batches are in the statistics.
    """

    keeps_targets = True
    keeps_inverse = False

    def __init__(self, equations: NormalEquations, every: int) -> None:
        self._equations, self._every = equations, every

    def check(self, memory: Memory) -> None:
        if (after := memory.stage.affine[1:]) and not all(isinstance(m, nn.Dropout | nn.Identity) for m in after):
            raise ValueError(
                f"form='solve' needs the code to be the layer's own output, but stage {memory.stage.name!r} has "
                f"{[type(m).__name__ for m in after]} after it; use form='innovation', or train this stage otherwise: "
                f'LayerwiseWeights({{"{memory.stage.name}": LocalGradient(), "default": ...}})'
            )

    def measures(self, number: int) -> bool:
        return True

    def renews(self, number: int) -> bool:
        return (number + 1) % self._every == 0

    def targets(self, problem: WeightProblem, memory: Memory) -> tuple[Tensor, Tensor | None]:
        mask = None
        if problem.move is not None:
            target = problem.target
        elif isinstance(problem.loss, CrossEntropy) and not problem.y.is_floating_point():
            target, mask = _one_hot(problem, problem.loss.module.ignore_index)
        elif isinstance(problem.y, Tensor) and problem.y.shape == problem.forward_output.shape:
            target = problem.y.to(problem.forward_output.dtype)
        else:
            raise ValueError(
                f"form='solve' fits the output layer to class labels of a CrossEntropyLoss or to targets of the "
                f"output's shape {tuple(problem.forward_output.shape)}; give the output stage another solver: "
                'LayerwiseWeights({"output": LocalGradient(), "default": ...})'
            )
        bias = memory.layer.layer.bias
        if bias is not None and not memory.layer.has_bias:  # frozen: not part of what is solved for
            per_channel = isinstance(memory.layer.layer, nn.Conv2d)
            target = target - bias.detach().reshape((-1, 1, 1) if per_channel else (-1,))
        return target, mask

    def direction(self, problem: WeightProblem, memory: Memory) -> None:
        return None

    def pending(self, problem: WeightProblem, memory: Memory) -> None:
        return None

    def renewed_direction(self, memory: Memory, pending: Tensor | None) -> Tensor:
        solution = self.solution(memory)
        return memory.layer.matrix().to(solution.dtype) - solution

    def solution(self, memory: Memory) -> Tensor:
        """The weights that the statistics ask for, shape ``(outputs, inputs)``."""
        statistics = memory.statistics
        assert isinstance(statistics, LayerStatistics)
        assert statistics.B is not None
        weights = memory.layer.matrix().to(statistics.A.dtype)
        return self._equations(weights, statistics.A, statistics.B, memory.layer.has_bias)


def _one_hot(problem: WeightProblem, ignored: int) -> tuple[Tensor, Tensor | None]:
    """Labels as rows of zeros with a one, and which samples have one."""
    if problem.forward_output.dim() != 2:
        raise ValueError(
            f"form='solve' takes one label per sample, the output has shape {tuple(problem.forward_output.shape)}; "
            'give the output stage another solver: LayerwiseWeights({"output": LocalGradient(), "default": ...})'
        )
    labelled = problem.y != ignored
    labels = problem.y.where(labelled, 0)
    dtype = torch.promote_types(problem.forward_output.dtype, torch.float32)
    target = functional.one_hot(labels, problem.forward_output.shape[1]).to(dtype)
    return target, labelled.to(dtype)
