"""Oracle: float64 results of the authors' released code (arXiv 1806.09077), recorded on small problems."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_altmin import AltMin, AltMinObjective, GradientCodes, LocalGradient

GOLDEN = Path(__file__).parent.parent / "golden"


def build(name: str, data: Any, meta: dict[str, Any]) -> nn.Sequential:
    if name.startswith("lenet"):
        network = nn.Sequential(
            nn.Conv2d(1, 3, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 10),
        )  # fmt: skip
    else:
        network = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 5))
    network.double()
    for index, layer in enumerate(layers(network)):
        layer.weight.data = torch.from_numpy(data[f"init_w{index}"].copy())
        layer.bias.data = torch.from_numpy(data[f"init_b{index}"].copy())
    return network


def layers(network: nn.Sequential) -> list[Any]:
    return [m for m in network if isinstance(m, nn.Linear | nn.Conv2d)]


@pytest.mark.parametrize("engine", ["auto", "autograd"])
@pytest.mark.parametrize("name", ["mlp_relu_1step", "mlp_relu_5steps", "mlp_relu_l1", "lenet_5steps"])
def test_reference_objective_reproduces_the_official_code(name: str, engine: str) -> None:
    """Catches any change of a reduction, factor, order of updates, momentum rule or anchor in the reference preset."""
    from lightning_altmin import CodedNetwork

    data = np.load(GOLDEN / f"{name}.npz")
    meta = json.loads(str(data["meta"]))
    network = build(name, data, meta)
    core = AltMin(
        CodedNetwork(network, engine=engine),
        nn.CrossEntropyLoss(),
        objective=AltMinObjective.reference(mu=meta["mu"], lambda_c=meta["lambda_c"], lambda_w=meta["lambda_w"]),
        codes=GradientCodes(meta["code_steps"], meta["code_lr"], meta["momentum"], meta["nesterov"]),
        weights=LocalGradient(lambda params: torch.optim.Adam(params, lr=meta["lr"]), steps=meta["weight_steps"]),
    )
    for index in range(meta["steps"]):
        step = core.step(torch.from_numpy(data["x"][index]), torch.from_numpy(data["y"][index]))
        if index == 0:
            for level, (before, after) in enumerate(zip(step.codes_forward, step.codes, strict=True)):
                np.testing.assert_allclose(before.numpy(), data[f"code_forward_{level}"], atol=1e-10, rtol=0)
                np.testing.assert_allclose(after.numpy(), data[f"code_updated_{level}"], atol=1e-10, rtol=0)
        if f"step{index + 1}_w0" in data:
            for level, layer in enumerate(layers(network)):
                weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
                np.testing.assert_allclose(weight, data[f"step{index + 1}_w{level}"], atol=1e-10, rtol=0)
                np.testing.assert_allclose(bias, data[f"step{index + 1}_b{level}"], atol=1e-10, rtol=0)
