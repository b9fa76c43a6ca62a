"""``Trainer(strategy="altmin_layer_parallel")``: the run of one process, its layers on several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric, SumMetric
from torchmetrics.classification import MulticlassAUROC

from lightning_altmin import (
    AltMinModule,
    BackpropModule,
    CoactivationMemory,
    CurvatureCodes,
    LayerwiseWeights,
    LineSearchCodes,
    LocalGradient,
)
from lightning_altmin.callbacks import CodeMonitor, CompareToBackprop, MuSchedule
from lightning_altmin.guard import NonFiniteError
from lightning_altmin.nn import LeNet5
from lightning_altmin.strategies import LayerParallelStrategy
from tests.distributed.gloo import launch
from tests.distributed.problems import CLASSES, NETWORKS, OPTIMIZERS, batches
from tests.distributed.test_ddp import Drawn, compare, loader, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no"),  # on purpose
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
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


SETTINGS: dict[str, Any] = {
    "adam": lambda: {},
    "line search": lambda: {"codes": LineSearchCodes()},
    "sgd": lambda: {"weights": LocalGradient(OPTIMIZERS["sgd"])},
    "accumulation": lambda: {"accumulate_batches": 2},
    "clipping": lambda: {"gradient_clip_norm": 0.01},
    "schedule": lambda: {
        "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3),
        "lr_interval": "step",
    },
    "memory": lambda: {"weights": CoactivationMemory(every=2)},
    "memory, solved": lambda: {"weights": CoactivationMemory("solve", every=3)},
    "memory below the output": lambda: {
        "weights": LayerwiseWeights({"output": LocalGradient(), "default": CoactivationMemory(every=2)})
    },
    "optimizers by layer": lambda: {
        "weights": LocalGradient({"0": OPTIMIZERS["sgd"], "default": OPTIMIZERS["adam"]}),
    },
}


@pytest.mark.parametrize(
    ("kind", "world", "name"),
    [*(("mlp", 2, name) for name in SETTINGS), ("mlp", 3, "adam"), ("mlp", 3, "memory"), ("lenet", 2, "adam")],
)
def test_equals_one_process(name: str, kind: str, world: int) -> None:
    """Catches whatever of a run is one process's own: a step, a schedule, a clipped norm, a memory, a logged loss."""
    flags = {"log_every_n_steps": 1}

    def share(rank: int) -> State:
        torch.manual_seed(rank)  # all get the weights of the first
        model, fit = module(kind, **SETTINGS[name]()), layers(world, **flags)
        fit.fit(model, loader(data(kind)))
        return state(model, fit)

    model, fit = module(kind, **SETTINGS[name]()), trainer(devices=1, **flags)
    fit.fit(model, loader(data(kind)))
    compare(launch(world, share), state(model, fit))
