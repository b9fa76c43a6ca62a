"""What a memory refuses, and how it says so."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_altmin import AltMin, AltMinObjective, CoactivationMemory, LayerwiseWeights, LocalGradient
from tests.weights.problems import batch, mlp

BAD: list[tuple[dict[str, Any], str]] = [
    ({"form": "other"}, "form must be 'innovation' or 'solve', got 'other'"),
    ({"solver": "bcd"}, "solver='bcd' belongs to form='solve', got form='innovation'"),
    ({"form": "solve", "solver": "qr"}, "solver must be 'cholesky' or 'bcd', got 'qr'"),
    ({"lambda_w": 0.1}, "lambda_w=0.1 belongs to form='solve', got form='innovation'"),
    ({"form": "solve", "lambda_w": 0.1}, "lambda_w=0.1 belongs to solver='bcd'"),
    ({"form": "solve", "solver": "bcd", "ridge": 0.1}, "ridge belongs to solver='cholesky'"),
    ({"form": "solve", "step": 0.1}, "step=0.1 belongs to form='innovation', got form='solve'"),
    ({"form": "solve", "ridge": -1.0}, "ridge must lie in"),
    ({"ridge": 0.0}, r"ridge must lie in \[0.1, 10\], got 0.0"),
    ({"step": 0.0}, r"step must lie in \(0, 1\], got 0.0"),
    ({"step": float("nan")}, "step must lie in"),
    ({"forgetting": 0.0}, r"forgetting must lie in \(0, 1\], got 0.0"),
    ({"every": 0}, "every must be an integer >= 1, got 0"),
    ({"limit": 0.0}, "limit must be a positive number, or math.inf for no bound, got 0.0"),
    ({"positions": "sum"}, "positions must be 'root' or 'mean', got 'sum'"),
    ({"rank": -1}, "rank must be an integer >= 0, got -1"),
    ({"rank": 2.5}, "rank must be an integer >= 0, got 2.5"),
    ({"form": "solve", "rank": 5}, "rank=5 belongs to form='innovation', got form='solve'"),
    ({"form": "solve", "limit": 0.2}, "limit=0.2 belongs to form='innovation', got form='solve'"),
    ({"form": "solve", "positions": "mean"}, "positions='mean' belongs to form='innovation', got form='solve'"),
    ({"window": 2}, "window=2 belongs to form='solve', got form='innovation'"),
    ({"form": "solve", "window": 0}, "window must be an integer >= 1, got 0"),
    ({"storage": "single"}, "storage='single' belongs to form='solve', got form='innovation'"),
    ({"form": "solve", "storage": "half"}, "storage must be 'full', 'triangle' or 'single', got 'half'"),
    ({"form": "solve", "storage": "single", "window": 2}, "storage='single' keeps one sum, and window=2 one per task"),
    (
        {"form": "solve", "storage": "single", "ridge": 1e-5},
        "ridge=1e-05 lets that rounding through; give a ridge >= 1e-4",
    ),
    ({"inputs": "both"}, "inputs must be 'moved' or 'forward', got 'both'"),
]


@pytest.mark.parametrize(("settings", "message"), BAD, ids=[str(s) for s, _ in BAD])
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    """Catches a setting out of its range, or of the other form, that would be silently ignored."""
    with pytest.raises(ValueError, match=message):
        CoactivationMemory(**settings)


def test_the_whole_of_the_contract_can_be_given() -> None:
    """Catches a setting of both forms that one of them refuses, and neutral values taken for settings."""
    both: dict[str, Any] = {"solver": "cholesky", "ridge": 0.5, "forgetting": 0.9, "every": 3, "lambda_w": 0.0}
    CoactivationMemory(form="innovation", step=0.5, limit=math.inf, rank=4, positions="mean", **both)
    CoactivationMemory(form="solve", window=2, **both)
    CoactivationMemory(form="solve", storage="triangle", **both)
    CoactivationMemory(form="solve", solver="bcd", lambda_w=0.1, forgetting=0.9, every=3)


def test_layers_it_cannot_serve_are_refused() -> None:
    """Catches a grouped convolution solved as if it had one matrix, and blocks that least squares cannot see into."""
    grouped = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(ValueError, match=r"stage '0' has groups=2; .*LayerwiseWeights"):
        AltMin(grouped, nn.CrossEntropyLoss(), weights=CoactivationMemory())
    embedded = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    with pytest.raises(ValueError, match="stage '0' has Embedding"):
        AltMin(embedded, nn.CrossEntropyLoss(), weights=CoactivationMemory())
    AltMin(
        embedded,
        nn.CrossEntropyLoss(),
        weights=LayerwiseWeights({"0": LocalGradient(), "default": CoactivationMemory()}),
    )  # the way out that the message names


def test_other_misuse_is_refused() -> None:
    """Catches compilation of a solver with a memory, a memory shared by two models, and an l1 term that is dropped."""
    with pytest.raises(ValueError, match="cannot hold what CoactivationMemory keeps"):
        AltMin(mlp(), nn.CrossEntropyLoss(), weights=CoactivationMemory(), compile=True)
    shared = CoactivationMemory()
    AltMin(mlp(), nn.CrossEntropyLoss(), weights=shared)
    with pytest.raises(ValueError, match="belongs to another model"):
        AltMin(mlp(), nn.CrossEntropyLoss(), weights=shared)
    with pytest.raises(ValueError, match=r"lambda_w=0.1, which a memory does not follow"):
        AltMin(mlp(), nn.CrossEntropyLoss(), AltMinObjective(lambda_w=0.1), weights=CoactivationMemory())
    core = AltMin(mlp(), nn.CrossEntropyLoss(), weights=CoactivationMemory())
    core.objective.lambda_w = 0.1
    with pytest.raises(ValueError, match=r"lambda_w=0.1, which a memory does not follow"):
        core.step(*batch(core.network))
    with pytest.raises(ValueError, match="keeps no targets to solve for"):
        shared.solve()


class _Absolute(AltMinObjective):
    """``mu ||f(input) - c||_1`` in the weight step."""

    def weight_coupling_gradient(self, residual: Tensor, signal: Tensor | None = None) -> Tensor:
        return residual.sign() * (self.mu / residual.shape[0])


def test_solutions_are_for_squares_only() -> None:
    """Catches least squares in the place of a distance that the objective defines: what a layer's ``W`` minimises is
    then another. A constant factor, as that of the reference's arithmetic, moves no minimum.
    """
    with pytest.raises(ValueError, match="_Absolute has a weight_coupling_gradient of its own"):
        AltMin(mlp(), nn.CrossEntropyLoss(), _Absolute(), weights=CoactivationMemory("solve"))
    AltMin(mlp(), nn.CrossEntropyLoss(), _Absolute(), weights=CoactivationMemory())  # goes by gradients
    AltMin(mlp(), nn.CrossEntropyLoss(), AltMinObjective.reference(), weights=CoactivationMemory("solve"))
    only_output = LayerwiseWeights({"output": CoactivationMemory("solve"), "default": LocalGradient()})
    AltMin(mlp(), nn.CrossEntropyLoss(), _Absolute(), weights=only_output)  # which is judged by the loss


class _Named(nn.Module):
    """Layers with names that a dictionary has for itself."""

    NAMES = ("keys", "values", "items", "pop", "update", "clear")

    def __init__(self) -> None:
        super().__init__()
        for name in self.NAMES:
            self.add_module(name, nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        for name in self.NAMES[:-1]:
            x = getattr(self, name)(x).relu()
        last: Tensor = self.clear(x)
        return last


def test_a_layer_may_have_any_name() -> None:
    """Catches statistics kept under names that a module cannot have: what a network's child may be called, they may."""
    core = AltMin(_Named(), nn.CrossEntropyLoss(), weights=CoactivationMemory())
    core.step(torch.randn(5, 6), torch.randint(6, (5,)))
    held = {name.split(".")[2] for name in core.state_dict() if name.startswith("weights._statistics.")}
    assert held == set(_Named.NAMES)


@pytest.mark.parametrize("wrong", ["adam", 0.1, torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)])
def test_what_makes_no_optimizer_is_refused(wrong: Any) -> None:
    """Catches an optimizer, or its name, passed for its factory: it would be called at the first batch, if ever."""
    with pytest.raises(TypeError, match="optimizer must be a function of parameters, got"):
        CoactivationMemory(optimizer=wrong)


def test_a_network_without_a_trainable_parameter_is_refused() -> None:
    """Catches a memory of nothing, and an error that speaks of optimizers."""
    network = mlp()
    network.requires_grad_(False)
    with pytest.raises(ValueError, match="network has no trainable parameter"):
        AltMin(network, nn.CrossEntropyLoss(), weights=CoactivationMemory())


def test_what_no_memory_holds_is_trained_alone() -> None:
    """Catches an optimizer without parameters, which torch refuses, where all weights are frozen and no layer has a
    memory: biases then go by the gradient of their own problem, here with a rate of 0.5.
    """
    network = mlp()
    for layer in network[::2]:
        layer.weight.requires_grad_(False)
    core = AltMin(
        network,
        nn.CrossEntropyLoss(),
        weights=CoactivationMemory(optimizer=lambda params: torch.optim.SGD(params, lr=0.5)),
    )
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    x, y = batch(network)
    output = network(x)
    (expected,) = torch.autograd.grad(nn.functional.cross_entropy(output, y), network[4].bias)
    step = core.step(x, y)
    torch.testing.assert_close(network[4].bias.detach(), before["4.bias"] - 0.5 * expected, rtol=1e-10, atol=1e-12)
    for index, level in (
        ("0", 0),
        ("2", 1),
    ):  # d/db of the batch mean of mu/2 ||c + move - (W x + b)||^2, over the share
        signal = 1.0 if step.signals[level] is None else float(step.signals[level])
        gradient = -core.objective.mu * step.moves[level].mean(0) / signal
        found = dict(network.named_parameters())[f"{index}.bias"].detach()
        torch.testing.assert_close(found, before[f"{index}.bias"] - 0.5 * gradient, rtol=1e-8, atol=1e-10)
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters() if name.endswith("weight"))
