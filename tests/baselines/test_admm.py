"""ADMM against a sweep written out with stacked least squares and a search on the number line."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_altmin.baselines import ADMMModule, Hinge, SquaredError
from tests.baselines.tiny import elementwise_minimum, least_squares, one_hot, perceptron, samples

BETA, GAMMA, RIDGE = 1.7, 0.6, 1e-9


def with_one(rows: Tensor) -> Tensor:
    return torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], 1)


def written_out_sweep(
    network: nn.Sequential, x: Tensor, y: Tensor, z: list[Tensor], a: list[Tensor], multiplier: Tensor
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """One sweep with the hinge loss, multiplier step included: the new z, a and multiplier."""
    s, top = network[1], len(z) - 1
    linears = [m for m in network if isinstance(m, nn.Linear)]
    W, b = ([p.detach() for p in ps] for ps in ([m.weight for m in linears], [m.bias for m in linears]))
    z, a = list(z), list(a)
    for level in range(len(z)):
        below = a[level - 1] if level else x
        solution = least_squares((1.0, with_one(below), z[level]))
        W[level], b[level] = solution[:-1].T, solution[-1]
        predicted = below @ W[level].T + b[level]
        if level < top:
            unit = torch.eye(len(W[level]), dtype=torch.float64)
            asked = (z[level + 1] - b[level + 1]).T
            a[level] = least_squares((GAMMA, unit, s(z[level]).T), (BETA, W[level + 1], asked)).T
            z[level] = elementwise_minimum(
                lambda t, w, p: GAMMA * (w - s(t)) ** 2 + BETA * (t - p) ** 2, a[level], predicted
            )
        else:
            z[level] = elementwise_minimum(
                lambda t, p, m, w: (torch.relu(1 - t) if w == 1 else torch.relu(t)) + m * t + BETA / 2 * (t - p) ** 2,
                predicted,
                multiplier,
                one_hot(y),
            )
    return z, a, multiplier + BETA * (z[top] - predicted)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_a_sweep_is_the_exact_minimum_of_each_block_in_turn(activation: type[nn.Module]) -> None:
    """Catches a wrong price, an output without its multiplier, another order, a multiplier step of another length."""
    network = perceptron(activation)
    x, y = samples()
    module = ADMMModule(network, beta=BETA, gamma=GAMMA, warm_start=0, ridge=RIDGE)
    with torch.no_grad():
        module.variables = module.begin(x, y)
        for number in range(2):
            variables = module.variables
            expected = written_out_sweep(network, x, y, variables["z"], variables["a"], variables["multiplier"][0])
            module.sweep(x, y, number)
            for ours, theirs in zip([*variables["z"], *variables["a"]], [*expected[0], *expected[1]], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
            torch.testing.assert_close(variables["multiplier"][0], expected[2], rtol=0, atol=1e-5)
        assert float(variables["multiplier"][0].abs().max()) > 0.01  # or the test says nothing about it


@pytest.mark.parametrize("loss", [SquaredError(), Hinge()])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Sigmoid])
def test_before_the_multiplier_moves_no_sweep_raises_the_objective(
    activation: type[nn.Module], loss: SquaredError | Hinge
) -> None:
    """Catches a block that is not a minimum, a ridge too large for the least squares, a multiplier that moves early."""
    x, y = samples()
    module = ADMMModule(perceptron(activation), loss, BETA, GAMMA, warm_start=12, ridge=1e-10)
    values = []
    with torch.no_grad():
        module.variables = module.begin(x, y)
        for number in range(12):
            values.append(float(module.objective(x, y)))
            module.sweep(x, y, number)
        assert float(module.variables["multiplier"][0].abs().max()) == 0.0
        module.sweep(x, y, 12)
        assert float(module.variables["multiplier"][0].abs().max()) > 0.0
    assert all(b <= a * (1 + 1e-8) for a, b in itertools.pairwise(values))
    assert values[-1] < 0.8 * values[0]


def test_the_objective_is_the_augmented_lagrangian() -> None:
    """Catches a term left out of what is logged; written out at variables that satisfy nothing."""
    network = perceptron()
    x, y = samples()
    module = ADMMModule(network, SquaredError(), BETA, GAMMA)
    module.variables = {n: [torch.randn_like(t) for t in ts] for n, ts in module.begin(x, y).items()}
    z, a, (m,) = (module.variables[name] for name in ("z", "a", "multiplier"))
    expected = 0.5 * (z[2] - one_hot(y)).square().sum() + (z[2] * m).sum()
    for below, layer, before in zip([x, *a], (network[0], network[2], network[4]), z, strict=True):
        expected = expected + BETA / 2 * (before - layer(below)).square().sum()
    for after, before in zip(a, z, strict=False):
        expected = expected + GAMMA / 2 * (after - before.relu()).square().sum()
    torch.testing.assert_close(module.objective(x, y), expected)


def test_layers_without_bias() -> None:
    """Catches least squares that spend a constant which the layer does not have."""
    network = perceptron(bias=False)
    x, y = samples()
    module = ADMMModule(network, beta=BETA, gamma=GAMMA, ridge=RIDGE)
    with torch.no_grad():
        module.variables = module.begin(x, y)
        z = torch.randn_like(module.variables["z"][0])
        module.variables["z"][0] = z
        module.sweep(x, y, 0)
    torch.testing.assert_close(network[0].weight.detach(), least_squares((1.0, x, z)).T, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"beta": 0.0}, "beta must be a positive number, got 0.0"),
        ({"gamma": -2.0}, "gamma must be a positive number, got -2.0"),
        ({"ridge": 0.0}, "ridge must be a positive number, got 0.0"),
        ({"warm_start": -1}, "warm_start must be an integer >= 0, got -1"),
        ({"warm_start": 2.5}, "warm_start must be an integer >= 0, got 2.5"),
        ({"beta": "1"}, "beta must be a positive number, got .1. of type str"),
    ],
)
def test_bad_settings_are_refused(setting: dict[str, Any], message: str) -> None:
    """Catches a setting with which a block has no minimum."""
    with pytest.raises(ValueError, match=message):
        ADMMModule(perceptron(), **setting)
