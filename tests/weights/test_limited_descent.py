"""Oracle: steps and norms computed by hand."""

from __future__ import annotations

import torch
from torch import nn

from lightning_altmin.weights.limited_descent import LimitedDescent


def test_a_layer_moves_at_most_its_share() -> None:
    """Catches a bound that counts weight and bias apart, ignores the rate, or also shortens steps below the bound."""
    weight, bias = nn.Parameter(torch.tensor([[3.0]])), nn.Parameter(torch.tensor([4.0]))  # together of norm 5
    zero = nn.Parameter(torch.zeros(2))
    optimizer = LimitedDescent([{"params": [weight, bias]}, {"params": [zero]}], lr=0.5, limit=0.2)
    weight.grad, bias.grad, zero.grad = torch.tensor([[6.0]]), torch.tensor([-8.0]), torch.ones(2)
    optimizer.step()  # 0.5 * 10 is asked for, 0.2 * 5 allowed
    torch.testing.assert_close(weight.detach(), torch.tensor([[3.0 - 0.6]]))
    torch.testing.assert_close(bias.detach(), torch.tensor([4.0 + 0.8]))
    torch.testing.assert_close(zero.detach(), torch.full((2,), -0.5))  # of no size yet: no bound
    weight.grad, bias.grad, zero.grad = torch.tensor([[0.1]]), None, None
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([[2.4 - 0.05]]))
