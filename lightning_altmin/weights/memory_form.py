"""What a memory does with a layer's statistics: the interface of the innovation form and the solve form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_altmin.arguments import check_count, check_number
from lightning_altmin.losses import LocalLoss
from lightning_altmin.objective import AltMinObjective
from lightning_altmin.stage import Stage
from lightning_altmin.weights.base import Inputs, WeightProblem
from lightning_altmin.weights.least_squares_layer import LeastSquaresLayer
from lightning_altmin.weights.statistics import Statistics

Kept = TypeVar("Kept", bound=Statistics)


@dataclass
class Memory(Generic[Kept]):
    """One layer with what is remembered of it."""

    stage: Stage
    layer: LeastSquaresLayer
    statistics: Kept


class MemoryForm(ABC, Generic[Kept]):
    """How statistics become directions; one form serves all layers of a solver.

    A direction is a matrix ``(outputs, inputs)`` that the optimizer subtracts from the layer's weights and bias.

    Args:
        forgetting: Discount per measurement, in (0, 1].
        every: Batches from one use of new statistics to the next, >= 1.

    Raises:
        ValueError: If a setting is out of its range.
    """

    sets_weights: bool
    """Whether a direction leads to weights that were solved for."""

    def __init__(self, forgetting: float, every: int) -> None:
        check_count("every", every)
        check_number("forgetting", forgetting, above=0, most=1)
        self.forgetting = float(forgetting)
        self.every = every

    @abstractmethod
    def inputs_of(self, stage: Stage) -> Inputs:
        """Which codes a stage's layer reads, if the user does not say."""

    @abstractmethod
    def statistics(self, layer: LeastSquaresLayer) -> Kept:
        """What to keep of a layer, empty."""

    @abstractmethod
    def optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        """What takes the steps."""

    @abstractmethod
    def check(self, memory: Memory[Kept]) -> None:
        """Refuse a layer this form cannot serve.

        Raises:
            ValueError: With the way out.
        """

    def check_objective(self, objective: AltMinObjective) -> None:
        """Refuse an objective whose hidden layers this form cannot fit; here there is none.

        Raises:
            ValueError: With the way out.
        """
        return

    def check_loss(self, loss: LocalLoss) -> None:
        """Refuse a loss that this form cannot follow in the output layer; here there is none.

        Raises:
            ValueError: With the way out.
        """
        return

    @abstractmethod
    def measures(self, number: int) -> bool:
        """Whether statistics are taken in this batch, counted from 0."""

    @abstractmethod
    def renews(self, number: int) -> bool:
        """Whether statistics are used anew in this batch, after its own were taken."""

    @abstractmethod
    def targets(self, problem: WeightProblem, memory: Memory[Kept]) -> tuple[Tensor | None, Tensor | None]:
        """What the layer's output should be, and each sample's weight; ``None``: no targets, and equal weights."""

    @abstractmethod
    def direction(self, problem: WeightProblem, memory: Memory[Kept]) -> Tensor | None:
        """Of a batch that does not renew; ``None`` leaves the layer as it is."""

    @abstractmethod
    def pending(self, problem: WeightProblem, memory: Memory[Kept]) -> Tensor | None:
        """What a batch that renews has to say before the statistics of all processes are in."""

    @abstractmethod
    def renewed_direction(self, memory: Memory[Kept], pending: Tensor | None) -> Tensor:
        """Of a batch that renews, computed from the new statistics."""


def precision(layer: LeastSquaresLayer, least: torch.dtype) -> torch.dtype:
    """Of a layer's statistics: its own, or ``least`` where a device has that."""
    weight = layer.layer.weight
    return torch.promote_types(weight.dtype, torch.float32 if weight.device.type == "mps" else least)
