"""Losses whose targets are class labels: labels that are no class are refused, or kept from a device's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_altmin.losses.by_autograd import ModuleLoss


class ClassLabelLoss(ModuleLoss):
    """``nn.NLLLoss``, ``nn.MultiMarginLoss``, ``nn.CrossEntropyLoss``, or a subclass that keeps the forward of one."""

    def check(self, output: Tensor, target: Any) -> None:
        super().check(output, target)
        if not isinstance(target, Tensor):
            raise TypeError(f"{self._name} needs a tensor of targets, got {type(target).__name__}")
        if output.dim() < 2:
            raise ValueError(
                f"{self._name} needs outputs of shape (batch, classes), the network's have shape {tuple(output.shape)}"
            )
        classes, weight = output.shape[1], self.module.weight
        if weight is not None and weight.shape != (classes,):
            raise ValueError(
                f"{self._name} has class weights of shape {tuple(weight.shape)}, but the network has {classes} "
                "outputs: give one weight per output"
            )
        shape = (output.shape[0], *output.shape[2:])
        if target.is_floating_point() and isinstance(self.module, nn.CrossEntropyLoss):
            if target.shape != output.shape:
                raise ValueError(
                    f"y holds floats of shape {tuple(target.shape)}; give class indices (dtype long, shape {shape}) or "
                    f"probabilities of shape {tuple(output.shape)}"
                )
            return
        taken = (torch.long, torch.uint8) if isinstance(self.module, nn.NLLLoss) else (torch.long,)
        if target.dtype not in taken or target.shape != shape:
            raise ValueError(
                f"y has dtype {target.dtype} and shape {tuple(target.shape)}; {self._name} needs dtype torch.int64 "
                f"and shape {shape} for outputs of shape {tuple(output.shape)}"
            )
        if target.device.type == "cpu" and target.numel() > 0:
            self._check_labels(classes, output, target)

    def readable(self, output: Tensor, target: Any) -> Any:
        if target.is_floating_point():
            return target
        fits = ((target >= 0) & (target < output.shape[1])) | ~self._valid(target)
        return target.long().where(fits, getattr(self.module, "ignore_index", 0))

    def evidence(self, output: Tensor, target: Any) -> list[Tensor]:
        return [] if target.is_floating_point() else [self.labels_fit(output, target)]

    def labels_fit(self, output: Tensor, target: Tensor) -> Tensor:
        """Whether every label is a class or ignored; a scalar bool tensor on the target's device."""
        return (((target >= 0) & (target < output.shape[1])) | ~self._valid(target)).all()

    def _valid(self, target: Tensor) -> Tensor:
        ignored = getattr(self.module, "ignore_index", None)
        return torch.ones_like(target, dtype=torch.bool) if ignored is None else target.long() != ignored

    def _check_labels(self, classes: int, output: Tensor, target: Tensor) -> None:
        lowest, highest = target.aminmax()
        if (lowest < 0 or highest >= classes) and not self.labels_fit(output, target):
            labels = target[self._valid(target)]
            raise ValueError(
                f"y holds labels from {int(labels.min())} to {int(labels.max())} but the network has {classes} "
                f"outputs: labels must lie in 0..{classes - 1}"
            )
