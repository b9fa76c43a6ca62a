"""One ``trainer.fit`` for a whole stream: order, hooks, replay, flags, and resuming at any batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, seed_everything

from lightning_altmin import AltMinModule
from lightning_altmin.continual import (
    ClassBalancedBuffer,
    OnlineTaskStreamDataModule,
    Replay,
    ReservoirBuffer,
    Task,
    TaskStream,
    TaskStreamDataModule,
    fuzzy,
    split_classes,
)
from tests.continual.problems import backprop, blob_stream, fit, numbered, small_network
from tests.continual.recording import Record, SaveAt, state_of
from tests.module.interruption import assert_equal
from tests.module.problems import trainer as quiet_trainer


def numbered_stream(**settings: Any) -> TaskStream:
    """Three tasks of 14, 14 and 12 samples whose first feature is their number."""
    x, y = numbered(40, 6)
    return split_classes((torch.cat([x, torch.zeros(40, 5)], 1) / 1.0, y), blobs_like(12), 3, **settings)


def blobs_like(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = numbered(count, 6)
    return torch.cat([x, torch.zeros(count, 5)], 1), y


def trained_numbers(record: Record) -> list[list[int]]:
    return [[int(v) for v in x] for x, _ in record.batches]


def joined(batches: list[list[int]]) -> list[int]:
    return [number for batch in batches for number in batch]


# -------------------------------------------------------------------- order and hooks


def test_tasks_come_in_order_every_sample_once_per_epoch() -> None:
    """Catches a switch one epoch late, samples left out or doubled, and epochs in one and the same order."""
    stream = numbered_stream()
    data, record = TaskStreamDataModule(stream, batch_size=4, epochs_per_task=2), Record()
    fit(backprop(lr=1e-5), data, record)
    batches = trained_numbers(record)
    assert [len(b) for b in batches] == ([4, 4, 4, 2] * 4 + [4, 4, 4] * 2)
    epochs = [joined(batches[i : i + n]) for i, n in ((0, 4), (4, 4), (8, 4), (12, 4), (16, 3), (19, 3))]
    for index, epoch in enumerate(epochs):
        assert sorted(epoch) == [n for n in range(40) if n % 6 in stream[index // 2].classes]
    assert epochs[0] != epochs[1]
    assert record.events == [
        ("start", 0, 0), ("end", 0, 8), ("start", 1, 8), ("end", 1, 16), ("start", 2, 16), ("end", 2, 22),
    ]  # fmt: skip


def test_online_stream_is_one_pass() -> None:
    """Catches batches that span tasks, a second pass, and boundaries at the wrong batch."""
    stream = numbered_stream()
    record = Record()
    trainer = fit(backprop(lr=1e-5), OnlineTaskStreamDataModule(stream, batch_size=5), record)
    batches = trained_numbers(record)
    assert sorted(joined(batches)) == list(range(40))
    assert [len(b) for b in batches] == [5, 5, 4, 5, 5, 4, 5, 5, 2]
    for index, batch in enumerate(batches):
        assert all(n % 6 in stream[index // 3].classes for n in batch)
    assert record.events == [
        ("start", 0, 0), ("end", 0, 3), ("start", 1, 3), ("end", 1, 6), ("start", 2, 6), ("end", 2, 9),
    ]  # fmt: skip
    assert trainer.current_epoch == 1


def test_the_module_has_the_hooks_too() -> None:
    """Catches a LightningModule's own hooks that are never called, or called in a boundary-free stream."""

    class Hooked(type(backprop())):  # type: ignore[misc]
        def on_task_start(self, task: Task) -> None:
            self.seen = [*getattr(self, "seen", []), task.index]

    module = Hooked(small_network())
    fit(module, TaskStreamDataModule(blob_stream()))
    assert module.seen == [0, 1, 2]
    hidden = Hooked(small_network())
    fit(hidden, OnlineTaskStreamDataModule(blob_stream()))
    assert not hasattr(hidden, "seen")


def test_callbacks_that_learn_from_boundaries_are_refused_where_they_are_hidden() -> None:
    """Catches a method that uses boundaries in a stream that is said to have none."""

    class Learns(Callback):
        def on_task_end(self, *rest: Any) -> None:
            pass

    with pytest.raises(MisconfigurationException, match="Learns needs to know when tasks begin and end"):
        fit(backprop(), OnlineTaskStreamDataModule(blob_stream()), Learns())
    fit(backprop(), OnlineTaskStreamDataModule(blob_stream(), boundaries=True), Learns())


def test_validation_is_of_the_current_task() -> None:
    """Catches validation data of another task, and validation without such data."""

    class Seen(Callback):
        def __init__(self) -> None:
            self.labels: list[set[int]] = []

        def on_validation_batch_end(self, trainer: Any, module: Any, out: Any, batch: Any, *rest: Any) -> None:
            self.labels.append(set(batch[1].tolist()))

    seen = Seen()
    stream = blob_stream(val_split=0.25)
    fit(backprop(), TaskStreamDataModule(stream, epochs_per_task=2), seen)
    assert seen.labels == [set(t.classes) for t in stream for _ in range(2)]
    without = Seen()
    fit(backprop(), TaskStreamDataModule(blob_stream()), without)
    assert without.labels == []
    with pytest.raises(RuntimeError, match="val_split"):
        TaskStreamDataModule(blob_stream()).val_dataloader()


def test_the_global_seed_does_not_change_the_order() -> None:
    """Catches an order drawn from the global generator, which dropout or an initialisation would shift."""
    orders = []
    for seed in (1, 2):
        seed_everything(seed, verbose=False)
        record = Record()
        fit(backprop(), TaskStreamDataModule(blob_stream(), seed=5), record)
        orders.append(record.batches)
    assert orders[0] == orders[1]


def test_a_second_fit_begins_the_stream_anew() -> None:
    """Catches a data module that goes on with the last task, or with a full buffer, in a new run."""
    data = TaskStreamDataModule(blob_stream(), replay=Replay(ReservoirBuffer(10), 4), batch_size=8)
    records = Record(), Record()
    for record in records:
        fit(backprop(), data, record)
    assert records[0].batches == records[1].batches
    assert records[0].events == records[1].events


# -------------------------------------------------------------------- replay


def test_replayed_samples_come_behind_the_new_ones_and_are_old() -> None:
    """Catches samples replayed before they were trained, or never from earlier tasks."""
    stream = numbered_stream()
    record = Record()
    data = TaskStreamDataModule(stream, batch_size=4, replay=Replay(ReservoirBuffer(12), 3))
    fit(backprop(lr=1e-5), data, record)
    batches, before = trained_numbers(record), []
    assert len(batches[0]) == 4
    for batch, size in zip(batches, [4, 4, 4, 2, 4, 4, 4, 2, 4, 4, 4], strict=True):
        new, old = batch[:size], batch[size:]
        assert set(old) <= set(before)
        assert len(set(old)) == len(old) == min(3, len(before))
        before += new
    assert any(n % 6 in stream[0].classes for n in batches[-1][4:] + batches[-2][4:])
    assert data.replay is not None
    assert data.replay.buffer.seen == 40  # the last batch included


def test_a_sample_is_offered_once_however_many_epochs() -> None:
    """Catches a reservoir that sees every epoch's samples again, which favours tasks with many epochs."""
    data = TaskStreamDataModule(numbered_stream(), batch_size=4, epochs_per_task=3, replay=Replay(ReservoirBuffer(12)))
    fit(backprop(lr=1e-5), data)
    assert data.replay is not None
    assert data.replay.buffer.seen == 40


def test_stored_bytes_are_prepared_only_when_replayed() -> None:
    """Catches samples normalised twice, or stored as floats."""
    x = torch.randint(0, 256, (40, 8), dtype=torch.uint8)
    y = torch.arange(40) % 4
    stream = split_classes((x, y), (x, y), 2, prepare=lambda b: b.float() / 255)
    record = Record()
    data = TaskStreamDataModule(stream, batch_size=5, replay=Replay(ClassBalancedBuffer(10), 5))
    fit(backprop(), data, record)
    assert data.replay is not None
    assert data.replay.buffer.x.dtype == torch.uint8
    stored = {round(float(v), 6) for v in x[:, 0].float() / 255}
    assert {round(v, 6) for batch, _ in record.batches for v in batch} <= stored


# -------------------------------------------------------------------- resuming

BATCHES = 3 * 2 * 3  # tasks, epochs, batches per epoch
SETUPS: dict[str, Callable[[], Any]] = {
    "epochs": lambda: TaskStreamDataModule(blob_stream(), batch_size=16, epochs_per_task=2),
    "replay": lambda: TaskStreamDataModule(
        blob_stream(), batch_size=16, epochs_per_task=2, replay=Replay(ReservoirBuffer(20), 6)
    ),
    "balanced": lambda: TaskStreamDataModule(
        blob_stream(), batch_size=16, epochs_per_task=2, replay=Replay(ClassBalancedBuffer(20), 6)
    ),
    "val": lambda: TaskStreamDataModule(blob_stream(val_split=2), batch_size=16, epochs_per_task=2),
    "online": lambda: OnlineTaskStreamDataModule(fuzzy(blob_stream()), 6, replay=Replay(ReservoirBuffer(20), 4)),
}


def assert_resumes(setup: str, hook: str, call: int, path: Path, module: Callable[[], Any]) -> None:
    """Train without interruption, saving on the way; resume with everything new; compare all that was done after."""
    seed_everything(1, verbose=False)
    saver, whole = SaveAt(hook, call, path), Record()
    expected = state_of(fit(module(), SETUPS[setup](), whole, saver))
    assert saver.trained >= 0, "the checkpoint was never saved"
    seed_everything(2, verbose=False)
    rest, silent = Record(), SaveAt("on_nothing", 1, path)  # the checkpoint callback's place must not matter
    got = state_of(fit(module(), SETUPS[setup](), rest, silent, ckpt=path))
    assert rest.batches == whole.batches[saver.trained :], "other batches"
    after = [event for event in whole.events if event[2] > saver.trained]
    assert [event for event in rest.events if event[2] > saver.trained] == after, "other task hooks"
    assert_equal(expected, got)


@pytest.mark.parametrize("call", range(1, BATCHES + 1))
def test_epochs_resume_at_every_batch(call: int, tmp_path: Path) -> None:
    """Catches a resume that trains the wrong task at a boundary, repeats a hook, or shifts the order."""
    assert_resumes("epochs", "on_train_batch_end", call, tmp_path / "saved.ckpt", lambda: backprop(momentum=0.9))


@pytest.mark.parametrize("setup", ["replay", "balanced", "online", "val"])
@pytest.mark.parametrize("call", [1, 2, 3, 4, 6, 7, 9, 12, 13, 17])
def test_buffers_resume_at_any_batch(setup: str, call: int, tmp_path: Path) -> None:
    """Catches buffers that miss the batch trained last, or draw other samples after a resume.

    Lightning does not make up for a validation that was due directly after the checkpoint's batch, and we say so.
    """
    if setup == "val" and call % 3 == 0:
        with pytest.warns(UserWarning, match="does not make up for that validation"):
            assert_resumes(setup, "on_train_batch_end", call, tmp_path / "saved.ckpt", backprop)
        return
    assert_resumes(setup, "on_train_batch_end", call, tmp_path / "saved.ckpt", backprop)


@pytest.mark.parametrize("setup", ["replay", "val"])
@pytest.mark.parametrize("call", [1, 2, 3, 5])
@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_task_end"])
def test_epochs_resume_between_epochs(setup: str, call: int, hook: str, tmp_path: Path) -> None:
    """Catches checkpoints at task boundaries, before or after the hooks, that lead to the wrong task."""
    if hook == "on_task_end" and call > 2:
        call -= 2  # nothing is left to train after the last task
    assert_resumes(setup, hook, call, tmp_path / "saved.ckpt", backprop)


@pytest.mark.parametrize("call", [1, 3, 4, 9, 13])
def test_altmin_resumes_in_a_stream(call: int, tmp_path: Path) -> None:
    """Catches AltMin's state, or its random state, getting lost in the middle of a stream."""
    assert_resumes("replay", "on_train_batch_end", call, tmp_path / "saved.ckpt", lambda: AltMinModule(small_network()))


def test_a_failed_batch_is_not_remembered(tmp_path: Path) -> None:
    """Catches a batch that was handed out, but whose training failed, in the buffer of the saved run."""

    class Fail(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.fit_loop.total_batch_idx == 4:
                raise RuntimeError("power cut")

        def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
            trainer.save_checkpoint(tmp_path / "failed.ckpt")

    with pytest.raises(RuntimeError, match="power cut"):
        fit(backprop(), SETUPS["replay"](), Fail())
    saved = torch.load(tmp_path / "failed.ckpt", weights_only=True)
    [replay] = saved["TaskStreamDataModule"]["replay"]
    assert replay["buffer"]["seen"] == 48  # three batches of 16 in the first epoch; the second epoch is not offered
    whole, rest = Record(), Record()
    expected = state_of(fit(backprop(), SETUPS["replay"](), whole))
    got = state_of(fit(backprop(), SETUPS["replay"](), rest, ckpt=tmp_path / "failed.ckpt"))
    assert rest.batches == whole.batches[4:]
    assert_equal(expected["weights"], got["weights"])
    assert_equal(expected["data"], got["data"])


def test_a_run_that_failed_leaves_the_trainer_usable() -> None:
    """Catches hooks that stay in the Trainer and are called twice in its next run."""

    class FailOnce(Callback):
        failed = False

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if not self.failed:
                self.failed = True
                raise RuntimeError("power cut")

    data, record = SETUPS["replay"](), Record()
    failing = quiet_trainer(callbacks=[record, FailOnce()], **data.trainer_kwargs())
    with pytest.raises(RuntimeError, match="power cut"):
        failing.fit(backprop(), datamodule=data)
    record.events.clear()
    failing.fit(backprop(), datamodule=data)
    assert [event[:2] for event in record.events] == [(hook, task) for task in range(3) for hook in ("start", "end")]


# -------------------------------------------------------------------- flags and other bad input


def test_a_trainer_that_would_train_another_stream_is_refused() -> None:
    """Catches flags with which the wrong task is trained after a resume, or the stream is cut short."""
    data = TaskStreamDataModule(blob_stream(), epochs_per_task=2)
    assert data.trainer_kwargs() == {"max_epochs": 6, "reload_dataloaders_every_n_epochs": 1}
    never: list[tuple[str, Any]] = [("overfit_batches", 1), ("max_steps", 5)]
    for flag, value in [("reload_dataloaders_every_n_epochs", 2), ("max_epochs", 5), *never]:
        with pytest.raises(MisconfigurationException, match=flag):
            fit(backprop(), data, **{flag: value})
    online = OnlineTaskStreamDataModule(blob_stream())
    for flag, value in [("max_epochs", 2), ("limit_train_batches", 1), ("limit_train_batches", 0.5), *never]:
        with pytest.raises(MisconfigurationException, match=flag):
            fit(backprop(), online, **{flag: value})


def test_more_epochs_than_the_stream_has_end_with_the_stream() -> None:
    """Catches the last task being trained on to max_epochs."""
    trainer = fit(backprop(), TaskStreamDataModule(blob_stream()), max_epochs=50)
    assert trainer.current_epoch == 3


def test_fast_dev_run_is_one_batch() -> None:
    """Catches the checks refusing Lightning's own smoke test."""
    for data in (TaskStreamDataModule(blob_stream()), OnlineTaskStreamDataModule(blob_stream())):
        record = Record()
        fit(backprop(), data, record, fast_dev_run=1)
        assert len(record.batches) == 1


def test_bad_arguments() -> None:
    """Catches numbers that cannot be meant, a wrong stream or replay, and validation data in some tasks only."""
    stream = blob_stream()
    for name, value in (("batch_size", 0), ("eval_batch_size", -1), ("epochs_per_task", 0), ("epochs_per_task", 1.5)):
        with pytest.raises(ValueError, match=name):
            TaskStreamDataModule(stream, **{name: value})
    with pytest.raises(TypeError, match="TaskStream"):
        TaskStreamDataModule(list(stream))  # type: ignore[arg-type]
    for kind in (TaskStreamDataModule, OnlineTaskStreamDataModule):
        for replay in (100, ReservoirBuffer(100), Replay):
            with pytest.raises(TypeError, match=r"replay must be None or a Replay, such as Replay\(.*\), got"):
                kind(stream, replay=replay)  # type: ignore[arg-type]
    with_val = blob_stream(val_split=0.5)
    with pytest.raises(ValueError, match=r"tasks \[1\] have no validation data"):
        TaskStreamDataModule(TaskStream([with_val[0], stream[1]]))
    with pytest.raises(ValueError, match="no val data"):
        list(TaskStreamDataModule(stream).evaluation_batches(0, "val"))


def test_a_checkpoint_of_another_stream_is_refused(tmp_path: Path) -> None:
    """Catches a run that goes on with other tasks, or without its buffer, as if nothing had happened."""
    path = tmp_path / "saved.ckpt"
    fit(backprop(), SETUPS["replay"](), SaveAt("on_train_batch_end", 2, path))
    with pytest.raises(ValueError, match="another stream"):
        fit(backprop(), TaskStreamDataModule(blob_stream(per_class=20), batch_size=16, epochs_per_task=2), ckpt=path)
    with pytest.raises(ValueError, match="with replay"):
        fit(backprop(), SETUPS["epochs"](), ckpt=path)
    other = TaskStreamDataModule(blob_stream(), batch_size=16, epochs_per_task=2, replay=Replay(ReservoirBuffer(21), 6))
    with pytest.raises(ValueError, match="size"):
        fit(backprop(), other, ckpt=path)
    replay = Replay(ReservoirBuffer(20), 6)
    smaller = TaskStreamDataModule(blob_stream(), batch_size=8, epochs_per_task=2, replay=replay)
    with pytest.raises(ValueError, match="batch_size"):
        fit(backprop(), smaller, ckpt=path)


@pytest.mark.parametrize("kind", [TaskStreamDataModule, OnlineTaskStreamDataModule])
def test_a_stream_can_be_looked_at_without_a_trainer(kind: type[Any]) -> None:
    """Catches a data module that asks a Trainer it does not have: the first task is the current one."""
    data = kind(blob_stream())
    for stage in ("validate", "fit"):
        data.setup(stage)
        data.teardown(stage)
    assert data.task.index == 0
    if kind is TaskStreamDataModule:
        data.end_task()  # no epoch is running that could be the last one
        assert (data.task.index, data.epoch_in_task, data.task_is_over) == (0, 0, False)


def test_buffers_of_other_processes_are_refused() -> None:
    """Catches a run on fewer processes that goes on with one buffer of two, as if it were all that was kept."""
    data = SETUPS["replay"]()
    state = data.state_dict()
    state["replay"] = [*state["replay"], *state["replay"]]
    with pytest.raises(ValueError, match="replay buffers of 2 processes, this run has 1"):
        data.load_state_dict(state)
