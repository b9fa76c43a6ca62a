"""The algorithm written out a second time, as the paper states it: the objective and torch.autograd, nothing else.

The library never builds the objective; here it is one expression, and every gradient is autograd's of that expression.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

StageFunction = Callable[[Tensor], Tensor]
TotalLoss = Callable[[Tensor, Any], Tensor]


@dataclass
class Constants:
    """Constants of the objective and of the code step."""

    mu: float = 0.3
    lambda_c: float = 0.0
    steps: int = 1
    lr: float = 0.7
    momentum: float = 0.0
    nesterov: bool = False


def objective(
    functions: Sequence[StageFunction], x: Tensor, y: Any, codes: Sequence[Tensor], loss: TotalLoss, at: Constants
) -> Tensor:
    """J, summed over the samples of the batch."""
    value = loss(functions[-1](codes[-1]), y)
    for function, below, code in zip(functions, [x, *codes[:-1]], codes, strict=False):
        value = value + at.mu / 2 * (code - function(below)).pow(2).sum() + at.lambda_c * code.abs().sum()
    return value


def forward_codes(functions: Sequence[StageFunction], x: Tensor) -> list[Tensor]:
    """The codes of the forward pass."""
    codes = []
    for function in functions[:-1]:
        x = function(x).detach()
        codes.append(x)
    return codes


def sweep(
    functions: Sequence[StageFunction], x: Tensor, y: Any, loss: TotalLoss, at: Constants
) -> tuple[list[Tensor], list[Tensor]]:
    """Forward codes, and codes after one code step from the top down, each by gradient steps on the whole of J."""
    forward = forward_codes(functions, x)
    codes = list(forward)
    for level in reversed(range(len(codes))):
        code, velocity = forward[level], torch.zeros_like(forward[level])
        for _ in range(at.steps):
            leaf = code.clone().requires_grad_()
            value = objective(functions, x, y, [*codes[:level], leaf, *codes[level + 1 :]], loss, at)
            (gradient,) = torch.autograd.grad(value, leaf)
            velocity = at.momentum * velocity + gradient
            direction = gradient + at.momentum * velocity if at.nesterov else velocity
            code = code - at.lr / at.mu * direction
        codes[level] = code
    return forward, codes


def cross_entropy_total(output: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy summed over samples, from the definition of the softmax."""
    return (torch.logsumexp(output, 1) - output[torch.arange(len(y)), y]).sum()


def network(*widths: int, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    """A float64 multilayer perceptron."""
    layers: list[nn.Module] = []
    for width_in, width in itertools.pairwise(widths):
        layers += [nn.Linear(width_in, width), activation()]
    return nn.Sequential(*layers[:-1]).double()


def convolutional(activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """A small LeNet for images (1, 10, 10), in float64."""
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), activation(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), activation(), nn.AvgPool2d(2, 1),
        nn.Flatten(), nn.Linear(16, 7), activation(), nn.Linear(7, 4),
    ).double()  # fmt: skip


def stage_functions(module: nn.Sequential) -> list[StageFunction]:
    """The stages of a sequential network, cut by hand: each ends with a Linear or a convolution."""
    functions: list[StageFunction] = []
    part: list[nn.Module] = []
    for layer in module:
        part.append(layer)
        if isinstance(layer, nn.Linear | nn.Conv2d):
            functions.append(nn.Sequential(*part))
            part = []
    assert not part
    return functions


def batch(module: nn.Sequential, samples: int = 6) -> tuple[Tensor, Tensor]:
    """Inputs and labels for one of the networks above."""
    first, last = module[0], module[-1]
    assert isinstance(last, nn.Linear)
    shape = (first.in_features,) if isinstance(first, nn.Linear) else (1, 10, 10)
    return torch.randn(samples, *shape, dtype=torch.float64), torch.randint(last.out_features, (samples,))
