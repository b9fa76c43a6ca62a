"""Lightning's fine-tuning callback with memories and with optimizers per layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import BaseFinetuning
from torch.optim import Optimizer

from lightning_altmin import AltMinModule, CoactivationMemory, LocalGradient
from tests.module.problems import loader, network, trainer


class _Thawing(BaseFinetuning):
    """Trains the first layer from the second epoch on."""

    def __init__(self, late: bool = False) -> None:
        super().__init__()
        self.late = late
        self.first: list[torch.Tensor] = []

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        if not self.late:
            self.freeze(pl_module.network[0])  # type: ignore[index]

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        if self.late:
            self.freeze(pl_module.network[0])  # type: ignore[index]

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: Optimizer) -> None:
        self.first.append(pl_module.network[0].weight.detach().clone())  # type: ignore[index, union-attr]
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.network[0], optimizer)  # type: ignore[index]


def _per_layer() -> LocalGradient:
    return LocalGradient({"default": lambda p: torch.optim.SGD(p, lr=0.1)})


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
@pytest.mark.parametrize(
    ("make", "late"),
    [(CoactivationMemory, False), (lambda: CoactivationMemory("solve", every=2), False), (_per_layer, True)],
)
def test_lightnings_finetuning_callback(make: Any, late: bool) -> None:
    """Catches a memory that a fine-tuning run breaks, and a way out named by an error that is none: the first layer
    stays through its frozen epoch and has moved after the next.
    """
    callback = _Thawing(late)
    module = AltMinModule(network(), weights=make())
    start = module.network[0].weight.detach().clone()
    trainer(max_epochs=2, callbacks=[callback]).fit(module, loader())
    assert torch.equal(callback.first[1], start)
    assert not torch.equal(module.network[0].weight, start)


def test_layers_frozen_before_optimizers_per_layer_are_refused_with_a_way_out() -> None:
    """Catches a layer that thaws into no optimizer, or an error that does not say what asked for that."""
    module = AltMinModule(network(), weights=_per_layer())
    with pytest.raises(ValueError, match=r"one optimizer for each of \['default'\].*BaseFinetuning.*on_train_start"):
        trainer(max_epochs=2, callbacks=[_Thawing()]).fit(module, loader())
