"""Losses whose gradients autograd gives: any function, any loss module."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_altmin.losses.base import LocalLoss, Loss
from lightning_altmin.losses.targets import check_same_shape, label_weights


class _AutogradLoss(LocalLoss):
    """Gradients through a graph of the loss alone."""

    def mean_gradient(self, output: Tensor, target: Any) -> Tensor:
        return self._gradient(self.mean, output, target)

    def total_gradient(self, output: Tensor, target: Any) -> Tensor:
        return self._gradient(self.total, output, target)

    @staticmethod
    def _gradient(value: Loss, output: Tensor, target: Any) -> Tensor:
        with torch.enable_grad():
            output = output.detach().requires_grad_()
            scalar = value(output, target)
        return torch.autograd.grad(scalar, output)[0]


class CallableLoss(_AutogradLoss):
    """A function that returns a mean over the batch."""

    def __init__(self, loss: Loss) -> None:
        self._loss = loss

    def mean(self, output: Tensor, target: Any) -> Tensor:
        return self._loss(output, target)

    def total(self, output: Tensor, target: Any) -> Tensor:
        return self._loss(output, target) * output.shape[0]


# They broadcast, which is hardly ever meant.
_ELEMENTWISE = (
    *(nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.PoissonNLLLoss, nn.KLDivLoss),
    *(nn.SoftMarginLoss, nn.HingeEmbeddingLoss, nn.MultiLabelSoftMarginLoss),
)


class ModuleLoss(_AutogradLoss):
    """A loss module with a ``reduction``; per-sample values come from a copy with ``reduction="none"``."""

    def __init__(self, loss: nn.Module) -> None:
        self.module: Any = loss
        # The shallow copy shares buffers (class weights), so moving the user's module moves the copy.
        per_sample: Any = copy.copy(loss)
        per_sample.reduction = "none"
        self._per_sample = per_sample

    def check(self, output: Tensor, target: Any) -> None:
        super().check(output, target)
        if isinstance(self.module, _ELEMENTWISE):
            check_same_shape(type(self.module).__name__, output, target)

    def mean(self, output: Tensor, target: Any) -> Tensor:
        value: Tensor = self.module(output, target)
        return value

    def weight(self, output: Tensor, target: Any) -> Tensor:
        # These two divide by the weights of the labels that are not ignored, and not by the number of samples.
        if isinstance(self.module, nn.CrossEntropyLoss | nn.NLLLoss) and not target.is_floating_point():
            return label_weights(self.module, output, target).sum()
        return super().weight(output, target)

    def total(self, output: Tensor, target: Any) -> Tensor:
        return self.values(output, target).sum()

    def values(self, output: Tensor, target: Any) -> Tensor:
        values = self._per_sample(output, target)
        if values.dim() == 0 or values.shape[0] != output.shape[0]:
            raise ValueError(
                f"loss {type(self.module).__name__} with reduction='none' returned shape {tuple(values.shape)}, not a "
                f"value per sample of {output.shape[0]}: it must read self.reduction when it is called. Or pass it as "
                "a function, loss=lambda output, target: ..., which is taken as a mean over the batch"
            )
        mean: Tensor = values.reshape(values.shape[0], -1).mean(1) if values.dim() > 1 else values
        return mean
