"""Networks, batches and models that the tests train on one process and on several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_altmin.nn import ElmanRNN

CLASSES = 3


def mlp() -> nn.Sequential:
    """Two hidden layers over six features."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, CLASSES))


def conv() -> nn.Sequential:
    """A convolution with pooling, and two linear layers, over 1x6x6 images."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 8), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(8, CLASSES))


def rnn() -> ElmanRNN:
    """A code per step, over six steps of two features."""
    torch.manual_seed(0)
    return ElmanRNN(2, 7, CLASSES)


class _Residual(nn.Module):
    """A block that only autograd can differentiate, and no skip connection around the whole network."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        x = x + self.second(torch.tanh(self.first(x)))
        output: Tensor = self.head(torch.tanh(x))
        return output


def residual() -> nn.Module:
    """Three stages found by tracing, one of them a residual block."""
    torch.manual_seed(0)
    return _Residual()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (6,)),
    "conv": (conv, (1, 6, 6)),
    "rnn": (rnn, (6, 2)),
    "residual": (residual, (6,)),
}


def batches(shape: tuple[int, ...], size: int, count: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Batches of inputs and labels, the same on every process."""
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, *shape, generator=generator, dtype=torch.float64).to(dtype),
            torch.randint(CLASSES, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def part(batch: tuple[Tensor, Tensor], sizes: tuple[int, ...], rank: int) -> tuple[Tensor, Tensor]:
    """The samples of a batch that a process sees."""
    x, y = batch
    return x.split(sizes)[rank], y.split(sizes)[rank]


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=0.002)


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


OPTIMIZERS = {"adam": adam, "sgd": sgd}


def normed_mlp() -> nn.Sequential:
    """BatchNorms behind all layers and before the last: one without running statistics, one with cumulative ones.

    A bias that a BatchNorm takes away again has the gradient 0, in whose rounding Adam would find a direction.
    """
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh()]
    layers += [nn.Linear(8, 7, bias=False), nn.BatchNorm1d(7, momentum=None), nn.ReLU()]
    layers += [nn.BatchNorm1d(7, affine=False, track_running_stats=False)]
    return nn.Sequential(*layers, nn.Linear(7, CLASSES, bias=False), nn.BatchNorm1d(CLASSES))


def normed_conv() -> nn.Sequential:
    """A BatchNorm behind a convolution, one behind a Linear layer, and one before its successor."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    layers += [nn.Linear(36, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 5), nn.ReLU()]
    return nn.Sequential(*layers, nn.BatchNorm1d(5), nn.Linear(5, CLASSES))


class _NormedResidual(nn.Module):
    """A block with two BatchNorms that only autograd can differentiate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.first, self.first_norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.second, self.second_norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4, momentum=None)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.stem(x)))
        x = torch.tanh(x + self.second_norm(self.second(torch.tanh(self.first_norm(self.first(x))))))
        output: Tensor = self.head(x.mean((2, 3)))
        return output


def normed_residual() -> nn.Module:
    """Three stages found by tracing; the residual block is one of them."""
    torch.manual_seed(0)
    return _NormedResidual()


# To be trained with synchronised BatchNorms.
NORMED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "normed mlp": (normed_mlp, (6,)),
    "normed conv": (normed_conv, (1, 6, 6)),
    "normed residual": (normed_residual, (1, 6, 6)),
}
EVERY = NETWORKS | NORMED


# Small moves pass through tanh by its slope, larger ones by a difference. A last digit decides which at the border, and
# shows 1e-8 of a move that six steps have divided by 20 each.
# A block with BatchNorms: see test_batch_norm.
TOLERANCE = {kind: {"rnn": 1e-11, "normed residual": 1e-10}.get(kind, 1e-12) for kind in EVERY}
