"""CompareWithTwin: the twin starts where the compared run started, sees what it saw, and leaves no trace in it."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassF1Score

from lightning_altmin import AltMinModule, BackpropModule, CodedNetwork
from lightning_altmin.callbacks import CompareWithTwin, MuSchedule
from tests.callbacks.training import (
    MemoryLogger,
    RandomData,
    SaveAt,
    backprop_in_disguise,
    module,
    network,
    sgd,
    trainer,
)


def halving(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """A rate that changes at every step of the schedule."""
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({}, {}),
        ({"lr_scheduler": halving, "lr_interval": "step", "lr_frequency": 2}, {"max_epochs": 3}),
        ({"lr_scheduler": halving}, {"max_epochs": 3, "check_val_every_n_epoch": 2}),
        ({"accumulate_batches": 2}, {}),
        ({"gradient_clip_norm": 0.05}, {}),
        ({"gradient_clip_norm": {"0": 0.03}}, {}),
        ({}, {"max_steps": 8, "max_epochs": 9}),
        ({}, {"limit_train_batches": 3, "limit_val_batches": 0}),
        ({}, {"num_sanity_val_steps": 2}),
    ],
)
def test_backprop_in_disguise_and_its_twin_end_equal(tmp_path: Path, settings: Any, flags: Any) -> None:
    """Would catch a twin with other initial weights, batches, dropout masks, schedule, or number of steps.

    With forward inputs and one code step of rate 1 the compared run is backprop, so that with the same optimizer both
    end at the same weights and buffers.
    """
    model, twins = backprop_in_disguise(**settings), CompareWithTwin(optimizer=sgd)
    trainer(tmp_path, [twins], **flags).fit(model, datamodule=RandomData())
    assert twins.twin is not None
    ours, theirs = model.network.state_dict(), twins.twin.network.state_dict()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-10, atol=1e-10)
    assert twins.results["AltMin"]["test_loss"] == pytest.approx(twins.results["backprop"]["test_loss"], rel=1e-10)


def deep_network() -> nn.Sequential:
    """Two Linears in a block of their own, "2", which would be two layers by themselves."""
    block = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), block, nn.Tanh(), nn.Linear(6, 3)).double()


def test_the_twin_is_clipped_by_the_layers_of_the_compared_run(tmp_path: Path) -> None:
    """Would catch a twin that is split anew, without the ``blocks`` that its bound is for.

    The bound is so small that the block hardly moves where it is held.
    """
    torch.manual_seed(5)
    network = deep_network()
    begun, last = ([p.detach().clone() for p in network[i].parameters()] for i in (2, 4))
    model = module(network=CodedNetwork(network, blocks=["2"]), gradient_clip_norm={"2": 1e-9})
    twins = CompareWithTwin(sgd)
    trainer(tmp_path, [twins]).fit(model, datamodule=RandomData())
    assert twins.twin is not None
    trained: Any = twins.twin.network
    for before, after in zip(begun, trained[2].parameters(), strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
    assert float((trained[4].weight.detach() - last[0]).norm()) > 0.01  # and nothing else is held


def test_tied_layers_of_a_block_are_compared(tmp_path: Path) -> None:
    """Would catch a comparison refused after the whole run, for layers that a block is allowed to tie."""
    torch.manual_seed(5)
    block = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    block[2].weight = block[0].weight
    model = module(network=CodedNetwork([block.double(), nn.Sequential(nn.Tanh(), nn.Linear(5, 3)).double()]))
    twins = CompareWithTwin(sgd)
    trainer(tmp_path, [twins]).fit(model, datamodule=RandomData())
    assert twins.twin is not None
    trained: Any = twins.twin.network
    assert trained[0][2].weight is trained[0][0].weight


def test_same_batches_in_the_same_order(tmp_path: Path) -> None:
    """Would catch a twin that sees its own shuffle."""
    data = RandomData()
    trainer(tmp_path, [CompareWithTwin()]).fit(module(), datamodule=data)
    asked = data.train.asked
    assert len(asked) == 2 * 2 * 48  # two runs of two epochs
    assert asked[:96] == asked[96:]
    assert asked[:48] != asked[48:96] != list(range(48))


def test_both_results_are_the_test_set_s(tmp_path: Path) -> None:
    """Would catch results of the training or validation data, of the wrong network, or rows that are swapped."""
    data, twins = RandomData(), CompareWithTwin()
    metrics = {"acc": AltMinModule(network()).test_metrics["acc"], "f1": MulticlassF1Score(3)}
    model = module(metrics=metrics)
    trainer(tmp_path, [twins]).fit(model, datamodule=data)
    assert twins.twin is not None
    x, y = data.held_out.x, data.held_out.y
    for row, trained in (("AltMin", model.network), ("backprop", twins.twin.network)):
        trained.eval()
        with torch.no_grad():
            output = trained(x)
        result = twins.results[row]
        assert set(result) == {"test_acc", "test_f1", "test_loss", "training seconds", "parameters"}
        assert result["test_acc"] == pytest.approx(float((output.argmax(1) == y).double().mean()))
        assert result["test_loss"] == pytest.approx(float(nn.functional.cross_entropy(output, y)), rel=1e-6)
        assert result["parameters"] == (5 * 6 + 6) + 2 * 6 + (6 * 4 + 4) + (4 * 3 + 3)
        assert result["training seconds"] > 0


def test_one_clear_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Would catch a table that lacks a row or column, or does not show the results."""
    twins = CompareWithTwin(functools.partial(torch.optim.Adam, lr=0.002))
    trainer(tmp_path, [twins]).fit(module(), datamodule=RandomData())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip() and set(line) != {"-"}]
    assert lines[0].split() == ["test", "acc", "test", "loss", "training", "seconds", "parameters"]
    for line, (who, optimizer) in zip(lines[1:], (("AltMin", "SGD 0.1"), ("backprop", "Adam 0.002")), strict=True):
        *name, accuracy, loss, seconds, parameters = line.split()
        result = twins.results[who]
        assert " ".join(name) == f"{who}, {optimizer}"
        assert (float(accuracy), float(loss)) == (round(result["test_acc"], 4), round(result["test_loss"], 4))
        assert (float(seconds), int(parameters)) == (round(result["training seconds"], 1), result["parameters"])


def test_the_twin_has_the_optimizer_of_the_compared_run(tmp_path: Path) -> None:
    """Would catch optimizers and rates being compared under the names of the methods."""
    twins = CompareWithTwin()
    model = backprop_in_disguise()  # whose optimizer is `sgd`
    trainer(tmp_path, [twins]).fit(model, datamodule=RandomData())
    assert twins.twin is not None
    theirs = twins.twin.network.state_dict()
    for name, value in model.network.state_dict().items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("fused", [True, False])
def test_a_bound_is_that_of_gradients_without_the_scale_of_float16(tmp_path: Path, fused: bool) -> None:
    """Would catch a twin whose gradients are cut to nothing because they are multiplied by the scale when the bound is
    applied: fused Adam undoes the scaling after that, other optimizers before.
    """
    twins = CompareWithTwin(sgd)
    runner = trainer(tmp_path, [twins])
    runner.fit(module(gradient_clip_norm=0.5), datamodule=RandomData())
    twin = twins.twin
    assert twin is not None
    twin.trainer.precision_plugin.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # type: ignore[attr-defined]
    scale = 1024.0 if fused else 1.0
    wanted = {}
    for parameters in twin._layers.values():
        norm = sum(float(torch.ones_like(p).square().sum()) for p in parameters) ** 0.5
        for p in parameters:
            p.grad = torch.full_like(p, scale)
            wanted[p] = scale * torch.ones_like(p) * min(1.0, 0.5 / norm)
    twin.configure_gradient_clipping(torch.optim.Adam(twin.network.parameters(), fused=fused))
    for p, gradient in wanted.items():
        torch.testing.assert_close(p.grad, gradient, rtol=1e-5, atol=0)


def test_forward_inputs_are_named_in_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Would catch backprop by another route being shown as AltMin without saying so."""
    trainer(tmp_path, [CompareWithTwin()]).fit(backprop_in_disguise(), datamodule=RandomData())
    assert "AltMin (forward inputs)" in capsys.readouterr().out


def ending(folder: Path, callbacks: list[Any]) -> tuple[dict[str, Tensor], tuple[Any, ...]]:
    """The module after a run, and the next random numbers."""
    random.seed(1)
    np.random.seed(1)
    model = module()
    trainer(folder, callbacks).fit(model, datamodule=RandomData())
    return model.state_dict(), (float(torch.rand(())), float(np.random.rand()), random.random())


def test_the_run_is_as_without_it(tmp_path: Path) -> None:
    """Would catch a twin that changes the trained model, its metrics' state or the random state of what follows."""
    expected, expected_draws = ending(tmp_path, [])
    compared, draws = ending(tmp_path, [CompareWithTwin()])
    assert draws == expected_draws
    assert expected.keys() == compared.keys()
    assert all(torch.equal(expected[name], compared[name]) for name in expected)


def test_trainer_module_and_data_belong_together_again(tmp_path: Path) -> None:
    """Would catch a module or data module left attached to the twin's Trainer, or switches of the Trainer changed."""
    torch.use_deterministic_algorithms(True)
    try:
        model, data, logger = module(), RandomData(), MemoryLogger()
        twins = CompareWithTwin()
        run = trainer(tmp_path, [twins], logger=logger, deterministic=True)
        attributes = {**data.__dict__, "trainer": run}
        run.fit(model, datamodule=data)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert model.trainer is run
    assert {k: v for k, v in data.__dict__.items() if k in attributes} == attributes
    assert run.lightning_module is model
    assert run.state.finished
    last_step, last = logger.rows[-1]
    assert last_step == run.global_step == 12
    assert last == {f"twin/{who}/{name}": v for who, row in twins.results.items() for name, v in row.items()}
    (tested,) = run.test(model, datamodule=data, verbose=False)
    assert tested["test_loss"] == twins.results["AltMin"]["test_loss"]


def test_a_resumed_run_is_compared_as_a_whole(tmp_path: Path) -> None:
    """Would catch a twin that starts from the resumed weights, or trains only what is left."""
    whole, half, rest = CompareWithTwin(), CompareWithTwin(), CompareWithTwin()
    trainer(tmp_path, [whole], max_epochs=4, limit_val_batches=0).fit(module(), datamodule=RandomData())
    run = trainer(tmp_path, [half, SaveAt(12, tmp_path / "half.ckpt")], enable_checkpointing=True, limit_val_batches=0)
    run.fit(module(), datamodule=RandomData())
    torch.manual_seed(99)  # what comes before the resume must not matter
    resumed = trainer(tmp_path, [rest], max_epochs=4, limit_val_batches=0)
    resumed.fit(module(network=network()), datamodule=RandomData(), ckpt_path=tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    for who in ("AltMin", "backprop"):
        for name in ("test_acc", "test_loss"):
            assert rest.results[who][name] == whole.results[who][name]
    assert rest.results["AltMin"]["training seconds"] > saved["callbacks"]["CompareWithTwin"]["seconds"] > 0


def test_an_overridden_unpack_serves_the_twin_too(tmp_path: Path) -> None:
    """Would catch a twin that cannot read the batches of a subclassed module."""

    class Triples(RandomData):
        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader([(0, x, y) for x, y in zip(self.train.x, self.train.y, strict=True)], 8, shuffle=True)

        def test_dataloader(self) -> DataLoader[Any]:
            return DataLoader([(0, x, y) for x, y in zip(self.train.x, self.train.y, strict=True)], 8)

    class Reads(AltMinModule):
        def unpack(self, batch: Any) -> tuple[Tensor, Any]:
            return batch[1], batch[2]

    twins = CompareWithTwin()
    trainer(tmp_path, [twins], limit_val_batches=0).fit(Reads(network()), datamodule=Triples())
    assert set(twins.results) == {"AltMin", "backprop"}


def test_refused_before_training(tmp_path: Path) -> None:
    """Would catch a comparison that turns out impossible only after hours of training."""

    class NoTest(LightningDataModule):
        def train_dataloader(self) -> DataLoader[Any]:
            return RandomData().train_dataloader()

        def val_dataloader(self) -> DataLoader[Any]:
            return RandomData().val_dataloader()

    def loaders(data: Any) -> list[Any]:
        return [RandomData().train_dataloader(), RandomData().val_dataloader()] if data is None else []

    before = module()
    for data in (NoTest(), None):
        model = module()
        run = trainer(tmp_path, [CompareWithTwin()])
        with pytest.raises(MisconfigurationException, match="CompareWithTwin needs test data"):
            run.fit(model, *loaders(data), datamodule=data)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    with pytest.raises(MisconfigurationException, match="CompareWithTwin needs an AltMinModule"):
        trainer(tmp_path, [CompareWithTwin()]).fit(BackpropModule(network()), datamodule=RandomData())
    with pytest.raises(TypeError, match="optimizer must be a function of parameters"):
        CompareWithTwin(optimizer=0.1)  # type: ignore[arg-type]


def test_a_start_that_is_unknown_is_refused(tmp_path: Path) -> None:
    """Would catch resumed weights being taken for initial ones."""
    run = trainer(tmp_path, [MuSchedule(), SaveAt(6, tmp_path / "one.ckpt")], enable_checkpointing=True)
    run.fit(module(), datamodule=RandomData())
    with pytest.raises(MisconfigurationException, match="does not know how this run began"):
        trainer(tmp_path, [MuSchedule(), CompareWithTwin()]).fit(
            module(), datamodule=RandomData(), ckpt_path=tmp_path / "one.ckpt"
        )


def test_nothing_trained_nothing_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Would catch a table about a run that did not happen."""
    twins = CompareWithTwin()
    trainer(tmp_path, [twins], max_epochs=0).fit(module(), datamodule=RandomData())
    assert twins.results == {}
    assert capsys.readouterr().out == ""
