"""Learning-rate schedules follow their closed form, and the twin's are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR, OneCycleLR, ReduceLROnPlateau

from lightning_altmin import AltMinModule, BackpropModule, LocalGradient
from tests.module.problems import loader, network, trainer

BATCHES, EPOCHS = 5, 4
Make = Callable[..., LightningModule]


def sgd(params: Any) -> torch.optim.Optimizer:
    """Rate 1, so that a rate is the schedule's factor."""
    return torch.optim.SGD(params, lr=1.0)


def altmin(**settings: Any) -> LightningModule:
    """Under manual optimization."""
    return AltMinModule(network(), weights=LocalGradient(sgd), **settings)


def backprop(**settings: Any) -> LightningModule:
    """Under Lightning's automatic optimization."""
    return BackpropModule(network(), optimizer=sgd, **settings)


both = pytest.mark.parametrize("make", [altmin, backprop])


class Rates(Callback):
    """The rate that each batch is trained at."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, *rest: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[-1]["lr"])


def rates_of(module: LightningModule, **flags: Any) -> list[float]:
    """Train, and return the rate of every batch."""
    rates = Rates()
    fit = trainer(callbacks=[rates], **({"max_epochs": EPOCHS, "limit_val_batches": None} | flags))
    fit.fit(module, loader(), loader(8, seed=3))
    return rates.rates


def halved(optimizer: torch.optim.Optimizer) -> ExponentialLR:
    """After n of its steps the rate is ``2 ** -n``."""
    return ExponentialLR(optimizer, 0.5)


@both
@pytest.mark.parametrize("frequency", [1, 2, 3])
def test_epoch_schedule(make: Make, frequency: int) -> None:
    """Catches a schedule never stepped, stepped per batch, or one epoch early or late."""
    rates = rates_of(make(lr_scheduler=halved, lr_frequency=frequency))
    assert rates == [0.5 ** (epoch // frequency) for epoch in range(EPOCHS) for _ in range(BATCHES)]


@both
@pytest.mark.parametrize("frequency", [1, 2, 3])
def test_step_schedule_counts_steps_of_the_run(make: Make, frequency: int) -> None:
    """Catches a count that begins anew in every epoch: 5 batches are no multiple of 2 or 3."""
    rates = rates_of(make(lr_scheduler=halved, lr_interval="step", lr_frequency=frequency))
    assert rates == [0.5 ** (batch // frequency) for batch in range(EPOCHS * BATCHES)]


def test_step_schedule_under_accumulation_counts_optimizer_steps() -> None:
    """Catches a schedule that runs n times too fast when n batches make a step.

    With 5 batches per epoch and 2 per step, steps come after batches 2, 4 and 5.
    """
    rates = rates_of(altmin(lr_scheduler=halved, lr_interval="step", accumulate_batches=2), max_epochs=2)
    assert rates == [0.5**steps for steps in (0, 0, 1, 1, 2, 3, 3, 4, 4, 5)]


@both
def test_one_cycle_schedule_has_exactly_as_many_steps_as_it_was_made_for(make: Make) -> None:
    """Catches one step too many, which OneCycleLR refuses, and a rate that is one step late."""
    rates = rates_of(
        make(
            lr_interval="step",
            lr_scheduler=lambda o: OneCycleLR(o, 1.0, EPOCHS * BATCHES, cycle_momentum=False, anneal_strategy="linear"),
        )
    )
    # linear from 1/25 up to 1 at step 0.3 * 20 - 1 = 5, then down to 1/25/1e4 at the last of 20 batches
    up = [1 / 25 + (1 - 1 / 25) * batch / 5 for batch in range(5)]
    down = [1 + (1 / 25e4 - 1) * (batch - 5) / 14 for batch in range(5, 20)]
    assert rates == pytest.approx(up + down)


@both
def test_epoch_cut_short_by_max_steps_does_not_step_the_schedule(make: Make) -> None:
    """Catches an epoch counted because its end hooks ran; Lightning does not count it."""
    module = make(lr_scheduler=halved)
    fit = trainer(max_epochs=-1, max_steps=7)
    fit.fit(module, loader())
    assert fit.lr_scheduler_configs[0].scheduler.last_epoch == 1


def test_schedule_by_layer() -> None:
    """Catches parameter groups without names or in another order than the layers."""

    def by_name(optimizer: torch.optim.Optimizer) -> LambdaLR:
        assert [group["name"] for group in optimizer.param_groups] == ["0", "2", "4"]
        return LambdaLR(optimizer, [lambda epoch: 1.0, lambda epoch: 0.1**epoch, lambda epoch: 0.0])

    for optimizers in (sgd, {"default": sgd, "2": sgd}):
        names: list[str] = []

        def one_rate(optimizer: torch.optim.Optimizer, names: list[str] = names) -> LambdaLR:
            names += [group["name"] for group in optimizer.param_groups]
            return LambdaLR(optimizer, [lambda e, n=name: 0.1**e if n == "2" else 1.0 for name in names])

        module = AltMinModule(network(), weights=LocalGradient(optimizers), lr_scheduler=one_rate)
        fit = trainer(max_epochs=2)
        fit.fit(module, loader())
        rates = {group["name"]: group["lr"] for group in fit.optimizers[0].param_groups}
        assert rates == pytest.approx({"0": 1.0, "2": 0.01, "4": 1.0})
    trainer(max_epochs=1).fit(AltMinModule(network(), weights=LocalGradient(sgd), lr_scheduler=by_name), loader())


class ScriptedValidation(Callback):
    """Logs a chosen value at every validation's end, in the place of a loss."""

    def __init__(self, values: list[float]) -> None:
        self.values = list(values)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            pl_module.log("watched", self.values.pop(0))


def plateau(optimizer: torch.optim.Optimizer) -> ReduceLROnPlateau:
    """Halves the rate whenever the watched value has not improved."""
    return ReduceLROnPlateau(optimizer, factor=0.5, patience=0)


@both
def test_plateau_halves_the_rate_when_the_watched_value_does_not_fall(make: Make) -> None:
    """Catches a schedule that watches another value, one epoch late, or that warns about keys Lightning ignores."""
    rates = Rates()
    scripted = ScriptedValidation([3.0, 2.0, 2.5, 1.0])
    fit = trainer(max_epochs=EPOCHS, limit_val_batches=None, callbacks=[rates, scripted])
    fit.fit(make(lr_scheduler=plateau, lr_monitor="watched"), loader(), loader(8, seed=3))
    assert rates.rates == [1.0] * 3 * BATCHES + [0.5] * BATCHES  # 2.5 after 2.0 is the one that did not improve


@both
def test_plateau_every_second_epoch(make: Make) -> None:
    """Catches a frequency that is ignored for plateaus: of 1, 2, 2, 3 it sees the second and the fourth."""
    scripted = ScriptedValidation([1.0, 2.0, 2.0, 3.0])
    fit = trainer(max_epochs=EPOCHS, limit_val_batches=None, callbacks=[scripted])
    fit.fit(make(lr_scheduler=plateau, lr_monitor="watched", lr_frequency=2), loader(), loader(8, seed=3))
    schedule: Any = fit.lr_scheduler_configs[0].scheduler
    assert (schedule.last_epoch, schedule.best, fit.optimizers[0].param_groups[0]["lr"]) == (2, 2.0, 0.5)


@both
def test_plateau_of_the_training_loss_per_step(make: Make) -> None:
    """Catches a step schedule that asks for train_loss before the batch has logged it."""
    module = make(lr_scheduler=plateau, lr_monitor="train_loss", lr_interval="step", lr_frequency=2)
    fit = trainer(max_epochs=1, log_every_n_steps=2)
    fit.fit(module, loader())
    assert fit.lr_scheduler_configs[0].scheduler.last_epoch == BATCHES // 2


@both
def test_plateau_without_its_value_is_an_error(make: Make) -> None:
    """Catches a misspelt lr_monitor that would silently keep the rate for ever."""
    module = make(lr_scheduler=plateau, lr_monitor="val_lost")
    message = r"lr_monitor='val_lost' has not been logged .*; logged are .*'val_acc', 'val_loss'"
    with pytest.raises(MisconfigurationException, match=message):
        trainer(max_epochs=1, limit_val_batches=None).fit(module, loader(), loader(8, seed=3))


@both
def test_plateau_needs_a_monitor(make: Make) -> None:
    """Catches a plateau schedule nobody told what to watch."""
    with pytest.raises(ValueError, match="name the watched value, as lr_monitor='val_loss'"):
        trainer(max_epochs=1).fit(make(lr_scheduler=plateau), loader())


@both
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr_interval": "batch"}, "lr_interval must be 'epoch' or 'step', got 'batch'"),
        ({"lr_frequency": 0}, "lr_frequency must be an integer >= 1, got 0"),
        ({"lr_frequency": 1.5}, "lr_frequency must be an integer >= 1, got 1.5"),
    ],
)
def test_unusable_settings_are_refused(make: Make, settings: dict[str, Any], message: str) -> None:
    """Catches settings that would be ignored, or never step."""
    with pytest.raises(ValueError, match=message):
        make(**settings)
