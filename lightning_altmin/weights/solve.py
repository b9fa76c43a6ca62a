"""The solve form: weights are the solution of the least-squares problem over all that a layer has seen."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_altmin.arguments import check_count, check_number
from lightning_altmin.losses import CrossEntropy, LocalLoss, MeanSquaredError, ModuleLoss
from lightning_altmin.losses.targets import label_weights
from lightning_altmin.objective import AltMinObjective, ReferenceObjective
from lightning_altmin.stage import Stage
from lightning_altmin.weights.base import Inputs, WeightProblem
from lightning_altmin.weights.bcd import bcd
from lightning_altmin.weights.layer_statistics import LayerStatistics
from lightning_altmin.weights.least_squares_layer import LeastSquaresLayer
from lightning_altmin.weights.limited_descent import LimitedDescent
from lightning_altmin.weights.memory_form import Memory, MemoryForm, precision
from lightning_altmin.weights.ridge import ridge_solution
from lightning_altmin.weights.triangle_statistics import TriangleStatistics
from lightning_altmin.weights.window_statistics import WindowStatistics


class NormalEquations(ABC):
    """How the least-squares problem of one layer is solved."""

    @abstractmethod
    def __call__(self, weights: Tensor, A: Tensor, B: Tensor, has_bias: bool) -> Tensor:
        """The new weights, shape ``(outputs, inputs)``, given those of now and the statistics."""


class CoordinateDescent(NormalEquations):
    """One sweep of `bcd` from the weights as they are: the paper's update."""

    def __init__(self, lambda_w: float = 0.0) -> None:
        check_number("lambda_w", lambda_w, least=0)
        self._lambda_w = float(lambda_w)

    def __call__(self, weights: Tensor, A: Tensor, B: Tensor, has_bias: bool) -> Tensor:
        return bcd(weights, A, B, self._lambda_w, bias=has_bias)


class Cholesky(NormalEquations):
    """The ridge solution, in closed form."""

    def __init__(self, ridge: float = 1e-3) -> None:
        check_number("ridge", ridge, least=0, most=1_000_000)
        self._ridge = float(ridge)

    def __call__(self, weights: Tensor, A: Tensor, B: Tensor, has_bias: bool) -> Tensor:
        return ridge_solution(A, B, self._ridge)


_OTHERWISE = 'give the output stage another solver: LayerwiseWeights({"output": LocalGradient(), "default": ...})'

EQUATIONS: dict[str, type[NormalEquations]] = {"cholesky": Cholesky, "bcd": CoordinateDescent}


Storage = Literal["full", "triangle", "single"]
"""How A is kept between batches: all of it, one triangle, or that in single precision."""
Sums = LayerStatistics | TriangleStatistics


class SolveForm(MemoryForm[Sums]):
    """``W`` from ``A`` and ``B``, every k batches (arXiv 1806.09077, updateMemory and updateWeights).

    Hidden layers are fitted to their moved codes, the output layer to one-hot labels, each sample weighted as the loss
    weights its class, or to the targets themselves.

    Args:
        solver: How the problem is solved, ``"cholesky"`` or ``"bcd"``.
        forgetting: Discount of A and B per batch, in (0, 1].
        every: Batches from one solution to the next; all batches are in the statistics.
        window: Number of tasks to solve for, the latest ones, >= 1; ``None`` for all that was seen.
        storage: ``"full"``; ``"triangle"``: of A one triangle, half the bytes; ``"single"``: that in single precision.
        equations: ``ridge`` of ``"cholesky"``, ``lambda_w`` of ``"bcd"``.
    """

    sets_weights = True

    def __init__(
        self,
        solver: str = "cholesky",
        forgetting: float = 1.0,
        every: int = 10,
        window: int | None = None,
        storage: Storage = "full",
        **equations: float,
    ) -> None:
        super().__init__(forgetting, every)
        if solver not in EQUATIONS:
            raise ValueError(f"solver must be 'cholesky' or 'bcd', got {solver!r}")
        if window is not None:
            check_count("window", window)
        if storage not in ("full", "triangle", "single"):
            raise ValueError(f"storage must be 'full', 'triangle' or 'single', got {storage!r}")
        if window is not None and storage != "full":
            raise ValueError(
                f"storage={storage!r} keeps one sum, and window={window} one per task; leave one of them out"
            )
        if "ridge" in equations and solver != "cholesky":
            raise ValueError("ridge belongs to solver='cholesky': coordinate descent inverts nothing")
        if "lambda_w" in equations and solver != "bcd":
            raise ValueError(
                f"lambda_w={equations['lambda_w']} belongs to solver='bcd': the ridge solution shrinks by its ridge"
            )
        self._equations = EQUATIONS[solver](**equations)
        if storage == "single" and solver == "cholesky" and equations.get("ridge", 1.0) < 1e-4:
            raise ValueError(
                f"storage='single' rounds the sums, and ridge={equations['ridge']:g} lets that rounding through; give "
                "a ridge >= 1e-4, or storage='triangle'"
            )
        self.window = window
        self._storage = storage

    def inputs_of(self, stage: Stage) -> Inputs:
        return "forward" if stage.is_output else "moved"  # the output layer's moved input knows the label

    def statistics(self, layer: LeastSquaresLayer) -> Sums:
        dtype = precision(layer, torch.float64)  # sums over a whole stream lose digits in single precision
        if self._storage != "full":
            return TriangleStatistics(layer, torch.float32 if self._storage == "single" else dtype, dtype)
        if self.window is not None:
            return WindowStatistics(layer, dtype, self.window)
        return LayerStatistics(layer, dtype, targets=True, inverse=False)

    def optimizer(self, groups: list[dict[str, Any]]) -> LimitedDescent:
        return LimitedDescent(groups, lr=1.0)

    def check(self, memory: Memory[Sums]) -> None:
        if (after := memory.stage.affine[1:]) and not all(isinstance(m, nn.Dropout | nn.Identity) for m in after):
            raise ValueError(
                f"form='solve' needs the code to be the layer's own output, but stage {memory.stage.name!r} has "
                f"{[type(m).__name__ for m in after]} after it; use form='innovation', or train this stage otherwise: "
                f'LayerwiseWeights({{"{memory.stage.name}": LocalGradient(), "default": ...}})'
            )

    def check_objective(self, objective: AltMinObjective) -> None:
        coupling = type(objective).weight_coupling_gradient
        if coupling not in (AltMinObjective.weight_coupling_gradient, ReferenceObjective.weight_coupling_gradient):
            raise ValueError(
                f"form='solve' fits layers to their codes by least squares, and {type(objective).__name__} has a "
                "weight_coupling_gradient of its own, which it would not follow; use form='innovation'"
            )

    def check_loss(self, loss: LocalLoss) -> None:
        if isinstance(loss, CrossEntropy) and loss.module.label_smoothing > 0:
            raise ValueError(
                f"form='solve' fits the output layer to labels by least squares, to which "
                f"label_smoothing={loss.module.label_smoothing:g} says nothing; leave it out, or {_OTHERWISE}"
            )
        if not isinstance(loss, CrossEntropy | MeanSquaredError):
            given = type(loss.module).__name__ if isinstance(loss, ModuleLoss) else "a function"
            raise ValueError(
                f"form='solve' fits the output layer by least squares, which does not minimise the loss, {given}; "
                f"use nn.CrossEntropyLoss() or nn.MSELoss(), or {_OTHERWISE}"
            )

    def measures(self, number: int) -> bool:
        return True

    def renews(self, number: int) -> bool:
        return (number + 1) % self.every == 0

    def targets(self, problem: WeightProblem, memory: Memory[Sums]) -> tuple[Tensor, Tensor | None]:
        weights = None
        if problem.move is not None:
            target = problem.target
        elif isinstance(problem.loss.loss, CrossEntropy) and not problem.loss.target.is_floating_point():
            target, weights = _one_hot(problem, problem.loss.loss.module)
        else:
            target = self._given_targets(problem)
        bias = memory.layer.layer.bias
        if bias is not None and not memory.layer.has_bias:  # frozen: not part of what is solved for
            per_channel = isinstance(memory.layer.layer, nn.Conv2d)
            target = target - bias.detach().reshape((-1, 1, 1) if per_channel else (-1,))
        return target, weights

    def _given_targets(self, problem: WeightProblem) -> Tensor:
        loss, target = problem.loss.loss, problem.loss.target
        if isinstance(loss, CrossEntropy) and loss.module.weight is not None:
            raise ValueError(
                "form='solve' weights a sample by the weight of its class, and y holds probabilities of several; leave "
                f"CrossEntropyLoss's weight out, or {_OTHERWISE}"
            )
        given: Tensor = target.to(problem.forward_output.dtype)
        return given

    def direction(self, problem: WeightProblem, memory: Memory[Sums]) -> None:
        return None

    def pending(self, problem: WeightProblem, memory: Memory[Sums]) -> None:
        return None

    def renewed_direction(self, memory: Memory[Sums], pending: Tensor | None) -> Tensor:
        solution = self.solution(memory)
        return memory.layer.matrix().to(solution.dtype) - solution

    def solution(self, memory: Memory[Sums]) -> Tensor:
        """The weights that the statistics ask for, shape ``(outputs, inputs)``."""
        A, B = memory.statistics.sums()
        weights, layer = memory.layer.matrix().to(A.dtype), memory.layer
        with torch.autocast(A.device.type, enabled=False):
            if not layer.keeps_bias:
                return self._equations(weights, A, B, layer.has_bias)
            # The bias was frozen: its part of the targets is not for the weights to meet.
            weights, bias = weights[:, :-1], weights[:, -1:]
            rest = B[:, :-1] - bias * A[-1:, :-1]
            return torch.cat([self._equations(weights, A[:-1, :-1], rest, False), bias], 1)


def _one_hot(problem: WeightProblem, loss: nn.CrossEntropyLoss) -> tuple[Tensor, Tensor]:
    """Labels as rows of zeros with a one, and the weight of each sample: its class's, 0 if it is ignored."""
    output = problem.forward_output
    if output.dim() != 2:
        raise ValueError(
            f"form='solve' takes one label per sample, the output has shape {tuple(output.shape)}; {_OTHERWISE}"
        )
    labels = problem.loss.target
    dtype = torch.promote_types(output.dtype, torch.float32)
    target = functional.one_hot(labels.where(labels != loss.ignore_index, 0), output.shape[1]).to(dtype)
    return target, label_weights(loss, output, labels).to(dtype)
