"""Oracle: steps and norms computed by hand."""

from __future__ import annotations

import copy
import io

import torch
from torch import nn

from lightning_altmin.weights.limited_descent import LimitedDescent


def test_a_layer_moves_at_most_its_share() -> None:
    """Catches a bound that counts weight and bias apart, ignores the rate, or also shortens steps below the bound."""
    weight, bias = nn.Parameter(torch.tensor([[3.0]])), nn.Parameter(torch.tensor([4.0]))  # together of norm 5
    optimizer = LimitedDescent([{"params": [weight, bias]}], lr=0.5, limit=0.2)
    weight.grad, bias.grad = torch.tensor([[6.0]]), torch.tensor([-8.0])
    optimizer.step()  # 0.5 * 10 is asked for, 0.2 * 5 allowed
    torch.testing.assert_close(weight.detach(), torch.tensor([[3.0 - 0.6]]))
    torch.testing.assert_close(bias.detach(), torch.tensor([4.0 + 0.8]))
    weight.grad, bias.grad = torch.tensor([[0.1]]), None
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([[2.4 - 0.05]]))


def test_the_bound_does_not_grow_with_the_weights() -> None:
    """Catches a share of the norm of now: steps of noise would then make weights grow exponentially."""
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = LimitedDescent([weight], lr=1.0, limit=0.2)
    for number in range(1, 6):
        weight.grad = torch.tensor([-300.0, -400.0])
        optimizer.step()
        torch.testing.assert_close(weight.detach(), torch.tensor([3.0, 4.0]) * (1 + 0.2 * number))


def test_what_was_zero_has_no_bound_until_it_has_a_size() -> None:
    """Catches layers that start at zero and could never leave it, and ones that are never bounded."""
    weight = nn.Parameter(torch.zeros(2))
    optimizer = LimitedDescent([weight], lr=0.5, limit=0.2)
    weight.grad = torch.tensor([-6.0, -8.0])
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([3.0, 4.0]))
    optimizer.step()  # 5 is asked for, 1 allowed
    torch.testing.assert_close(weight.detach(), torch.tensor([3.6, 4.8]))


def test_the_bound_is_saved() -> None:
    """Catches a resumed run whose bound is taken from the weights of the checkpoint."""
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = LimitedDescent([weight], lr=1.0, limit=0.2)
    weight.grad = torch.tensor([-300.0, -400.0])
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(weight.detach())
    resumed = LimitedDescent([nn.Parameter(other)], lr=1.0, limit=0.2)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    resumed.param_groups[0]["params"][0].grad = torch.tensor([-300.0, -400.0])
    resumed.step()
    torch.testing.assert_close(other, torch.tensor([3.0, 4.0]) * 1.4)
