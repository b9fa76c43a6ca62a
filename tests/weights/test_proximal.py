"""Closed form: soft thresholds in the metric of the step, and the lasso's optimality conditions."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_altmin import (
    AltMin,
    AltMinObjective,
    GradientCodes,
    LayerwiseWeights,
    LocalGradient,
    ProximalWeights,
    WeightSolver,
)
from lightning_altmin.weights import ProximalAdam, ProximalSGD

LAMBDA = 0.02


def soft(u: Tensor, threshold: Tensor | float) -> Tensor:
    """Written out by cases."""
    return torch.where(u > threshold, u - threshold, torch.where(u < -threshold, u + threshold, torch.zeros_like(u)))


def problem() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    return network, torch.randn(12, 5).double(), torch.randint(3, (12,))


def core_of(network: nn.Module, weights: WeightSolver, lambda_w: float = LAMBDA, **settings: Any) -> AltMin:
    objective = AltMinObjective(mu=0.5, lambda_w=lambda_w)
    return AltMin(network, nn.CrossEntropyLoss(), objective, GradientCodes(2, 0.3), weights, **settings)


def smooth_gradients(network: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """The weight gradients without the l1 term, from a model whose objective has none."""
    core = core_of(copy.deepcopy(network), LocalGradient(), lambda_w=0.0)
    step = core.encode(x, y)
    core.solve_codes(step)
    core.fill_gradients(step)
    gradients = [p.grad for p in core.network.parameters()]
    assert all(g is not None for g in gradients)
    return gradients  # type: ignore[return-value]


def test_a_step_of_sgd_is_ista() -> None:
    """Catches a subgradient left in, a threshold without the rate, and biases that are thresholded."""
    network, x, y = problem()
    before, gradients = [p.detach().clone() for p in network.parameters()], smooth_gradients(network, x, y)
    core = core_of(network, ProximalWeights(lambda params: ProximalSGD(params, lr=0.7)))
    core.step(x, y)
    zeros = 0
    for w, g, after in zip(before, gradients, network.parameters(), strict=True):
        expected = soft(w - 0.7 * g, 0.7 * LAMBDA) if w.dim() > 1 else w - 0.7 * g
        torch.testing.assert_close(after.detach(), expected, rtol=1e-12, atol=1e-14)
        zeros += int((after == 0).sum())
    assert zeros > 0


@pytest.mark.parametrize("settings", [{}, {"amsgrad": True}, {"fused": True}], ids=str)
def test_steps_of_adam_are_thresholded_in_its_metric(settings: dict[str, Any]) -> None:
    """Catches a threshold without Adam's denominator, its bias correction, or with that of the step before."""
    network, x, y = problem()
    mine = core_of(network, ProximalWeights(lambda p: ProximalAdam(p, lr=0.01, **settings)), lambda_w=0.3)
    weights = [p.detach().clone() for p in network.parameters()]
    first, second = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    largest = [torch.zeros_like(w) for w in weights]
    for t in range(1, 6):
        gradients = smooth_gradients(network, x, y)
        mine.step(x, y)
        for i, g in enumerate(gradients):
            first[i] = 0.9 * first[i] + 0.1 * g
            second[i] = 0.999 * second[i] + 0.001 * g * g
            largest[i] = torch.maximum(largest[i], second[i])
            root = ((largest if "amsgrad" in settings else second)[i] / (1 - 0.999**t)).sqrt() + 1e-8
            stepped = weights[i] - 0.01 * first[i] / (1 - 0.9**t) / root
            weights[i] = soft(stepped, 0.01 * 0.3 / root) if stepped.dim() > 1 else stepped
        for w, p in zip(weights, network.parameters(), strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=1e-9, atol=1e-12)
    assert any(bool((w == 0).any()) for w in weights)


@pytest.mark.parametrize("make", [lambda p: ProximalSGD(p, lr=0.5), lambda p: ProximalAdam(p, lr=0.005)])
def test_it_ends_at_the_lasso_solution(make: Any) -> None:
    """Catches a fixed point that is not the optimum. The output layer over fixed features is a lasso: zero weights
    have ``|g| <= lambda``, the others ``g = -lambda sign(w)``.
    """
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    network[0].requires_grad_(False)
    x, y = torch.randn(40, 4).double(), torch.randn(40, 2).double()
    core = AltMin(
        network,
        nn.MSELoss(),
        AltMinObjective(mu=1.0, lambda_w=0.05),
        GradientCodes(1, 1e-9),
        ProximalWeights(make, inputs="forward"),
    )
    for _ in range(3000):
        core.step(x, y)
    with torch.no_grad():
        weight = network[2].weight.clone()
        features = network[1](network[0](x))
        g = 2 * (network[2](features) - y).t() @ features / y.numel()
    zero = weight == 0
    assert 0.1 < float(zero.double().mean()) < 0.95
    assert float(g[zero].abs().max()) <= 0.05 + 1e-4
    torch.testing.assert_close(g[~zero], -0.05 * weight[~zero].sign(), rtol=0, atol=1e-4)


def test_it_joins_solvers_by_layer_and_an_optimizer_by_layer() -> None:
    """Catches a composite that steps the optimizers without their thresholds, and a threshold on another's layer."""
    network, x, y = problem()
    huge = 1e6
    by_layer = {"0": lambda p: ProximalSGD(p, lr=0.1), "default": lambda p: ProximalAdam(p, lr=0.01)}
    core = core_of(network, LayerwiseWeights({"2": LocalGradient(), "default": ProximalWeights(by_layer)}), huge)
    core.step(x, y)
    assert all(bool((network[index].weight == 0).all()) for index in (0, 4))
    assert bool((network[2].weight != 0).all())


def test_a_bad_batch_changes_nothing() -> None:
    """Catches a threshold after a step that was not made, on the CPU and where the verdict stays on the device."""
    network, x, y = problem()
    core = core_of(network, ProximalWeights(lambda p: ProximalSGD(p, lr=0.1)), nonfinite="skip")
    core.step(x, y)
    before = [p.detach().clone() for p in network.parameters()]
    core.step(x * math.nan, y)
    for p, w in zip(network.parameters(), before, strict=True):
        assert torch.equal(p, w)
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = ProximalAdam([weight], lr=0.1, lambda_w=1.0, fused=True)
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    kept = weight.detach().clone()
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0), None  # type: ignore[attr-defined]
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(weight, kept)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda n: core_of(n, ProximalWeights(), lambda_w=0.0), ValueError, "lambda_w > 0"),
        (lambda n: core_of(n, ProximalWeights(torch.optim.Adam)), TypeError, "got Adam"),
        (
            lambda n: AltMin(
                n, nn.CrossEntropyLoss(), AltMinObjective.reference(lambda_w=0.1), weights=ProximalWeights()
            ),
            ValueError,
            "not that of ReferenceObjective",
        ),
        (lambda n: ProximalSGD(n.parameters(), lr=0.1, lambda_w=-1.0), ValueError, "lambda_w must be a number >= 0"),
    ],
)
def test_what_it_cannot_do_is_refused(make: Any, error: type[Exception], message: str) -> None:
    """Catches a run that is not sparse without a word."""
    with pytest.raises(error, match=message):
        make(problem()[0])


def test_one_solver_serves_one_model() -> None:
    """Catches a threshold of another model's ``lambda_w``: a solver keeps one, that of the model made last."""
    shared, network = ProximalWeights(), problem()[0]
    core_of(network, shared, lambda_w=0.1)
    with pytest.raises(ValueError, match="this ProximalWeights belongs to another model; make one for each"):
        core_of(problem()[0], shared, lambda_w=0.9)
    again = core_of(network, shared, lambda_w=0.2)  # the same network: a model made anew
    assert {group["lambda_w"] for group in again.optimizer.param_groups} == {0.2}
