"""Trainer features that cannot work are refused at the start of a run, by the name of what to use instead."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint, ModelPruning, StochasticWeightAveraging
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
)
from lightning.pytorch.tuner import Tuner

from lightning_altmin import AltMinModule, CodedNetwork
from lightning_altmin.trainer.checks import refuse_skipping_in_groups, refuse_unsupported
from lightning_altmin.trainer.sharing import refuse_strategy
from tests.module.problems import loader, network, trainer, weights

FLAGS: dict[str, tuple[dict[str, Any], str]] = {
    "clip": ({"gradient_clip_val": 0.5}, r"use AltMinModule\(gradient_clip_norm=0.5\)"),
    "accumulate": ({"accumulate_grad_batches": 4}, r"use AltMinModule\(accumulate_batches=4\)"),
    "precision": ({"precision": "16-true"}, "precision='16-true' is not supported"),
    "finder": ({"callbacks": [LearningRateFinder()]}, "learning-rate finder .* compare a few rates"),
    "pruning": ({"callbacks": [ModelPruning("l1_unstructured")]}, "prune the trained network"),
    "swa": ({"callbacks": [StochasticWeightAveraging(0.1)]}, "use the WeightAveraging callback"),
}


@pytest.mark.parametrize("name", FLAGS)
def test_refused_before_anything_is_trained(name: str) -> None:
    """Catches a feature that is silently ignored, or an error that comes after training began."""
    flags, message = FLAGS[name]
    module = AltMinModule(network())
    before = weights(module)
    with pytest.raises(MisconfigurationException, match=message):
        trainer(max_epochs=1, **flags).fit(module, loader())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_checkpoints_by_time_are_refused(tmp_path: Any) -> None:
    """Catches an interval that Lightning ignores without a word under manual optimization."""
    from datetime import timedelta

    checkpoint = ModelCheckpoint(tmp_path, train_time_interval=timedelta(minutes=1))
    with pytest.raises(MisconfigurationException, match="use every_n_train_steps or every_n_epochs"):
        trainer(max_epochs=1, callbacks=[checkpoint], enable_checkpointing=True).fit(AltMinModule(network()), loader())


def test_the_tuner_is_refused() -> None:
    """Catches a sweep that changes nothing and suggests a rate all the same."""
    with pytest.raises(MisconfigurationException, match="learning-rate finder"):
        Tuner(trainer(max_epochs=1)).lr_find(AltMinModule(network()), loader())


STRATEGIES = {
    FSDPStrategy: "flattens parameters",
    DeepSpeedStrategy: "owns the backward pass",
    ModelParallelStrategy: "a slice of every parameter",
    type("OtherStrategy", (), {}): "OtherStrategy is not known",
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_are_refused(strategy: type[Any]) -> None:
    """Catches a strategy that would train wrongly; the strategies themselves need devices that are not here."""
    fake: Any = SimpleNamespace(strategy=strategy.__new__(strategy), world_size=2)
    with pytest.raises(MisconfigurationException, match=f"{STRATEGIES[strategy]}.*strategy='ddp'"):
        refuse_strategy(fake)


@pytest.mark.parametrize("check", [lambda f: refuse_unsupported(f, CodedNetwork(network())), refuse_skipping_in_groups])
def test_devices_are_refused(check: Any) -> None:
    """Catches a device that lacks double precision, and groups of batches that a single bad one would discard there."""
    strategy = SimpleNamespace(root_device=torch.device("mps"))
    fake: Any = SimpleNamespace(strategy=strategy, world_size=1, precision="32-true", callbacks=[])
    with pytest.raises(MisconfigurationException, match=r"accelerator='cpu'|accumulate_batches=1"):
        check(fake)


def test_what_works_is_not_refused() -> None:
    """Catches a check that refuses the ordinary run, or double precision."""
    fit = trainer(max_epochs=1, precision="64-true")
    fit.fit(AltMinModule(network()), torch.utils.data.DataLoader(loader().dataset, batch_size=10))
    assert fit.global_step == 2
