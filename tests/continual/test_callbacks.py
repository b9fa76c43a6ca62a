"""Callbacks that act at boundaries: early stopping, checkpoints, optimizer state, penalties."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch.nn import functional

from lightning_altmin import AltMinModule, BackpropModule
from lightning_altmin.continual import (
    ContinualEvaluation,
    OnlineEWC,
    OnlineTaskStreamDataModule,
    Replay,
    ReservoirBuffer,
    ResetOptimizerState,
    SynapticIntelligence,
    TaskCheckpoint,
    TaskEarlyStopping,
    TaskStreamDataModule,
)
from tests.continual.problems import backprop, blob_data, blob_stream, fit, small_network
from tests.continual.recording import Record, SaveAt, state_of
from tests.module.interruption import assert_equal

# -------------------------------------------------------------------- early stopping


class Scripted(BackpropModule):
    """Logs given values instead of its validation loss, one per epoch of the run."""

    def __init__(self, values: list[float]) -> None:
        super().__init__(small_network(), optimizer=lambda p: torch.optim.SGD(p, lr=0.01))
        self.values = values

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("watched", self.values[self.trainer.fit_loop.epoch_progress.current.processed])


def epochs_of_tasks(record: Record) -> list[int]:
    """Epochs per task, of three batches of (24 - 3) * 2 samples."""
    counts = [0, 0, 0]
    for _, labels in record.batches:
        counts[labels[0] // 2] += 1
    return [count // 3 for count in counts]


def validated_data() -> TaskStreamDataModule:
    return TaskStreamDataModule(blob_stream(val_split=6), batch_size=16, epochs_per_task=5)


# Task 0 improves twice and then not for two epochs; task 1 never improves; task 2 improves in every epoch.
SCRIPT = [3.0, 2.0, 2.0, 2.5, 9.0, 9.0, 9.0, 5.0, 4.0, 3.0, 2.0, 1.0]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_task_that_stops_improving_ends_and_the_stream_goes_on(sign: int) -> None:
    """Catches the run ending instead of the task, a best value kept from the task before, and counts off by one."""
    record = Record()
    stopping = TaskEarlyStopping("watched", "min" if sign == 1 else "max", patience=2)
    trainer = fit(Scripted([sign * value for value in SCRIPT]), validated_data(), record, stopping)
    assert epochs_of_tasks(record) == [4, 3, 5]
    assert stopping.stopped == {0: 3, 1: 2}
    assert trainer.current_epoch == 12  # of 15: the run ended with the stream
    assert [event[:2] for event in record.events] == [(hook, task) for task in range(3) for hook in ("start", "end")]


def test_small_improvements_do_not_count() -> None:
    """Catches min_delta being left out."""
    record = Record()
    values = [1.0, 0.95, 0.9] * 3
    fit(Scripted(values), validated_data(), record, TaskEarlyStopping("watched", patience=2, min_delta=0.2))
    assert epochs_of_tasks(record) == [3, 3, 3]


@pytest.mark.parametrize("call", [1, 2, 4, 5, 7, 8, 10])
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_epoch_end"])
def test_early_stopping_resumes(hook: str, call: int, tmp_path: Path) -> None:
    """Catches a position, best value or patience that a resumed run has lost: its tasks would have other lengths."""
    call, path, ends = call if "epoch" in hook else 3 * call - 1, tmp_path / "saved.ckpt", []
    for ckpt in (None, path):
        record, stopping = Record(), TaskEarlyStopping("watched", patience=2)
        saver = SaveAt(hook, call if ckpt is None else -1, path)
        trainer = fit(Scripted(SCRIPT), validated_data(), record, stopping, saver, ckpt=ckpt)
        ends.append((state_of(trainer), record.batches))
    assert_equal(ends[0][0], ends[1][0])
    assert ends[1][1] == ends[0][1][-len(ends[1][1]) :]


def test_early_stopping_errors() -> None:
    """Catches a value that is never logged being taken for no improvement, and a stream without epochs."""
    with pytest.raises(MisconfigurationException, match="no such value was logged"):
        fit(backprop(), blob_data(), TaskEarlyStopping("nothing"))
    online = OnlineTaskStreamDataModule(blob_stream(), boundaries=True)
    with pytest.raises(MisconfigurationException, match="tasks with epochs"):
        fit(backprop(), online, TaskEarlyStopping())
    for arguments in ({"mode": "up"}, {"patience": 0}, {"min_delta": -1.0}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            TaskEarlyStopping(**arguments)


# -------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("name", ["task=0.ckpt", "task=1.ckpt"])
@pytest.mark.parametrize("online", [False, True])
def test_a_stream_goes_on_from_the_end_of_any_task(name: str, online: bool, tmp_path: Path) -> None:
    """Catches a task's checkpoint written before the others' hooks: importances and matrix rows would be missing."""

    def parts() -> tuple[Any, ...]:
        stream, replay = blob_stream(), Replay(ReservoirBuffer(20), 5)
        if online:
            data: Any = OnlineTaskStreamDataModule(stream, 12, replay=replay, boundaries=True)
        else:
            data = TaskStreamDataModule(stream, 12, epochs_per_task=2, replay=replay)
        return data, TaskCheckpoint(tmp_path), ContinualEvaluation(), OnlineEWC(2.0), SynapticIntelligence(2.0)

    expected = state_of(fit(backprop(momentum=0.9), *parts()))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["task=0.ckpt", "task=1.ckpt", "task=2.ckpt"]
    got = state_of(fit(backprop(momentum=0.9), *parts(), ckpt=tmp_path / name))
    assert_equal(expected, got)


def test_the_newest_state_is_saved_every_n_batches_and_after_epochs(tmp_path: Path) -> None:
    """Catches saves at other batches, and one between an epoch's last batch and what follows from it."""
    saves = []

    class Spy(TaskCheckpoint):
        def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
            before = len(saves)
            trainer.save_checkpoint = lambda path: saves.append((trainer.global_step, path.name, "batch"))
            super().on_train_batch_end(trainer, *rest)
            assert len(saves) <= before + 1

        def on_train_epoch_end(self, trainer: Any, *rest: Any) -> None:
            trainer.save_checkpoint = lambda path: saves.append((trainer.global_step, path.name, "epoch"))
            super().on_train_epoch_end(trainer, *rest)

    fit(backprop(), blob_data(), Spy(tmp_path, every_n_batches=1, tasks=False))
    kinds = ["batch", "batch", "epoch"] * 3
    assert saves == [(step + 1, "last.ckpt", kind) for step, kind in enumerate(kinds)]
    for arguments in ({"every_n_batches": 0}, {"tasks": False}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            TaskCheckpoint(tmp_path, **arguments)


# -------------------------------------------------------------------- optimizer state


@pytest.mark.parametrize("policy", ["keep", "state", "full"])
def test_optimizer_state_at_a_switch(policy: str) -> None:
    """Catches momenta kept or cleared against the policy, and schedules that are not put back.

    The oracle is plain torch on the same batches: a new SGD per task, or one for all.
    """
    record = Record()
    module = BackpropModule(
        small_network(),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
        lr_interval="step",
    )
    seen: list[Any] = []

    class Keep(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            seen.append(batch)

    fit(module, blob_data(), record, Keep(), ResetOptimizerState(policy))  # type: ignore[arg-type]
    network = small_network()

    def begin() -> tuple[Any, Any]:
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)

    optimizer, schedule = begin()
    for number, (x, y) in enumerate(seen):
        if number in (3, 6) and policy != "keep":
            if policy == "full":
                optimizer, schedule = begin()
            optimizer.state.clear()
        optimizer.zero_grad()
        functional.cross_entropy(network(x), y).backward()
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(dict(module.network.state_dict()), dict(network.state_dict()))


def test_altmins_optimizer_is_reset_too() -> None:
    """Catches a composite optimizer whose children keep their momenta."""
    counts = []

    class Count(Callback):
        def on_train_batch_start(self, trainer: Any, *rest: Any) -> None:
            counts.append(len(trainer.optimizers[0].state))

    fit(AltMinModule(small_network()), blob_data(), ResetOptimizerState(), Count())
    assert [count == 0 for count in counts] == [True, False, False] * 3
    with pytest.raises(ValueError, match="policy"):
        ResetOptimizerState("some")  # type: ignore[arg-type]


@pytest.mark.parametrize("call", [2, 4, 7])
def test_a_full_reset_resumes(call: int, tmp_path: Path) -> None:
    """Catches settings of the start that a resumed run takes from where it was resumed."""
    ends = []
    for ckpt in (None, tmp_path / "saved.ckpt"):
        module = BackpropModule(
            small_network(),
            optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
            lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
            lr_interval="step",
        )
        saver = SaveAt("on_train_batch_end", call if ckpt is None else -1, tmp_path / "saved.ckpt")
        ends.append(state_of(fit(module, blob_data(), ResetOptimizerState("full"), saver, ckpt=ckpt)))
    assert_equal(ends[0], ends[1])
