"""Oracle: a layer's parameters, gradients and optimizer state exist on one process only under layer parallelism."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer

from lightning_altmin import AltMinModule, CoactivationMemory
from lightning_altmin.continual import (
    MemoryPolicy,
    OnlineEWC,
    OrthogonalWeights,
    ResetOptimizerState,
    SynapticIntelligence,
    TaskLearningRates,
)
from tests.continual.problems import small_network

CALLBACKS: list[Callable[[], Callback]] = [
    MemoryPolicy,
    OnlineEWC,
    OrthogonalWeights,
    ResetOptimizerState,
    SynapticIntelligence,
    lambda: TaskLearningRates(0.5),
]


@pytest.mark.parametrize("make", CALLBACKS)
def test_callbacks_that_need_all_layers_are_refused(make: Callable[[], Callback]) -> None:
    """Catches a penalty or a policy that would silently treat the layers of its own process alone."""
    callback = make()
    trainer = Trainer(accelerator="cpu", devices=2, strategy="altmin_layer_parallel", logger=False)
    module = AltMinModule(small_network(), weights=CoactivationMemory(form="solve"))
    with pytest.raises(MisconfigurationException, match=rf"{type(callback).__name__} works on all layers.*one process"):
        callback.setup(trainer, module, "fit")
