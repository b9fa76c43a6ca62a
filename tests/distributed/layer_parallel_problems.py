"""Models, batches and trainers of the layer-parallel strategy's tests."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_altmin import (
    AltMinModule,
    CurvatureCodes,
)
from lightning_altmin.nn import LeNet5
from tests.distributed.problems import CLASSES, NETWORKS, batches
from tests.distributed.test_ddp import trainer

State = dict[str, Tensor]
SIZES = (8, 8, 7, 8, 3)  # of the batches: parts of different sizes, and fewer than there should be


def lenet() -> nn.Module:
    torch.manual_seed(0)
    return LeNet5(num_classes=CLASSES, image_size=16)


MODELS = {**NETWORKS, "lenet": (lenet, (1, 16, 16))}


def module(kind: str = "mlp", **settings: Any) -> AltMinModule:
    return AltMinModule(MODELS[kind][0]().double(), **({"codes": CurvatureCodes(every=2)} | settings))


def data(kind: str = "mlp") -> list[tuple[Tensor, Tensor]]:
    return [(x[:n], y[:n]) for (x, y), n in zip(batches(MODELS[kind][1], 8, 5, torch.float64), SIZES, strict=True)]


def layers(world: int = 2, **flags: Any) -> Trainer:
    return trainer(**({"strategy": "altmin_layer_parallel", "devices": world} | flags))


def state(model: AltMinModule, fit: Trainer) -> State:
    """What a run leaves behind on every process."""
    found = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    rates = {f"lr.{g['name']}": torch.tensor(g["lr"]).double() for g in fit.optimizers[0].param_groups}
    return found | fit.callback_metrics | rates
