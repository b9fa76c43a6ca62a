"""Three-splitting BCD against a sweep written out with stacked least squares and a search on the number line."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from lightning_altmin.baselines import BCDModule, Hinge, SquaredError, small_weights
from tests.baselines.tiny import elementwise_minimum, least_squares, one_hot, perceptron, samples

GAMMA, RHO, ALPHA = 0.7, 1.3, 2.1


def written_out_sweep(
    network: nn.Sequential, x: Tensor, y: Tensor, u: list[Tensor], v: list[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """One sweep with the squared loss: the new u, v, weights and biases."""
    linears = [m for m in network if isinstance(m, nn.Linear)]
    W, b = ([p.detach().clone() for p in ps] for ps in ([m.weight for m in linears], [m.bias for m in linears]))
    s = network[1]
    u, v = list(u), list(v)
    eye = torch.eye(x.shape[0], dtype=torch.float64)
    for level in reversed(range(len(W))):
        below = v[level - 1] if level else x
        if level == len(W) - 1:
            v[level] = least_squares((1.0, eye, one_hot(y)), (GAMMA, eye, u[level]), (ALPHA, eye, v[level]))
            u[level] = least_squares((GAMMA, eye, v[level]), (RHO, eye, below @ W[level].T + b[level]))
        else:
            unit = torch.eye(len(W[level]), dtype=torch.float64)
            asked = (u[level + 1] - b[level + 1]).T
            v[level] = least_squares((GAMMA, unit, s(u[level]).T), (RHO, W[level + 1], asked)).T
            u[level] = elementwise_minimum(
                lambda z, w, p, old: GAMMA * (w - s(z)) ** 2 + RHO * (z - p) ** 2 + ALPHA * (z - old) ** 2,
                v[level],
                below @ W[level].T + b[level],
                u[level],
            )
        unit = torch.eye(below.shape[1], dtype=torch.float64)
        W[level] = least_squares((RHO, below, u[level] - b[level]), (ALPHA, unit, W[level].T)).T
        ones = torch.ones(len(x), 1, dtype=torch.float64)
        one = torch.ones(1, 1, dtype=torch.float64)
        b[level] = least_squares((RHO, ones, u[level] - below @ W[level].T), (ALPHA, one, b[level][None]))[0]
    return u, v, W, b


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_a_sweep_is_the_exact_minimum_of_each_block_in_turn(activation: type[nn.Module]) -> None:
    """Catches a wrong price in any block, a stale variable, another order of blocks, a missing proximal term."""
    network = perceptron(activation)
    x, y = samples()
    module = BCDModule(network, gamma=GAMMA, rho=RHO, alpha=ALPHA)
    with torch.no_grad():
        module.variables = module.begin(x, y)
        for number in range(2):
            expected = written_out_sweep(network, x, y, *module.variables.values())
            module.sweep(x, y, number)
            linears = [m for m in network if isinstance(m, nn.Linear)]
            found = (*module.variables.values(), [m.weight for m in linears], [m.bias for m in linears])
            for ours, theirs in zip(found, expected, strict=True):
                for a, e in zip(ours, theirs, strict=True):
                    torch.testing.assert_close(a.detach(), e, rtol=0, atol=1e-5)


@pytest.mark.parametrize("loss", [SquaredError(), Hinge()])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.Softplus])
def test_no_sweep_raises_the_objective(activation: type[nn.Module], loss: SquaredError | Hinge) -> None:
    """Catches a block that is not a minimum: the theorem of the paper, F written out here."""
    network = perceptron(activation)
    x, y = samples()
    module = BCDModule(network, loss, GAMMA, RHO, ALPHA)

    def value() -> float:
        u, v = module.variables.values()
        total = float(loss.total(v[-1], y))
        for level, (below, before, after) in enumerate(zip([x, *v], u, v, strict=False)):
            total += float(RHO / 2 * (before - network[2 * level](below)).square().sum())
            total += float(GAMMA / 2 * (after - (network[1](before) if level < 2 else before)).square().sum())
        return total

    values = []
    with torch.no_grad():
        module.variables = module.begin(x, y)
        for number in range(12):
            values.append(value())
            assert float(module.objective(x, y)) == pytest.approx(values[-1], rel=1e-9)
            module.sweep(x, y, number)
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(values))
    assert values[-1] < 0.8 * values[0]


def test_a_layer_without_bias_keeps_none() -> None:
    """Catches a bias that is solved for and then lost: the weights would be those of another problem."""
    network = perceptron(bias=False)
    x, y = samples()
    module = BCDModule(network, gamma=GAMMA, rho=RHO, alpha=ALPHA)
    with torch.no_grad():
        module.variables = module.begin(x, y)
        old = network[0].weight.clone()
        module.sweep(x, y, 0)
        u = module.variables["u"][0]
        unit = torch.eye(x.shape[1], dtype=torch.float64)
        torch.testing.assert_close(network[0].weight, least_squares((RHO, x, u), (ALPHA, unit, old.T)).T)


def test_small_weights() -> None:
    """Catches another deviation or bias than asked for."""
    given = nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 5, bias=False))
    network = small_weights(given, 0.02, 0.3)
    weight = network[0].weight.detach()
    assert network is given  # in place
    assert float(weight.std()) == pytest.approx(0.02, rel=0.03)
    assert abs(float(weight.mean())) < 0.02 / 60000**0.5 * 4
    assert bool((network[0].bias == 0.3).all())


@pytest.mark.parametrize("name", ["gamma", "rho", "alpha"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_prices_must_be_positive(name: str, value: float) -> None:
    """Catches a price with which a block has no minimum."""
    with pytest.raises(ValueError, match=f"{name} must be a positive number, got"):
        BCDModule(perceptron(), **{name: value})
