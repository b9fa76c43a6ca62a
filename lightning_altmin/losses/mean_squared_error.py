"""The mean squared error in closed form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_altmin.losses.by_autograd import ModuleLoss
from lightning_altmin.losses.targets import check_floats, check_same_shape


class MeanSquaredError(ModuleLoss):
    """``nn.MSELoss`` in closed form."""

    def mean_gradient(self, output: Tensor, target: Any) -> Tensor:
        return (output - target).to(output.dtype) * (2.0 / output.numel())

    def total_gradient(self, output: Tensor, target: Any) -> Tensor:
        return (output - target).to(output.dtype) * (2.0 * output.shape[0] / output.numel())

    def check(self, output: Tensor, target: Any) -> None:
        super().check(output, target)
        check_same_shape("MSELoss", output, target)
        if target.dtype == torch.bool:
            check_floats("MSELoss", target)
