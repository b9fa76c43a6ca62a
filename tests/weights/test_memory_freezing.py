"""Layers that are frozen, and trained again, after their memory was made."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_altmin import AltMin, CoactivationMemory
from tests.weights.problems import batch, mlp, ridge_over

FORMS: dict[str, dict[str, Any]] = {
    "solve": {"form": "solve", "every": 2},
    "bcd": {"form": "solve", "solver": "bcd", "every": 2},
    "triangle": {"form": "solve", "storage": "triangle", "every": 2},
    "innovation": {"every": 3},
    "low rank": {"every": 3, "rank": 2},
    "diagonal": {"every": 3, "rank": 0},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("frozen", ["weight", "bias", "both"])
def test_what_is_frozen_rests_and_goes_on_later(form: str, frozen: str) -> None:
    """Catches a frozen layer that is solved for all the same, and statistics whose shape follows ``requires_grad``.

    What is frozen is to stay as it is to the bit; all other layers move, as does this one once it is trained again.
    """
    torch.manual_seed(0)
    network = mlp()
    core = AltMin(network, nn.CrossEntropyLoss(), weights=CoactivationMemory(**FORMS[form]))
    for _ in range(2):
        core.step(*batch(network))
    layer = network[2]
    for name in ("weight", "bias") if frozen == "both" else (frozen,):
        getattr(layer, name).requires_grad_(False)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    for _ in range(6):
        core.step(*batch(network))
    moved = {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(before) - {"2.weight", "2.bias"} | ({"2.weight"} if frozen == "bias" else set())
    layer.requires_grad_(True)
    for _ in range(6):
        core.step(*batch(network))
    assert not torch.equal(layer.weight, before["2.weight"])
    assert not torch.equal(layer.bias, before["2.bias"])


@pytest.mark.parametrize("storage", ["full", "triangle"])
def test_weights_are_solved_for_around_a_frozen_bias(storage: Any) -> None:
    """Catches targets from which a bias that was frozen later is not subtracted, and statistics of its one left in.

    The layer is then ``W a + b`` with b given, so W is the ridge solution for targets ``c - b`` over the inputs alone.
    """
    torch.manual_seed(0)
    network = mlp()
    memory = CoactivationMemory("solve", ridge=0.1, every=1, storage=storage)
    core = AltMin(network, nn.CrossEntropyLoss(), weights=memory)
    output = network[4]
    output.bias.requires_grad_(False)
    x, y = batch(network, 40)
    with torch.no_grad():
        a = network[:4](x)
        expected = ridge_over(a, functional.one_hot(y, 4).double() - output.bias, 0.1, bias=False)
    core.step(x, y)
    torch.testing.assert_close(output.weight.detach(), expected, rtol=1e-9, atol=1e-11)
    core.step(x, y)  # and at the end of a stream, by hand
    memory.solve()
    assert not output.bias.grad


@pytest.mark.parametrize("count", [3, 40])
def test_a_preconditioned_step_around_a_frozen_bias(count: int) -> None:
    """Catches a weight's step that counts on the bias to move with it.

    With the bias given, the step is the gradient of the weights times the damped inverse of the moments of the inputs
    alone: ``-step mean(d a^T) (mean(a a^T) + ridge mean(diag) I)^-1``, the ridge that of the layer, its one included.
    Fewer rows than outputs are the case that the solver has a shortcut for.
    """
    torch.manual_seed(0)
    network = mlp()
    weights = CoactivationMemory(step=0.5, ridge=0.3, every=4, limit=math.inf)
    core = AltMin(network, nn.CrossEntropyLoss(), weights=weights)
    output = network[4]
    output.bias.requires_grad_(False)
    x, y = batch(network, count)

    def step_of_first_moments() -> torch.Tensor:
        with torch.no_grad():
            a = network[:4](x)
            d = (network(x).softmax(1) - functional.one_hot(y, 4)) / count
            return output.weight - 0.5 * d.t() @ a @ inverse

    with torch.no_grad():
        a = network[:4](x)
        diagonal = torch.cat([a.square().mean(0), a.new_ones(1)]).mean()
        inverse = torch.linalg.inv(a.t() @ a / count + 0.3 * diagonal * torch.eye(5, dtype=a.dtype))
    expected = step_of_first_moments()
    core.step(x, y)
    torch.testing.assert_close(output.weight.detach(), expected, rtol=1e-9, atol=1e-11)
    core.batches_seen = 3  # a batch that measures nothing: the inverse stays that of the first
    expected = step_of_first_moments()
    core.step(x, y)
    torch.testing.assert_close(output.weight.detach(), expected, rtol=1e-9, atol=1e-11)
