"""Oracle: backprop's gradients by autograd, times the inverse of the inputs' second moments, written down."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_altmin import AltMin, AltMinObjective, CoactivationMemory, CodedNetwork, CurvatureCodes, GradientCodes
from tests.weights.problems import batch, convolutional, mlp, normed


def layers(network: nn.Module) -> list[Any]:
    return [m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d)]


def rows(layer: Any, x: Tensor) -> tuple[Tensor, int]:
    """A layer's inputs as rows, and how many a sample has."""
    if isinstance(layer, nn.Conv2d):
        patches = functional.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        found, count = patches.transpose(1, 2).flatten(0, 1), patches.shape[2]
    else:
        found, count = x, 1
    return (found if layer.bias is None else torch.cat([found, found.new_ones(len(found), 1)], 1)), count


class Oracle:
    """Backprop preconditioned by A, with autograd and hooks."""

    def __init__(self, network: nn.Module, step: float, ridge: float, forgetting: float, power: float = 0.5) -> None:
        self.network, self.step, self.ridge, self.forgetting, self.power = network, step, ridge, forgetting, power
        self.sums: dict[Any, Tensor] = {}
        self.counts: dict[Any, float] = {}
        self.inverses: dict[Any, Tensor] = {}

    def train(self, x: Tensor, y: Tensor, measures: bool) -> None:
        inputs: dict[Any, Tensor] = {}
        hooks = [
            m.register_forward_pre_hook(lambda m, a: inputs.update({m: a[0].detach()})) for m in layers(self.network)
        ]
        functional.cross_entropy(self.network(x), y).backward()
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            for layer in layers(self.network):
                a, positions = rows(layer, inputs[layer])
                if measures:
                    self.sums[layer] = self.forgetting * self.sums.get(layer, 0) + a.t() @ a
                    self.counts[layer] = self.forgetting * self.counts.get(layer, 0) + len(a)
                    A = self.sums[layer] / self.counts[layer]
                    damping = self.ridge * A.diagonal().mean() * torch.eye(len(A), dtype=A.dtype)
                    self.inverses[layer] = torch.linalg.inv(A + damping)
                parts = [p.grad.reshape(len(p), -1) for p in layer.parameters()]
                direction = torch.cat(parts, 1) @ self.inverses[layer] / positions**self.power
                size = layer.weight[0].numel()
                layer.weight -= self.step * direction[:, :size].reshape(layer.weight.shape)
                if layer.bias is not None:
                    layer.bias -= self.step * direction[:, size]
        self.network.zero_grad()


NETWORKS = {"mlp": mlp, "more outputs than samples": lambda: mlp(20), "BatchNorm": normed, "conv": convolutional}


@pytest.mark.parametrize("engine", ["closed_form", "autograd"])
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS.keys())
def test_is_backprop_preconditioned_by_second_moments(make: Any, engine: str) -> None:
    """Catches moved inputs, a missing 1/mu or share, a mean over features, a sum over positions, stale or misplaced
    statistics, a bias left out, and a wrong product where the inputs are preconditioned in place of the gradient.
    """
    network = make()
    twin = copy.deepcopy(network)
    oracle = Oracle(twin, step=0.3, ridge=0.5, forgetting=0.7)
    memory = CoactivationMemory(step=0.3, ridge=0.5, forgetting=0.7, every=3, limit=math.inf)
    codes = GradientCodes(steps=1, lr=1.0)
    # A fixed BatchNorm is not differentiated through in the code step; a live one is, as in backprop.
    coded = CodedNetwork(network, engine, batch_norm="live")
    core = AltMin(coded, nn.CrossEntropyLoss(), AltMinObjective(mu=0.2), codes, memory)
    for number in range(8):
        x, y = batch(network)
        oracle.train(x, y, measures=number in (0, 1, 2, 3, 6))  # every third, and 1 and 2 before
        core.step(x, y, keep_codes=bool(number % 2))
        for ours, expected in zip(network.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


def test_positions_may_count_as_their_mean() -> None:
    """Catches `positions` without effect."""
    network = convolutional()
    twin = copy.deepcopy(network)
    memory = CoactivationMemory(step=0.3, ridge=0.5, positions="mean", limit=math.inf)
    core = AltMin(network, nn.CrossEntropyLoss(), AltMinObjective(), GradientCodes(1, 1.0), memory)
    x, y = batch(network)
    core.step(x, y)
    Oracle(twin, 0.3, 0.5, 1.0, power=1.0).train(x, y, measures=True)
    for ours, expected in zip(network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


def test_varying_code_steps_are_divided_out() -> None:
    """Catches a direction that shrinks with the code solver's share: one plain step of any share asks for the same."""
    x, y = batch(mlp())
    results = []
    for codes in (GradientCodes(1, 1.0), CurvatureCodes(share=0.05)):
        torch.manual_seed(1)
        network = mlp()
        memory = CoactivationMemory(limit=math.inf)
        AltMin(network, nn.CrossEntropyLoss(), AltMinObjective(mu=5.0), codes, memory).step(x, y)
        results.append(list(network.parameters()))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_batch_norm_above() -> None:
    """Catches a BatchNorm behind a layer whose own scales are preconditioned, or not trained at all."""
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 4)).double()
    twin = copy.deepcopy(network)
    memory = CoactivationMemory(limit=math.inf, optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    coded = CodedNetwork(network, batch_norm="live")
    core = AltMin(coded, nn.CrossEntropyLoss(), AltMinObjective(), GradientCodes(1, 1.0), memory)
    names = [group["name"] for group in core.optimizer.param_groups]
    assert names == ["0", "3", "0 (rest)"]
    x, y = batch(network)
    scales = torch.autograd.grad(functional.cross_entropy(twin(x), y), list(twin[1].parameters()))
    expected = [p - 0.1 * g for p, g in zip(twin[1].parameters(), scales, strict=True)]
    Oracle(twin, 0.8, 1.0, 0.95).train(x, y, measures=True)
    core.step(x, y)
    torch.testing.assert_close(list(network[1].parameters()), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(network[0].weight, twin[0].weight, rtol=1e-9, atol=1e-11)


def test_schedules_change_the_step() -> None:
    """Catches a step that is not the optimizer's rate."""
    network = mlp()
    core = AltMin(network, nn.CrossEntropyLoss(), weights=CoactivationMemory(step=0.4))
    assert [group["lr"] for group in core.optimizer.param_groups] == [0.4] * 3
    for group in core.optimizer.param_groups:
        group["lr"] = 0.0
    before = copy.deepcopy(network.state_dict())
    core.step(*batch(network))
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("rank", [None, 2, 0])
def test_inputs_that_are_all_zero_move_nothing(rank: int | None) -> None:
    """Catches a black batch at the start, of a layer without a bias, that ends training or sends the layer anywhere.

    A gradient ``d a^T`` of zero inputs is zero, so the layer stays; so it does in a batch with inputs before the next
    measurement, whose size nobody knows yet. After that it moves.
    """
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 4)).double()
    weights = CoactivationMemory(rank=rank, every=4, limit=math.inf)
    core = AltMin(network, nn.CrossEntropyLoss(), weights=weights)
    before = network[0].weight.detach().clone()
    x, y = batch(network)
    for _ in range(3):  # measured in batches 0, 1, 2 and 4
        core.step(torch.zeros_like(x), y)
    core.step(x, y)
    assert torch.equal(network[0].weight, before)
    core.step(x, y)
    assert not torch.equal(network[0].weight, before)
    assert (network[0].weight - before).norm() < 100 * before.norm()
