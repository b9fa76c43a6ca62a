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
