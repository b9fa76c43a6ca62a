"""Solvers per layer: each layer ends where its own solver would lead it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lightning_altmin import AltMin, CoactivationMemory, LayerwiseWeights, LocalGradient
from tests.weights.problems import batch, mlp


def test_solvers_per_layer() -> None:
    """Catches a layer that gets another's solver, and a bias or group that gets lost: each layer of the mixed network
    ends where it does in a network trained by its solver alone (one step, so layers do not meet).
    """
    networks = [mlp()]
    networks += [copy.deepcopy(networks[0]) for _ in range(2)]

    def gradient() -> LocalGradient:
        return LocalGradient(lambda params: torch.optim.SGD(params, lr=0.1), inputs="forward")

    solvers = [
        LayerwiseWeights({"2": gradient(), "output": gradient(), "default": CoactivationMemory()}),
        CoactivationMemory(),
        gradient(),
    ]
    x, y = batch(networks[0])
    for network, weights in zip(networks, solvers, strict=True):
        core = AltMin(network, nn.CrossEntropyLoss(), weights=weights)
        core.step(x, y)
    mixed, memory, plain = networks
    for index, expected in ((0, memory), (2, plain), (4, plain)):
        torch.testing.assert_close(mixed[index].state_dict(), expected[index].state_dict(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("solvers", "error", "message"),
    [
        ({}, ValueError, "at least one"),
        ({"default": nn.ReLU()}, TypeError, r"solvers\['default'\] must be a WeightSolver"),
        ({"0": LocalGradient(steps=2), "default": LocalGradient()}, ValueError, "same number of weight steps"),
        ({"9": LocalGradient(), "default": CoactivationMemory()}, ValueError, r"unknown stages \['9'\]"),
        ({"0": LocalGradient()}, ValueError, "gives nothing for stage '2'"),
        (
            {"4": LocalGradient(), "output": LocalGradient(), "default": CoactivationMemory()},
            ValueError,
            "names the last stage twice, as '4' and as 'output'",
        ),
    ],
)
def test_bad_solvers_per_layer_are_named(solvers: Any, error: type[Exception], message: str) -> None:
    """Catches a layer without a solver, and a solver without a layer: of two for one layer, one would do nothing."""
    with pytest.raises(error, match=message):
        AltMin(mlp(), nn.CrossEntropyLoss(), weights=LayerwiseWeights(solvers))


def gradient() -> LocalGradient:
    return LocalGradient(lambda params: torch.optim.SGD(params, lr=0.1))


def test_one_solver_under_two_names_is_refused() -> None:
    """Catches a solver whose measurements are asked for, and whose steps are taken, twice."""
    shared = gradient()
    with pytest.raises(ValueError, match="one solver under two names; make one for each"):
        LayerwiseWeights({"0": shared, "default": shared})


@pytest.mark.parametrize("frozen", [LocalGradient, CoactivationMemory], ids=lambda solver: solver.__name__)
def test_a_solver_whose_layers_are_all_frozen_rests(frozen: Any) -> None:
    """Catches an optimizer without parameters, which torch refuses, and a frozen layer that moves all the same.

    A frozen layer is to stay to the bit, and all others are to move.
    """
    network = mlp()
    network[2].requires_grad_(False)
    core = AltMin(network, nn.CrossEntropyLoss(), weights=LayerwiseWeights({"2": frozen(), "default": gradient()}))
    before = copy.deepcopy(network.state_dict())
    core.step(*batch(network))
    moved = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"0.weight", "0.bias", "4.weight", "4.bias"}


def test_nothing_to_train_is_refused() -> None:
    """Catches a composite of no optimizers, whose error speaks of children."""
    network = mlp()
    network.requires_grad_(False)
    weights = LayerwiseWeights({"0": gradient(), "default": CoactivationMemory()})
    with pytest.raises(ValueError, match="network has no trainable parameter"):
        AltMin(network, nn.CrossEntropyLoss(), weights=weights)


@pytest.mark.parametrize(("stages", "factors"), [(None, (0.25, 0.25)), (["2", "4"], (1.0, 0.25)), (["4"], (1.0, 1.0))])
def test_a_discount_is_for_memories(stages: list[str] | None, factors: tuple[float, float]) -> None:
    """Catches a discount that a solver without memory breaks, or that reaches a memory that was not named.

    The nine samples seen so far count as nine times the factor.
    """
    weights = LayerwiseWeights(
        {"0": CoactivationMemory("solve"), "output": gradient(), "default": CoactivationMemory("solve")}
    )
    core = AltMin(mlp(), nn.CrossEntropyLoss(), weights=weights)
    core.step(*batch(core.network))
    weights.discount(0.25, stages)
    rows = [float(value) for name, value in core.state_dict().items() if name.endswith(".rows")]
    assert rows == [9 * factor for factor in factors]
