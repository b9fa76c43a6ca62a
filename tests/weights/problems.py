"""Small networks for memories, and batches for them."""

from __future__ import annotations

from typing import Any

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


def ridge_over(a: Tensor, c: Tensor, ridge: float, bias: bool = True) -> Tensor:
    """The batch solution over all rows, a penalty row for each input."""
    if bias:
        a = torch.cat([a, a.new_ones(len(a), 1)], 1)
    penalty = (ridge * a.square().sum(0).mean()).sqrt() * torch.eye(a.shape[1], dtype=a.dtype)
    stacked = torch.cat([a, penalty]), torch.cat([c, c.new_zeros(a.shape[1], c.shape[1])])
    return torch.linalg.lstsq(*stacked, driver="gels").solution.t()


def random_features() -> nn.Sequential:
    network = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    network[0].requires_grad_(False)
    return network


def assert_layer(layer: Any, expected: Tensor, tolerance: float = 1e-10) -> None:
    found = torch.cat([layer.weight.flatten(1), layer.bias.unsqueeze(1)], 1)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
