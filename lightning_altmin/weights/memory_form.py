"""What a memory does with a layer's statistics: the interface of the innovation form and the solve form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from lightning_altmin.network import Stage
from lightning_altmin.weights.base import WeightProblem
from lightning_altmin.weights.layer_statistics import LayerStatistics
from lightning_altmin.weights.least_squares_layer import LeastSquaresLayer
from lightning_altmin.weights.low_rank_statistics import LowRankStatistics


@dataclass
class Memory:
    """One layer with what is remembered of it."""

    stage: Stage
    layer: LeastSquaresLayer
    statistics: LayerStatistics | LowRankStatistics


class MemoryForm(ABC):
    """How statistics become directions; one form serves all layers of a solver.

    A direction is a matrix ``(outputs, inputs)`` that the optimizer subtracts from the layer's weights and bias.
    """

    keeps_targets: bool
    """Whether the statistics include B."""
    keeps_inverse: bool
    """Whether a damped inverse is kept from batch to batch."""

    @abstractmethod
    def check(self, memory: Memory) -> None:
        """Refuse a layer this form cannot serve.

        Raises:
            ValueError: With the way out.
        """

    @abstractmethod
    def measures(self, number: int) -> bool:
        """Whether statistics are taken in this batch, counted from 0."""

    @abstractmethod
    def renews(self, number: int) -> bool:
        """Whether statistics are used anew in this batch, after its own were taken."""

    @abstractmethod
    def targets(self, problem: WeightProblem, memory: Memory) -> tuple[Tensor | None, Tensor | None]:
        """What the layer's output should be, and which samples count; ``None`` for no targets, and for all samples."""

    @abstractmethod
    def direction(self, problem: WeightProblem, memory: Memory) -> Tensor | None:
        """Of a batch that does not renew; ``None`` leaves the layer as it is."""

    @abstractmethod
    def pending(self, problem: WeightProblem, memory: Memory) -> Tensor | None:
        """What a batch that renews has to say before the statistics of all processes are in."""

    @abstractmethod
    def renewed_direction(self, memory: Memory, pending: Tensor | None) -> Tensor:
        """Of a batch that renews, computed from the new statistics."""
