"""One batch is one step, for everything in the Trainer that counts steps; and the steps are those of plain AltMin."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, WeightAveraging
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

from lightning_altmin import AltMin, AltMinModule, CoactivationMemory, LocalGradient
from tests.module.problems import Record, loader, network, trainer, weights

BATCHES = 5


def sgd(params: Any) -> torch.optim.Optimizer:
    """With momentum, so that a step too many shows."""
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


class Steps(Callback):
    """Notes the global step at the end of every batch."""

    def __init__(self) -> None:
        self.after_batch: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, *rest: Any) -> None:
        self.after_batch.append(trainer.global_step)


@pytest.mark.parametrize("weights_steps", [1, 3])
@pytest.mark.parametrize("composite", [False, True])
def test_a_batch_is_one_global_step(composite: bool, weights_steps: int) -> None:
    """Catches a global step per layer's optimizer, or per inner weight step."""
    factory = {"0": sgd, "default": torch.optim.Adam} if composite else sgd
    steps = Steps()
    fit = trainer(max_epochs=2, callbacks=[steps])
    fit.fit(AltMinModule(network(), weights=LocalGradient(factory, steps=weights_steps)), loader())
    assert steps.after_batch == list(range(1, 2 * BATCHES + 1))


@pytest.mark.parametrize(("every", "expected"), [(2, [0, 1, 1, 2, 3]), (5, [0, 0, 0, 0, 1]), (7, [0, 0, 0, 0, 1])])
def test_accumulation_counts_one_step_per_n_batches(every: int, expected: list[int]) -> None:
    """Catches a step per batch under accumulation, and batches left over at the end of an epoch that never step."""
    steps = Steps()
    fit = trainer(max_epochs=2, callbacks=[steps])
    fit.fit(AltMinModule(network(), accumulate_batches=every), loader())
    assert steps.after_batch == expected + [expected[-1] + step for step in expected]


def test_leftover_batches_step_when_the_trainer_ends_an_epoch_without_length() -> None:
    """Catches reliance on the loader to know its last batch: limit_train_batches ends a stream that would go on."""

    class Endless(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            while True:
                yield torch.ones(6), torch.tensor(0)

    steps = Steps()
    fit = trainer(max_epochs=2, limit_train_batches=3, callbacks=[steps])
    fit.fit(AltMinModule(network(), accumulate_batches=2), torch.utils.data.DataLoader(Endless(), batch_size=4))
    assert steps.after_batch == [0, 1, 2, 2, 3, 4]


@pytest.mark.parametrize("way", ["callback", "hook of the optimizer"])
def test_what_a_hook_changes_in_a_group_counts(way: str) -> None:
    """Catches hooks that see one group of all layers instead of one per layer, and a rate that they change in vain: SGD
    at a rate of 0 leaves a layer as it is.
    """
    seen: list[list[str]] = []

    def freeze(optimizer: torch.optim.Optimizer) -> None:
        seen.append([group["name"] for group in optimizer.param_groups])
        optimizer.param_groups[1]["lr"] = 0.0

    class Freeze(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, module: Any, optimizer: torch.optim.Optimizer) -> None:
            freeze(optimizer)

    def hooked(params: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(params, lr=0.1)
        optimizer.register_step_pre_hook(lambda optimizer, *_: freeze(optimizer))
        return optimizer

    by_callback = way == "callback"
    factory = functools.partial(torch.optim.SGD, lr=0.1) if by_callback else hooked
    module = AltMinModule(network(), weights=LocalGradient(factory))
    before = {name: value.clone() for name, value in module.network.state_dict().items()}
    fit = trainer(max_steps=2, callbacks=[Freeze()] if by_callback else [])
    fit.fit(module, loader())
    assert seen == [["0", "2", "4"]] * 2
    assert [group["lr"] for group in fit.optimizers[0].param_groups] == [0.1, 0.0, 0.1]
    same = {name: torch.equal(value, before[name]) for name, value in module.network.state_dict().items()}
    assert same == {name: name.startswith("2.") for name in before}


def test_max_steps_is_exact() -> None:
    """Catches training that stops too early or too late because something else is counted."""
    plain = AltMin(network(), torch.nn.CrossEntropyLoss())
    for _, (x, y) in zip(range(7), [*loader(), *loader()], strict=False):
        plain.step(x, y)
    module = AltMinModule(network())
    fit = trainer(max_epochs=-1, max_steps=7)
    fit.fit(module, loader())
    assert fit.global_step == 7
    assert all(torch.equal(a, b) for a, b in zip(plain.network.parameters(), module.network.parameters(), strict=True))


@pytest.mark.parametrize("steps", [1, 2])
def test_training_is_that_of_plain_altmin(steps: int) -> None:
    """Catches any difference between the module's batch and ``AltMin.step``: BatchNorm, momentum, inner steps."""
    loss = torch.nn.CrossEntropyLoss()
    plain = AltMin(network(norm=True), loss, weights=LocalGradient(sgd, steps=steps))
    for _ in range(2):
        for x, y in loader():
            plain.step(x, y)
    module = AltMinModule(network(norm=True), loss, weights=LocalGradient(sgd, steps=steps))
    trainer(max_epochs=2).fit(module, loader())
    expected, got = weights(plain.network), weights(module.network)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert not torch.equal(network(norm=True)[0].weight, module.network[0].weight)  # type: ignore[index]


def test_checkpoints_every_n_steps_come_every_n_batches(tmp_path: Path) -> None:
    """Catches ModelCheckpoint saving at other batches than named, or with another number in the file."""
    save = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=3)
    fit = trainer(max_epochs=2, callbacks=[save], enable_checkpointing=True)
    fit.fit(AltMinModule(network()), loader())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step=3.ckpt", "step=6.ckpt", "step=9.ckpt"]


def test_weight_averaging_is_the_mean_of_the_weights_after_each_batch() -> None:
    """Catches an average that skips batches or misses the update of the last one (update_every_n_steps is modulo)."""
    seen: list[torch.Tensor] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *rest: Any) -> None:
            seen.append(pl_module.network[0].weight.detach().clone())

    module = AltMinModule(network())
    trainer(max_epochs=1, callbacks=[Watch(), WeightAveraging()]).fit(module, loader())
    # Without avg_fn the callback averages over its updates, one per batch, and puts the mean in place at the end.
    expected = torch.stack(seen).mean(0)
    assert len(seen) == BATCHES
    torch.testing.assert_close(module.network[0].weight.detach(), expected)  # type: ignore[index]


def test_learning_rates_are_monitored_by_layer_name() -> None:
    """Catches unnamed parameter groups, whose curves nobody could tell apart."""
    monitor = LearningRateMonitor()
    fit = trainer(max_epochs=1, callbacks=[monitor], logger=Record(), log_every_n_steps=1)
    module = AltMinModule(network(), weights=LocalGradient(sgd), lr_scheduler=lambda o: StepLR(o, 1))
    fit.fit(module, loader())
    assert {key.split("/")[-1] for key in monitor.lrs} == {"0", "2", "4"}


def test_loggers_count_batches() -> None:
    """Catches an x axis of loggers that differs from the number of trained batches."""
    logger = Record()
    fit = trainer(max_epochs=2, logger=logger, log_every_n_steps=2)
    fit.fit(AltMinModule(network()), loader())
    # Lightning counts from 0: after the second batch the step is 1.
    assert [step for step, _ in logger.values("train_loss")] == [1, 3, 5, 7, 9]


def test_logged_train_loss_is_the_mean_since_the_last_log_point() -> None:
    """Catches a train_loss that is only the last batch's, is reset at the epoch's end, or counts a batch twice."""
    losses: list[float] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *rest: Any) -> None:
            losses.append(float(outputs["loss"]))

    logger = Record()
    fit = trainer(max_epochs=2, logger=logger, log_every_n_steps=3, callbacks=[Watch()])
    fit.fit(AltMinModule(network()), loader())
    rows = [value for _, value in logger.values("train_loss")]
    assert rows == pytest.approx([math.fsum(losses[i : i + 3]) / 3 for i in (0, 3, 6)])


def test_first_logged_loss_is_that_of_the_untrained_network() -> None:
    """Catches a loss measured after the update, or in another mode than training."""
    x, y = next(iter(loader()))
    expected = torch.nn.functional.cross_entropy(network(norm=True)(x), y)
    fit = trainer(max_epochs=1, limit_train_batches=1, log_every_n_steps=1)
    fit.fit(AltMinModule(network(norm=True)), loader())
    torch.testing.assert_close(fit.callback_metrics["train_loss"], expected.detach())


def test_fast_dev_run_trains_one_batch() -> None:
    """Catches a module that cannot be tried out with fast_dev_run, loggers and validation included."""
    fit = trainer(fast_dev_run=True, limit_val_batches=None)
    fit.fit(AltMinModule(network()), loader(), loader(seed=3))
    assert fit.global_step == 1
    assert "val_loss" in fit.callback_metrics


def test_progress_bar_counts_batches_and_shows_the_loss() -> None:
    """Catches a progress bar whose total or position is not the number of batches."""
    from lightning.pytorch.callbacks import TQDMProgressBar

    bar = TQDMProgressBar(refresh_rate=1)
    seen: list[tuple[Any, Any]] = []

    class Watch(Callback):
        def on_train_epoch_end(self, *rest: Any) -> None:
            seen.append((bar.train_progress_bar.n, bar.train_progress_bar.total))

    fit = trainer(max_epochs=1, enable_progress_bar=True, callbacks=[bar, Watch()], log_every_n_steps=1)
    fit.fit(AltMinModule(network(), weights=LocalGradient(sgd, steps=2)), loader())
    assert seen == [(BATCHES, BATCHES)]
    assert "train_loss" in bar.get_metrics(fit, fit.lightning_module)


class Divided(nn.Module):
    """Reads a number in its forward, which a trace makes a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = 1.0
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.last(torch.relu(self.first(x))) / self.temperature
        return output


def test_every_fit_compares_the_stages_with_the_network() -> None:
    """Catches a second fit that trains another network than the one that is evaluated."""
    net = Divided()
    module = AltMinModule(net)
    trainer(max_epochs=1).fit(module, loader())
    trainer(max_epochs=1).fit(module, loader())
    net.temperature = 5.0
    with pytest.raises(ValueError, match=r"tracing found in Divided\.forward compute something else"):
        trainer(max_epochs=1).fit(module, loader())


class Own(AltMinModule):
    """The layer in the middle has an optimizer of its own."""

    def layer_optimizers(self) -> Any:
        return {"2": lambda params: torch.optim.SGD(params, lr=0.5)}


@pytest.mark.parametrize("given", [None, {"2": sgd, "default": sgd}, sgd], ids=["default", "by name", "one for all"])
def test_a_layer_steps_by_the_optimizer_that_a_subclass_gives_it(given: Any) -> None:
    """Catches a subclass's optimizer that is not asked for, or that is given other layers, too.

    By hand, in the first step: SGD moves a parameter by its rate times its gradient, and Adam by its rate alone,
    against the sign of the gradient (but for gradients as small as its eps).
    """
    module = Own(network(), weights=None if given is None else LocalGradient(given))
    twin = AltMin(network(), nn.CrossEntropyLoss())
    x, y = next(iter(loader()))
    step = twin.encode(x, y)
    twin.solve_codes(step)
    twin.fill_gradients(step)
    before = weights(module.network)
    trainer(max_epochs=1, limit_train_batches=1).fit(module, loader())
    for name, parameter in module.network.named_parameters():
        gradient = dict(twin.network.named_parameters())[name].grad
        assert gradient is not None
        moved = parameter.detach() - before[name]
        if name.startswith("2."):
            torch.testing.assert_close(moved, -0.5 * gradient, rtol=1e-4, atol=1e-6)
        elif given is None:
            seen = gradient.abs() > 1e-4
            assert bool(seen.any())
            torch.testing.assert_close(moved[seen], -0.002 * gradient[seen].sign(), rtol=1e-2, atol=1e-6)
        else:
            torch.testing.assert_close(moved, -0.1 * gradient, rtol=1e-4, atol=1e-6)


def test_optimizers_of_layers_need_gradients() -> None:
    """Catches a layer's optimizer that is dropped without a word, because a memory makes the only one there is."""
    with pytest.raises(TypeError, match=r"layer_optimizers needs weights=LocalGradient\(\.\.\.\), got Coactivation"):
        Own(network(), weights=CoactivationMemory())
