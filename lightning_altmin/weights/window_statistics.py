"""The statistics of a layer task by task, of the last tasks only."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_altmin.weights.layer_statistics import LayerStatistics
from lightning_altmin.weights.least_squares_layer import LeastSquaresLayer


class WindowStatistics(LayerStatistics):
    """``A`` and ``B`` of the task of now, and those of the tasks before it, each by itself.

    Sums of a task that leaves the window are dropped, not subtracted, so nothing of them stays, rounding included.

    Args:
        layer: The layer.
        dtype: Of the sums.
        window: Number of tasks, that of now included, >= 1.

    Attributes:
        past_inputs: ``A`` of the tasks before, the latest first, shape ``(window - 1, inputs, inputs)``.
        past_targets: ``B`` likewise, shape ``(window - 1, outputs, inputs)``.
        past_rows: Numbers of rows likewise, shape ``(window - 1,)``. None of these three is ever a share.
    """

    past_inputs: Tensor
    past_targets: Tensor
    past_rows: Tensor

    def __init__(self, layer: LeastSquaresLayer, dtype: torch.dtype, window: int) -> None:
        super().__init__(layer, dtype, targets=True, inverse=False)
        assert self.B is not None
        for name, current in (("past_inputs", self.A), ("past_targets", self.B), ("past_rows", self.rows)):
            self.register_buffer(name, current.new_zeros(window - 1, *current.shape))

    def add(
        self,
        x: Tensor,
        target: Tensor | None = None,
        weights: Tensor | None = None,
        forgetting: float = 1.0,
        processes: int = 1,
    ) -> None:
        super().add(x, target, weights, forgetting, processes)
        if forgetting < 1:
            self._discount_past(forgetting)

    def begin_task(self) -> None:
        """Count what follows as another task, and drop the oldest if there are more than ``window`` now.

        The sums must be whole: see ``CoactivationMemory.synchronize``.
        """
        assert self.B is not None
        self.past_inputs = _shifted(self.past_inputs, self.A)
        self.past_targets = _shifted(self.past_targets, self.B)
        self.past_rows = _shifted(self.past_rows, self.rows)
        super().discount(0.0)

    def discount(self, factor: float) -> None:
        super().discount(factor)
        self._discount_past(factor)

    def sums(self) -> tuple[Tensor, Tensor]:
        A, B = super().sums()
        return A + self.past_inputs.sum(0), B + self.past_targets.sum(0)

    def count(self) -> Tensor:
        return self.rows + self.past_rows.sum()

    def energy(self) -> Tensor:
        return super().energy() + self.past_inputs.diagonal(dim1=1, dim2=2).sum()

    @property
    def shape(self) -> str:
        return f"{super().shape}, of {len(self.past_rows) + 1} tasks"

    def _discount_past(self, factor: float) -> None:
        self.past_inputs, self.past_targets = self.past_inputs * factor, self.past_targets * factor
        self.past_rows = self.past_rows * factor


def _shifted(past: Tensor, latest: Tensor) -> Tensor:
    """What is past now, without the oldest."""
    return torch.cat([latest.unsqueeze(0), past])[: len(past)]
