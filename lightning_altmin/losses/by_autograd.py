"""Losses whose gradients autograd gives: any function, any loss module."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_altmin.losses.base import LocalLoss, Loss
from lightning_altmin.losses.targets import check_floats, check_same_shape, label_weights


class _AutogradLoss(LocalLoss):
    """Gradients through a graph of the loss alone."""

    def mean_gradient(self, output: Tensor, target: Any) -> Tensor:
        return self._gradient(self.mean, output, target)

    def total_gradient(self, output: Tensor, target: Any) -> Tensor:
        return self._gradient(self.total, output, target)

    def _gradient(self, value: Loss, output: Tensor, target: Any) -> Tensor:
        with torch.enable_grad():
            output = output.detach().requires_grad_()
            scalar = value(output, target)
        if not scalar.requires_grad:
            raise ValueError(
                f"{self._name} returned a value without a gradient with respect to the output: it must be computed "
                "from it by torch's own functions, not detached and not from numbers (.item(), float())"
            )
        return self._differentiated(scalar, output, target)

    def _differentiated(self, scalar: Tensor, output: Tensor, target: Any) -> Tensor:
        return torch.autograd.grad(scalar, output)[0]

    @property
    def _name(self) -> str:
        return "loss"


class CallableLoss(_AutogradLoss):
    """A function that returns a mean over the batch."""

    def __init__(self, loss: Loss) -> None:
        self._loss = loss

    def mean(self, output: Tensor, target: Any) -> Tensor:
        value = self._loss(output, target)
        if not isinstance(value, Tensor):
            raise ValueError(f"loss must return a scalar tensor (a mean over the batch), got {type(value).__name__}")
        return value

    def total(self, output: Tensor, target: Any) -> Tensor:
        return self.mean(output, target) * output.shape[0]


# They broadcast, which is hardly ever meant.
_ELEMENTWISE = (
    *(nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.PoissonNLLLoss, nn.KLDivLoss),
    *(nn.SoftMarginLoss, nn.HingeEmbeddingLoss, nn.MultiLabelSoftMarginLoss),
    *(nn.BCELoss, nn.BCEWithLogitsLoss),
)
_OF_FLOATS = (nn.BCELoss, nn.BCEWithLogitsLoss, nn.HuberLoss, nn.KLDivLoss)
# Not the targets' fault.
_DEVICE_ERRORS = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))


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
            check_same_shape(self._name, output, target)
        if isinstance(self.module, _OF_FLOATS):
            check_floats(self._name, target)

    def mean(self, output: Tensor, target: Any) -> Tensor:
        value: Tensor = self._called(output, target, lambda: self.module(output, target))
        return value

    def weight(self, output: Tensor, target: Any) -> Tensor:
        # These two divide by the weights of the labels that are not ignored, and not by the number of samples.
        if isinstance(self.module, nn.CrossEntropyLoss | nn.NLLLoss) and not target.is_floating_point():
            return label_weights(self.module, output, target).sum()
        return super().weight(output, target)

    def total(self, output: Tensor, target: Any) -> Tensor:
        return self.values(output, target).sum()

    def values(self, output: Tensor, target: Any) -> Tensor:
        values: Tensor = self._called(output, target, lambda: self._per_sample(output, target))
        if values.dim() == 0 or values.shape[0] != output.shape[0]:
            raise ValueError(
                f"loss {self._name} with reduction='none' returned shape {tuple(values.shape)}, not a "
                f"value per sample of {output.shape[0]}: it must read self.reduction when it is called. Or pass it as "
                "a function, loss=lambda output, target: ..., which is taken as a mean over the batch"
            )
        mean: Tensor = values.reshape(values.shape[0], -1).mean(1) if values.dim() > 1 else values
        return mean

    def _differentiated(self, scalar: Tensor, output: Tensor, target: Any) -> Tensor:
        gradient: Tensor = self._called(
            output, target, lambda: super(ModuleLoss, self)._differentiated(scalar, output, target)
        )
        return gradient

    @property
    def _name(self) -> str:
        return type(self.module).__name__

    def _called(self, output: Tensor, target: Any, call: Callable[[], Any]) -> Any:
        """What a call of torch's loss returns; its errors, which speak of what is inside, name the loss and ``y``."""
        if torch.compiler.is_compiling() or not isinstance(self.module, nn.modules.loss._Loss):
            return call()
        try:
            return call()
        except _DEVICE_ERRORS:
            raise
        except (RuntimeError, IndexError, TypeError, AttributeError) as error:
            y = f"{target.dtype} {tuple(target.shape)}" if isinstance(target, Tensor) else type(target).__name__
            raise ValueError(
                f"loss {self._name} cannot take y ({y}) for outputs ({output.dtype} {tuple(output.shape)}): {error}"
            ) from error
