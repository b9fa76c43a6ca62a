"""What ``strategy="altmin_layer_parallel"`` cannot do is refused before training, on all processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn

from lightning_altmin import (
    AltMinModule,
    BackpropModule,
    LocalGradient,
)
from lightning_altmin.callbacks import CodeMonitor, CompareToBackprop
from lightning_altmin.strategies import LayerParallelStrategy
from tests.distributed.gloo import launch
from tests.distributed.layer_parallel_problems import data, layers, module
from tests.distributed.problems import CLASSES, NETWORKS
from tests.distributed.test_ddp import loader

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no"),  # on purpose
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


def one_optimizer_group(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam([p for group in groups for p in group["params"]])


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "backprop": (lambda: BackpropModule(NETWORKS["mlp"][0]()), {}, "deals out the layers of an AltMinModule"),
    "batch norm": (
        lambda: AltMinModule(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))),
        {},
        "BatchNorm in training mode",
    ),
    "weight steps": (lambda: module(weights=LocalGradient(steps=2)), {}, r"weights\.steps is 2"),
    "one group": (
        lambda: module(weights=LocalGradient(one_optimizer_group)),
        {},
        r"layers of processes \[0, 1\].*must pass on the groups",
    ),
    "averaging": (module, {"callbacks": [WeightAveraging()]}, "WeightAveraging works on the whole model"),
    "monitor": (module, {"callbacks": [CodeMonitor()]}, "CodeMonitor"),
    "comparison": (module, {"callbacks": [CompareToBackprop()]}, "CompareToBackprop"),
    "costs": (module, {"strategy": LayerParallelStrategy(costs=[1, 2])}, "one number per stage, 3 of them, got 2"),
    "a cost": (
        module,
        {"strategy": LayerParallelStrategy(costs=[1, -2, 1])},
        r"costs\[1\] must be a number >= 0, got -2",
    ),
    "micro-batches": (module, {"strategy": LayerParallelStrategy(micro_batches=0)}, "micro_batches must be an integer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused(name: str) -> None:
    """Catches a feature that would fail in mid-run, or silently mean something else."""
    model, flags, message = REFUSED[name]

    def share(rank: int) -> str:
        with pytest.raises(Exception, match="(?s)" + message) as error:
            layers(**flags).fit(model(), loader(data()))
        return type(error.value).__name__

    assert set(launch(2, share)) <= {"MisconfigurationException", "ValueError"}


def test_too_many_processes_are_refused() -> None:
    """Catches two times two processes taken for four groups of layers, or for a network with fewer layers."""

    def share(rank: int) -> bool:
        with pytest.raises(ValueError, match=r"3 layers cannot be dealt out to 4 processes.*are not combined"):
            layers(4).fit(module(), loader(data()))
        return True

    assert launch(4, share) == [True] * 4


def test_other_data_on_one_process_is_an_error() -> None:
    """Catches a sampler that deals out samples: the layers would be trained on different ones."""

    def share(rank: int) -> bool:
        with pytest.raises(RuntimeError, match="batch 0 is not the same on all processes"):
            layers().fit(module(), loader(data()[rank:]))
        return True

    assert launch(2, share) == [True, True]
