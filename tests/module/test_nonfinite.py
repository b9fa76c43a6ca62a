"""A bad batch under the Trainer changes nothing, is named, and is skipped if that is wanted."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lightning_altmin.altmin
import lightning_altmin.module
from lightning_altmin import AltMin, AltMinModule, GradientCodes, LocalGradient
from lightning_altmin.guard import DeferredGuard, NonFiniteError
from tests.module.interruption import assert_equal
from tests.module.problems import network, samples, trainer

BATCHES = 5


def data(bad: tuple[int, ...], value: float = float("nan")) -> DataLoader[Any]:
    """Five batches of four, with one bad number in each batch named."""
    x, y = samples(4 * BATCHES)
    for batch in bad:
        x[4 * batch + 1, 2] = value
    return DataLoader(TensorDataset(x, y), batch_size=4)


def momentum(params: Any) -> torch.optim.Optimizer:
    """An optimizer that moves weights also without a new gradient, if it is asked to step."""
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1)


def state(module: AltMinModule, fit: Trainer) -> dict[str, Any]:
    """Weights, buffers and optimizer state, copied; not the number of batches seen, for a bad one was seen too."""
    weights = {name: value for name, value in module.state_dict().items() if not name.endswith("_extra_state")}
    return copy.deepcopy({"module": weights, "optimizer": fit.optimizers[0].state_dict()})


class BeforeBatch(Callback):
    """Keeps the state at the start of one batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.state: dict[str, Any] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *rest: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            self.state = state(pl_module, trainer)


@pytest.fixture
def deferred(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard of accelerators, on the CPU."""
    monkeypatch.setattr(lightning_altmin.altmin, "guard_for", lambda device, policy: DeferredGuard(policy))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("batch", [0, 3])
@pytest.mark.parametrize("factory", [momentum, torch.optim.Adam])
def test_raise_names_the_batch_and_changes_nothing(factory: Any, batch: int, value: float) -> None:
    """Catches a wrong number, running statistics that are poisoned by encode, optimizer state that took the step."""
    module = AltMinModule(network(norm=True), weights=LocalGradient(factory))
    before = BeforeBatch(batch)
    fit = trainer(max_epochs=2, callbacks=[before])
    with pytest.raises(NonFiniteError, match=f"batch {batch} "):
        fit.fit(module, data((batch,), value))
    assert_equal(state(module, fit), before.state)


@pytest.mark.parametrize("guard", ["immediate", "deferred"])
def test_a_diverged_model_does_not_end_well(guard: str, request: pytest.FixtureRequest) -> None:
    """Catches a run that skips nearly all of its batches, because of its own weights, and ends as if nothing was."""
    if guard == "deferred":
        request.getfixturevalue("deferred")
    diverging = LocalGradient(lambda params: torch.optim.SGD(params, lr=1e30))
    module = AltMinModule(network(), weights=diverging, nonfinite="skip")
    with pytest.raises(NonFiniteError, match=r"epoch 0: 1[0-9] of 20 batches were bad.*diverged"):
        trainer(max_epochs=1).fit(module, DataLoader(TensorDataset(*samples(80)), batch_size=4))


def test_raise_counts_batches_over_epochs_and_resumes(tmp_path: Path) -> None:
    """Catches a count that begins anew in each epoch, or in a resumed run."""
    first = trainer(max_epochs=2)
    first.fit(AltMinModule(network()), data(()))
    first.save_checkpoint(tmp_path / "saved.ckpt")
    with pytest.raises(NonFiniteError, match=f"batch {2 * BATCHES + 3} "):
        trainer(max_epochs=3).fit(
            AltMinModule(network()), data((3,)), ckpt_path=tmp_path / "saved.ckpt", weights_only=True
        )


@pytest.mark.parametrize("deferred_guard", [False, True])
def test_skip_is_training_without_the_bad_batches(
    deferred_guard: bool, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a skipped batch that moves weights by momentum, stops the steps being counted, or is not told of."""
    if deferred_guard:
        request.getfixturevalue("deferred")
    settings: Any = {"codes": GradientCodes(), "weights": LocalGradient(momentum), "nonfinite": "skip"}
    module = AltMinModule(network(norm=True), **settings)
    fit = trainer(max_epochs=2)
    with caplog.at_level("INFO"):
        fit.fit(module, data((1, 4)))
    assert "epoch 1: 2 bad batches were left out" in caplog.text
    plain = AltMin(network(norm=True), torch.nn.CrossEntropyLoss(), **settings)
    for _ in range(2):
        for index, (x, y) in enumerate(data(())):
            if index not in (1, 4):
                plain.step(x, y)
    assert_equal(dict(module.network.state_dict()), dict(plain.network.state_dict()))
    assert fit.global_step == 2 * BATCHES
    assert module.core.guard.skipped == 4


def test_skip_under_accumulation_averages_the_good_batches() -> None:
    """Catches a mean over all batches of a step, or a step dropped because one of its batches was bad."""
    settings: Any = {"codes": GradientCodes(), "weights": LocalGradient(momentum), "nonfinite": "skip"}
    module = AltMinModule(network().double(), accumulate_batches=3, **settings)
    x, y = samples(12)
    x = x.double()
    poisoned = x.clone()
    poisoned[5] = float("nan")
    fit = trainer(max_epochs=1)
    fit.fit(module, DataLoader(TensorDataset(poisoned, y), batch_size=4))
    plain = AltMin(network().double(), torch.nn.CrossEntropyLoss(), **settings)
    plain.step(torch.cat([x[:4], x[8:]]), torch.cat([y[:4], y[8:]]))
    for a, b in zip(module.network.parameters(), plain.network.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert fit.global_step == 1


def test_raise_under_accumulation_changes_nothing() -> None:
    """Catches a step that is made from the gradients accumulated before the bad batch."""
    module = AltMinModule(network(), weights=LocalGradient(momentum), accumulate_batches=3)
    before = BeforeBatch(2)
    fit = trainer(max_epochs=1, callbacks=[before])
    with pytest.raises(NonFiniteError, match="batch 2 "):
        fit.fit(module, data((2,)))
    assert_equal(state(module, fit), before.state)
    assert_equal(dict(module.network.state_dict()), dict(network().state_dict()))


class Batches(Callback):
    """Counts finished batches and epochs."""

    def __init__(self) -> None:
        self.batches = 0

    def on_train_batch_end(self, *args: Any) -> None:
        self.batches += 1


@pytest.mark.usefixtures("deferred")
@pytest.mark.parametrize("fused", [False, True])
def test_deferred_error_comes_at_the_next_log_point(fused: bool) -> None:
    """Catches steps after the bad batch that are not no-ops, and an error that names the batch it was found in."""
    module = AltMinModule(
        network(norm=True), weights=LocalGradient(lambda p: torch.optim.Adam(p, lr=0.01, fused=fused))
    )
    before, counter = BeforeBatch(1), Batches()
    fit = trainer(max_epochs=1, callbacks=[before, counter], log_every_n_steps=4)
    with pytest.raises(NonFiniteError, match="batch 1 "):
        fit.fit(module, data((1, 2)))
    assert counter.batches == 3  # found in the fourth, a log point
    assert_equal(state(module, fit), before.state)


@pytest.mark.usefixtures("deferred")
def test_deferred_error_comes_at_the_end_of_the_epoch() -> None:
    """Catches an epoch that ends, is validated and saved after steps that were no-ops."""
    counter = Batches()
    fit = trainer(max_epochs=2, callbacks=[counter], log_every_n_steps=1000)
    with pytest.raises(NonFiniteError, match="batch 3 "):
        fit.fit(AltMinModule(network()), data((3,)))
    assert counter.batches == BATCHES


@pytest.mark.usefixtures("deferred")
def test_deferred_error_comes_before_a_save(tmp_path: Path) -> None:
    """Catches a checkpoint that claims batches which were never trained."""

    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, *rest: Any) -> None:
            if trainer.fit_loop.total_batch_idx == 2:
                trainer.save_checkpoint(tmp_path / "saved.ckpt")

    fit = trainer(max_epochs=1, callbacks=[Save()], log_every_n_steps=1000)
    with pytest.raises(NonFiniteError, match="batch 1 "):
        fit.fit(AltMinModule(network()), data((1,)))
    assert not (tmp_path / "saved.ckpt").exists()


@pytest.mark.usefixtures("deferred")
def test_deferred_guard_trains_as_the_immediate_one() -> None:
    """Catches a guard that changes good steps."""
    module = AltMinModule(network(norm=True), weights=LocalGradient(momentum))
    trainer(max_epochs=2).fit(module, data(()))
    plain = AltMin(network(norm=True), torch.nn.CrossEntropyLoss(), weights=LocalGradient(momentum))
    for _ in range(2):
        for x, y in data(()):
            plain.step(x, y)
    assert_equal(dict(module.network.state_dict()), dict(plain.network.state_dict()))


def test_logged_loss_is_finite_beside_skipped_batches() -> None:
    """Catches a train_loss that is NaN for ever because one skipped batch was summed into it."""
    losses: list[Tensor] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *rest: Any) -> None:
            losses.append(outputs["loss"])

    fit = trainer(max_epochs=1, log_every_n_steps=5, callbacks=[Watch()])
    fit.fit(AltMinModule(network(), nonfinite="skip"), data((1,)))
    finite = [loss for loss in losses if loss.isfinite()]
    assert len(finite) == BATCHES - 1
    torch.testing.assert_close(fit.callback_metrics["train_loss"], torch.stack(finite).mean())


def test_each_fit_counts_its_own_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches bad batches of a second fit set against those of the first: few seem most of them, or most seem few."""
    monkeypatch.setattr(lightning_altmin.module, "_HOPELESS", 2)
    module = AltMinModule(network(), nonfinite="skip")
    trainer(max_epochs=2).fit(module, data(()))
    trainer(max_epochs=1).fit(module, data((1, 3)))  # 2 of 5 are not most
    assert module.core.guard.skipped == 2
    with pytest.raises(NonFiniteError, match="epoch 0: 3 of 5 batches were bad"):
        trainer(max_epochs=1).fit(module, data((0, 1, 3)))
