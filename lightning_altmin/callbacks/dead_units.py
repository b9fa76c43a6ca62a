"""Which units of a layer pass nothing on: their activation is flat at every sample of a batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_altmin.stage import Stage

_ELEMENTWISE = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Softplus,
    nn.Softsign,
    nn.Sigmoid,
    nn.LogSigmoid,
    nn.Tanh,
    nn.Hardtanh,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardshrink,
    nn.Softshrink,
    nn.Tanhshrink,
    nn.Threshold,
)


def alive_units(layer: Stage, above: Stage, code: Tensor, flat: float) -> Tensor | None:
    """Which of a layer's units are not dead in a batch.

    A unit is a column of a code ``(batch, *, units)``, or a channel of a code ``(batch, channels, *positions)`` of a
    convolution. It is dead if the slope of the activation that reads it is at most ``flat`` in absolute value at
    every sample and position: for ReLU, if the code is nowhere positive; for Tanh or Sigmoid, if it is saturated
    everywhere.

    Args:
        layer: The stage that makes the code.
        above: The stage that reads it; its first elementwise activation is looked at. What stands before that
            activation (pooling, dropout, reshaping) is left out.
        code: The code, before the activation.
        flat: Largest slope that counts as none, >= 0.

    Returns:
        A bool for each unit; ``None`` if the stage above has no elementwise activation of torch.
    """
    activation = next((module for module in above.transfer if isinstance(module, _ELEMENTWISE)), None)
    if activation is None:
        return None
    with torch.enable_grad():
        at = code.detach().clone().requires_grad_()
        value = activation(at.clone())  # cloned: the module may work in place, which a leaf refuses
        (slope,) = torch.autograd.grad(value.sum(), at)
    is_image = isinstance(layer.affine[0], _ConvNd) or code.dim() >= 4
    units = slope.abs().movedim(1 if is_image else -1, 0).flatten(1)
    return (units > flat).any(1)
