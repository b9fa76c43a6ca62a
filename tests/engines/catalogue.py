"""Every layer that has a closed form, with the options that change its mathematics, and an input shape it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_altmin.nn import HardThreshold, Heaviside, Quantise, Sign, Staircase

TOLERANCE = 1e-12
"""The bound of the specification on the difference of engines, in float64, relative to the largest entry."""


class Case(NamedTuple):
    """A module to build and the shape of a batch for it."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def module(self) -> nn.Module:
        """A float64 module whose every parameter and buffer is random, so that no term is hidden by a 0 or a 1."""
        return randomized(self.make().double())

    def input(self) -> Tensor:
        return torch.randn(self.shape, dtype=torch.float64)


def randomized(module: nn.Module) -> nn.Module:
    """Give vectors (biases, affine parameters) and running statistics values that are neither 0 nor 1."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.3, 1.2).mul_(torch.randint_like(parameter, 2).mul_(2).sub_(1))
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
    return module


def largest_difference(ours: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, relative to the largest expected entry where that is above 1."""
    assert ours.shape == expected.shape, (ours.shape, expected.shape)
    assert ours.dtype == expected.dtype, (ours.dtype, expected.dtype)
    if expected.numel() == 0:
        return 0.0
    ours, expected = ours.detach(), expected.detach()
    return float((ours - expected).abs().max()) / max(1.0, float(expected.abs().max()))


LAYERS: dict[str, Case] = {
    "linear": Case(lambda: nn.Linear(5, 4), (6, 5)),
    "linear-no-bias": Case(lambda: nn.Linear(5, 4, bias=False), (6, 5)),
    "linear-sequence": Case(lambda: nn.Linear(5, 4), (3, 2, 5)),
    "linear-grid": Case(lambda: nn.Linear(5, 4, bias=False), (3, 2, 3, 5)),
    "conv1d": Case(lambda: nn.Conv1d(3, 4, 3), (2, 3, 9)),
    "conv1d-options": Case(lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2), (2, 4, 11)),
    "conv2d": Case(lambda: nn.Conv2d(2, 3, 3), (2, 2, 6, 5)),
    "conv2d-no-bias": Case(lambda: nn.Conv2d(2, 3, 3, bias=False), (2, 2, 6, 5)),
    "conv2d-stride": Case(lambda: nn.Conv2d(2, 3, (3, 2), stride=(2, 3)), (2, 2, 8, 9)),
    "conv2d-padding": Case(lambda: nn.Conv2d(2, 3, 3, padding=(1, 2)), (2, 2, 5, 4)),
    "conv2d-dilation": Case(lambda: nn.Conv2d(2, 3, 2, dilation=(2, 3)), (2, 2, 6, 7)),
    "conv2d-depthwise": Case(lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False), (2, 4, 5, 5)),
    "conv2d-all": Case(lambda: nn.Conv2d(4, 6, 3, 2, 2, dilation=2, groups=2), (2, 4, 9, 8)),
    "conv3d": Case(lambda: nn.Conv3d(2, 3, 2), (2, 2, 3, 4, 3)),
    "conv3d-options": Case(lambda: nn.Conv3d(2, 4, 2, 2, 1, groups=2, bias=False), (2, 2, 4, 3, 4)),
    "max-pool": Case(lambda: nn.MaxPool2d(2), (2, 3, 6, 4)),
    "max-pool-left-over": Case(lambda: nn.MaxPool2d((3, 2)), (2, 3, 7, 5)),
    "max-pool-overlap": Case(lambda: nn.MaxPool2d(3, stride=1), (2, 3, 6, 5)),
    "max-pool-padding": Case(lambda: nn.MaxPool2d(3, stride=2, padding=1), (2, 3, 6, 5)),
    "max-pool-dilation": Case(lambda: nn.MaxPool2d(2, stride=(1, 2), dilation=(2, 1)), (2, 3, 6, 5)),
    "max-pool-ceil": Case(lambda: nn.MaxPool2d((3, 2), stride=2, padding=(1, 0), ceil_mode=True), (2, 3, 6, 5)),
    "avg-pool": Case(lambda: nn.AvgPool2d(2), (2, 3, 6, 4)),
    "avg-pool-padding": Case(lambda: nn.AvgPool2d(3, stride=2, padding=1), (2, 3, 6, 5)),
    "avg-pool-no-count": Case(lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False), (2, 3, 6, 5)),
    "avg-pool-ceil": Case(lambda: nn.AvgPool2d((2, 3), ceil_mode=True), (2, 3, 5, 5)),
    "avg-pool-divisor": Case(lambda: nn.AvgPool2d(2, divisor_override=3), (2, 3, 4, 4)),
    "adaptive-avg-pool": Case(lambda: nn.AdaptiveAvgPool2d((3, 2)), (2, 3, 7, 5)),
    "adaptive-avg-pool-one": Case(lambda: nn.AdaptiveAvgPool2d(1), (2, 3, 4, 5)),
    "adaptive-avg-pool-none": Case(lambda: nn.AdaptiveAvgPool2d((None, 2)), (2, 3, 4, 5)),
    "flatten": Case(lambda: nn.Flatten(), (3, 2, 4, 5)),
    "flatten-some": Case(lambda: nn.Flatten(2), (3, 2, 4, 5)),
    "unflatten": Case(lambda: nn.Unflatten(1, (2, 3, 4)), (3, 24)),
    "batch-norm-1d": Case(lambda: nn.BatchNorm1d(4), (6, 4)),
    "batch-norm-1d-sequence": Case(lambda: nn.BatchNorm1d(4), (3, 4, 5)),
    "batch-norm-2d": Case(lambda: nn.BatchNorm2d(3), (4, 3, 3, 2)),
    "batch-norm-3d": Case(lambda: nn.BatchNorm3d(2), (3, 2, 2, 3, 2)),
    "batch-norm-plain": Case(lambda: nn.BatchNorm2d(3, affine=False), (4, 3, 3, 2)),
    "batch-norm-cumulative": Case(lambda: nn.BatchNorm1d(4, momentum=None), (6, 4)),
    "batch-norm-momentum-1": Case(lambda: nn.BatchNorm1d(4, momentum=1.0), (6, 4)),
    "batch-norm-untracked": Case(lambda: nn.BatchNorm1d(4, track_running_stats=False), (6, 4)),
    "batch-norm-untracked-eval": Case(lambda: nn.BatchNorm1d(4, track_running_stats=False).eval(), (6, 4)),
    "batch-norm-eval": Case(lambda: nn.BatchNorm2d(3).eval(), (4, 3, 3, 2)),
    "batch-norm-eval-plain": Case(lambda: nn.BatchNorm1d(4, affine=False).eval(), (6, 4)),
    "batch-norm-eps": Case(lambda: nn.BatchNorm1d(4, eps=0.3), (6, 4)),
    "dropout": Case(lambda: nn.Dropout(0.4), (6, 5)),
    "dropout-inplace": Case(lambda: nn.Dropout(0.4, inplace=True), (6, 5)),
    "dropout-nothing": Case(lambda: nn.Dropout(0.0), (6, 5)),
    "dropout-everything": Case(lambda: nn.Dropout(1.0), (6, 5)),
    "dropout-eval": Case(lambda: nn.Dropout(0.4).eval(), (6, 5)),
    "dropout-1d": Case(lambda: nn.Dropout1d(0.4), (4, 5, 3)),
    "dropout-2d": Case(lambda: nn.Dropout2d(0.4), (4, 5, 3, 2)),
    "dropout-3d": Case(lambda: nn.Dropout3d(0.4), (4, 5, 2, 2, 2)),
}

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "relu-inplace": lambda: nn.ReLU(inplace=True),
    "leaky-relu": nn.LeakyReLU,
    "leaky-relu-slope": lambda: nn.LeakyReLU(0.3, inplace=True),
    "relu6": nn.ReLU6,
    "hardtanh": nn.Hardtanh,
    "hardtanh-range": lambda: nn.Hardtanh(-0.5, 2.0),
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "gelu-tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "elu-alpha": lambda: nn.ELU(0.4),
    "sign": Sign,
    "step-threshold": lambda: Heaviside(0.3),
    "hard-threshold": lambda: HardThreshold(0.6),
    "quantise": lambda: Quantise(2, -1.0, 2.0),
    "staircase": lambda: Staircase(-1.0, 0.5, -0.75, 0.5, 3),
    "softplus": nn.Softplus,
    "softplus-beta": lambda: nn.Softplus(beta=3.0, threshold=4.0),
}

CASES: dict[str, Case] = {**LAYERS, **{name: Case(make, (7, 9)) for name, make in ACTIVATIONS.items()}}
