"""MAC's two steps against closed forms and scipy's optimum, its growing penalty and its post-processing."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from lightning_altmin.baselines import MACModule, SquaredError, mac
from tests.baselines.tiny import SAMPLES, least_squares, one_hot, perceptron, samples


def objective(network: nn.Sequential, x: Tensor, y: Tensor, z: list[Tensor], mu: float) -> Tensor:
    """The penalised objective with cross-entropy, from its definition."""
    output = network[4](z[1])
    value = (torch.logsumexp(output, 1) - output[torch.arange(len(y)), y]).sum()
    for below, layer, coordinate in ((x, network[0], z[0]), (z[0], network[2], z[1])):
        value = value + mu / 2 * (coordinate - network[1](layer(below))).square().sum()
    return value


def begun(network: nn.Sequential, **settings: Any) -> tuple[MACModule, Tensor, Tensor]:
    x, y = samples()
    module = MACModule(network, **settings)
    with torch.no_grad():
        module.variables = module.begin(x, y)
    return module, x, y


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.Sigmoid])
def test_neither_step_raises_the_objective(activation: type[nn.Module]) -> None:
    """Catches a step in the wrong direction, one on another layer's term, and a line search that is believed."""
    network = perceptron(activation)
    module, x, y = begun(network, mu=0.3, growth=1.0, iterations=7)
    values = []
    with torch.no_grad():
        for _ in range(6):
            for step in (module.lower_weights, module.lower_coordinates):
                values.append(float(objective(network, x, y, module.variables["z"], 0.3)))
                assert float(module.objective(x, y)) == pytest.approx(values[-1], rel=1e-9)
                step(x, y)
    assert all(b <= a for a, b in itertools.pairwise(values))
    assert values[-1] < 0.5 * values[0]


def test_the_weight_step_ends_at_least_squares_where_layers_are_linear() -> None:
    """Catches a hidden layer fitted to another target, or an output layer fitted to other coordinates."""
    network = perceptron(nn.Identity)
    module, x, y = begun(network, loss=SquaredError(), mu=0.4, iterations=400)
    z = module.variables["z"] = [torch.randn_like(t) for t in module.variables["z"]]
    with torch.no_grad():
        module.lower_weights(x, y)
    ones = torch.ones(SAMPLES, 1, dtype=torch.float64)
    for below, target, layer in ((x, z[0], network[0]), (z[0], z[1], network[2]), (z[1], one_hot(y), network[4])):
        solution = least_squares((1.0, torch.cat([below, ones], 1), target))
        torch.testing.assert_close(layer.weight.detach(), solution[:-1].T, rtol=0, atol=1e-5)
        torch.testing.assert_close(layer.bias.detach(), solution[-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("together", [1, 5, 250])
def test_the_coordinates_end_at_scipys_optimum(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches coordinates of one layer left out, or held where the other's have not moved yet; and, where few samples
    share a problem, samples left out at the end, beside another one's target, or beside another's first layer.
    """
    monkeypatch.setattr(mac, "SAMPLES_PER_PROBLEM", together)
    network = perceptron(nn.Tanh)
    module, x, y = begun(network, mu=0.3, iterations=500)
    start = [t.clone() for t in module.variables["z"]]
    sizes = [t.numel() for t in start]

    def value(flat: np.ndarray) -> tuple[float, np.ndarray]:
        leaf = torch.from_numpy(flat).requires_grad_()
        z = [part.view_as(t) for part, t in zip(leaf.split(sizes), start, strict=True)]
        found = objective(network, x, y, z, 0.3)
        return float(found.detach()), torch.autograd.grad(found, leaf)[0].numpy()

    flat = torch.cat([t.reshape(-1) for t in start]).numpy()
    best = minimize(value, flat, jac=True, method="BFGS", options={"gtol": 1e-9, "maxiter": 5000})
    with torch.no_grad():
        module.lower_coordinates(x, y)
    found = torch.cat([t.reshape(-1) for t in module.variables["z"]])
    assert float(module.objective(x, y).detach()) == pytest.approx(best.fun, rel=1e-9)
    torch.testing.assert_close(found, torch.from_numpy(best.x), rtol=0, atol=1e-3)


def test_mu_grows_every_so_many_sweeps() -> None:
    """Catches a penalty that grows a sweep early or late, or by another factor."""
    module, x, y = begun(perceptron(), mu=0.5, growth=3.0, every=2, iterations=1)
    seen = []
    with torch.no_grad():
        for number in range(5):
            module.sweep(x, y, number)
            seen.append(float(module.mu))
    assert seen == pytest.approx([0.5, 1.5, 1.5, 4.5, 4.5])


def test_post_processing_refits_the_output_layer_to_the_forward_pass() -> None:
    """Catches coordinates that stay where the penalty left them: then the network is not what was judged.

    At forward coordinates the objective is the network's loss whatever mu is, and the refit can only lower it.
    """
    network = perceptron(nn.Tanh)
    module, x, y = begun(network, mu=0.3, iterations=20)
    with torch.no_grad():
        for number in range(3):
            module.sweep(x, y, number)
        hidden = [p.clone() for p in [*network[0].parameters(), *network[2].parameters()]]
        before = float(nn.functional.cross_entropy(network(x), y, reduction="sum"))
        module.iterations = 300
        module.post_process(x, y)
        after = float(nn.functional.cross_entropy(network(x), y, reduction="sum"))
        features = network[:4](x)
    assert after < before
    assert float(module.objective(x, y).detach()) == pytest.approx(after, rel=1e-9)
    for old, new in zip(hidden, [*network[0].parameters(), *network[2].parameters()], strict=True):
        assert bool((old == new).all())
    weight, bias = (p.detach().clone().requires_grad_() for p in network[4].parameters())
    fitted = nn.functional.cross_entropy(features @ weight.T + bias, y, reduction="sum")
    for gradient in torch.autograd.grad(fitted, [weight, bias]):
        assert float(gradient.abs().max()) < 1e-2 * before  # at its optimum, which may lie far out


def test_other_parameters_get_no_gradient() -> None:
    """Catches a step that leaves .grad behind, which the optimizer that counts sweeps would then apply."""
    module, x, y = begun(perceptron())
    with torch.no_grad():
        module.sweep(x, y, 0)
    assert all(p.grad is None and p.requires_grad for p in module.network.parameters())
    assert not any(z.requires_grad for z in module.variables["z"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"mu": 0.0}, "mu must be a positive number, got 0.0"),
        ({"growth": 0.5}, "growth must be a number >= 1, got 0.5"),
        ({"every": 0}, "every must be an integer >= 1, got 0"),
        ({"iterations": 1.5}, "iterations must be an integer >= 1, got 1.5"),
    ],
)
def test_bad_settings_are_refused(setting: dict[str, Any], message: str) -> None:
    """Catches a penalty that shrinks, or a step that does nothing."""
    with pytest.raises(ValueError, match=message):
        MACModule(perceptron(), **setting)


def test_variables_stay_where_a_line_search_went_wrong() -> None:
    """Catches variables left outside of the function's domain: sqrt falls towards 0, and is NaN below it."""
    x = torch.tensor([0.01], dtype=torch.float64)
    mac.lower(lambda: x.sqrt().sum(), [x], iterations=1)
    assert 0.0 <= float(x) <= 0.01
    assert not x.requires_grad
    assert x.grad is None
