"""Small networks for memories, and batches for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def mlp(width: int = 7) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 5), nn.ReLU(), nn.Linear(5, 4)).double()


def normed() -> nn.Sequential:
    """BatchNorm below a layer, in its transfer. One above a layer is in `test_batch_norm_above`."""
    return nn.Sequential(
        nn.Linear(6, 7), nn.ReLU(), nn.BatchNorm1d(7, affine=False), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 4)
    ).double()


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, stride=2), nn.Tanh(), nn.Conv2d(3, 4, 2, bias=False), nn.ReLU(), nn.Flatten(),
        nn.Linear(16, 4),
    ).double()  # fmt: skip


def batch(network: nn.Module, count: int = 9) -> tuple[Tensor, Tensor]:
    shape = (2, 6, 6) if isinstance(next(network.children()), nn.Conv2d) else (6,)
    return torch.randn(count, *shape, dtype=torch.float64), torch.randint(4, (count,))
