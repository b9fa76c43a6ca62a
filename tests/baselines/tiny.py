"""Tiny problems for the offline methods, and optima found by other means than the methods' own."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

SAMPLES, INPUTS, CLASSES = 13, 5, 3


def samples(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs ``(SAMPLES, INPUTS)`` in double precision, and labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SAMPLES, INPUTS, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (SAMPLES,), generator=generator)


def perceptron(activation: type[nn.Module] = nn.ReLU, bias: bool = True, hidden: int = 2) -> nn.Sequential:
    """A perceptron with hidden layers of 6 and, if asked for, 4 units, in double precision."""
    torch.manual_seed(1)
    widths = [INPUTS, 6, *([4] if hidden > 1 else []), CLASSES]
    layers: list[nn.Module] = []
    for width_in, width in itertools.pairwise(widths):
        layers += [nn.Linear(width_in, width, bias=bias), activation()]
    return nn.Sequential(*layers[:-1]).double()


def one_hot(labels: Tensor) -> Tensor:
    """Rows with a 1 at the label, in double precision."""
    rows = torch.zeros(len(labels), CLASSES, dtype=torch.float64)
    rows[torch.arange(len(labels)), labels] = 1.0
    return rows


def least_squares(*terms: tuple[float, Tensor, Tensor]) -> Tensor:
    """The ``X`` that minimises ``sum_k price_k ||A_k X - B_k||^2``, by a stacked system and its pseudo-inverse."""
    A = torch.cat([price**0.5 * a for price, a, _ in terms])
    B = torch.cat([price**0.5 * b for price, _, b in terms])
    return torch.from_numpy(np.linalg.pinv(A.numpy()) @ B.numpy())


def elementwise_minimum(function: Callable[..., Tensor], *arguments: Tensor, reach: float = 20.0) -> Tensor:
    """For each entry the ``z`` that minimises ``function(z, *entries)``: scipy on each side of the kinks, and these."""
    flat = [argument.reshape(-1) for argument in arguments]
    found = []
    for entries in zip(*flat, strict=True):

        def value(z: float, entries: tuple[Tensor, ...] = entries) -> float:
            return float(function(torch.tensor(z, dtype=torch.float64), *entries))

        sides = [
            minimize_scalar(value, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
            for bounds in ((-reach, 0.0), (0.0, 1.0), (0.0, reach))
        ]
        found.append(min((0.0, 1.0, *sides), key=value))
    return torch.tensor(found, dtype=torch.float64).reshape(arguments[0].shape)
