"""Cross-entropy in closed form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_altmin.losses.base import LossAt
from lightning_altmin.losses.class_labels import ClassLabelLoss
from lightning_altmin.losses.targets import label_weights

aten = torch.ops.aten
_MEAN, _SUM = 1, 2  # ATen's numbers of the reductions


class CrossEntropy(ClassLabelLoss):
    """``nn.CrossEntropyLoss`` in closed form for outputs ``(batch, classes)`` and class-index targets.

    Class weights, ``ignore_index`` and label smoothing are covered; other shapes and soft targets go through
    autograd.
    """

    def mean_gradient(self, output: Tensor, target: Any) -> Tensor:
        if not self._has_closed_form(output, target):
            return super().mean_gradient(output, target)
        return self._sample_gradients(output, target) / self._class_weights(output, target).sum()

    def total_gradient(self, output: Tensor, target: Any) -> Tensor:
        if not self._has_closed_form(output, target):
            return super().total_gradient(output, target)
        return self._sample_gradients(output, target)

    def at(self, output: Tensor, target: Any) -> LossAt:
        if self._has_closed_form(output, target) and self.module.label_smoothing == 0:
            return _HardCrossEntropyAt(self, output, target)
        return super().at(output, target)

    def _has_closed_form(self, output: Tensor, target: Any) -> bool:
        return output.dim() == 2 and not target.is_floating_point()

    def _class_weights(self, output: Tensor, target: Tensor) -> Tensor:
        return label_weights(self.module, output, target)

    def _sample_gradients(self, output: Tensor, target: Tensor) -> Tensor:
        """Row i: gradient of sample i's loss, ``(1 - e) w_y (p - onehot) + e / C * (p sum(w) - w)``."""
        probabilities = torch.softmax(output, 1)
        smoothing, weight, classes = self.module.label_smoothing, self.module.weight, output.shape[1]
        valid = self._valid(target)
        own = (1.0 - smoothing) * self._class_weights(output, target).unsqueeze(1)
        gradient = probabilities * own
        gradient.scatter_add_(1, target.where(valid, 0).unsqueeze(1), -own)
        if smoothing > 0:
            spread = probabilities * (classes if weight is None else weight.sum()) - (1 if weight is None else weight)
            gradient += (smoothing / classes) * spread * valid.unsqueeze(1)
        return gradient


class _HardCrossEntropyAt(LossAt):
    """Cross-entropy of class indices without smoothing, by the library's own kernels and with one softmax for all."""

    def __init__(self, loss: CrossEntropy, output: Tensor, target: Tensor) -> None:
        super().__init__(loss, output, target)
        self._module = loss.module
        self._weight, self._ignored = loss.module.weight, loss.module.ignore_index
        self._logarithms = torch.log_softmax(output, 1)
        self._mean, self._weight_sum = aten.nll_loss_forward(
            self._logarithms, target, self._weight, _MEAN, self._ignored
        )

    def mean(self) -> Tensor:
        mean: Tensor = self._mean
        return mean

    def mean_gradient(self) -> Tensor:
        return self.total_gradient() / self._weight_sum

    def total_gradient(self) -> Tensor:
        """``w_y (p - onehot)`` per sample."""
        if self._total_gradient is None:
            gradient = aten.nll_loss_backward(
                self._weight_sum.new_ones(()),
                self._logarithms,
                self.target,
                self._weight,
                _SUM,
                self._ignored,
                self._weight_sum,
            )
            self._total_gradient = aten._log_softmax_backward_data(gradient, self._logarithms, 1, self.output.dtype)
        return self._total_gradient

    def changes(self, moves: Tensor) -> Tensor:
        """``w_y (log sum_k p_k exp(m_k) - m_y)`` for each row ``m``: one matrix product for all rows and samples."""
        largest = moves.amax(1)
        sums = self._logarithms.exp() @ (moves - largest.unsqueeze(1)).exp().t()
        logarithms = sums.clamp_min(torch.finfo(sums.dtype).tiny).log() + largest
        labels = self.target.where(self.target != self._ignored, 0)
        return (logarithms - moves.t()[labels]) * label_weights(self._module, self.output, self.target).unsqueeze(1)
