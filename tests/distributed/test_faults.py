"""A process that dies, hangs or cannot write: the others end with an error that says so, and checkpoints stay whole."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from lightning_altmin import AltMinModule
from lightning_altmin.parallel import ProcessLostError
from lightning_altmin.trainer.checkpoint_files import CheckedCheckpoints, CheckpointError
from tests.distributed.gloo import launch, start
from tests.distributed.test_ddp import Drawn, compare, ddp, loader, module, parts, state, trainer, whole

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
SECONDS = 30.0  # in which the others have to end


def fresh() -> AltMinModule:
    model = module()
    seed_everything(3, verbose=False)
    return model


class Signal(Callback):
    """Sends this process a signal before a batch."""

    def __init__(self, batch: int, number: signal.Signals) -> None:
        self.batch, self.number = batch, number

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [0, 1])
def test_the_others_end_and_a_new_run_goes_on_bit_equal(tmp_path: Path, victim: int, number: signal.Signals) -> None:
    """Catches a process that waits for ever, an error that says nothing, a checkpoint that is cut off or incomplete."""
    kept = tmp_path / "last.ckpt"

    def share(rank: int) -> str:
        strategy = DDPStrategy(timeout=timedelta(seconds=4))
        saves = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1, save_top_k=0)
        signals = [Signal(4, number)] if rank == victim else []
        fit = ddp(strategy=strategy, enable_checkpointing=True, callbacks=[saves, *signals])
        try:
            fit.fit(fresh(), datamodule=Drawn(batch_size=4, eval_batch_size=4))
        except ProcessLostError as error:
            return f"lost: {error}"
        except BaseException as error:
            return f"{type(error).__name__}: {error}"
        return "finished"

    folder = tmp_path / "processes"
    folder.mkdir()
    begin = time.monotonic()
    workers = start(2, share, (), folder)
    workers[1 - victim].join(SECONDS)
    alive, seconds = workers[1 - victim].is_alive(), time.monotonic() - begin
    for worker in workers:
        worker.kill()
        worker.join()
    assert not alive, f"still waiting after {seconds:.0f} s"
    said = torch.load(folder / f"result{1 - victim}", weights_only=False)
    if number == signal.SIGTERM:  # Lightning passes it on, so that all processes end in good order
        assert "SIGTERM" in said or "lost" in said
    else:
        assert "another process has ended, or has not answered in time" in said or "peer" in said or "Timed out" in said

    def straight() -> Any:
        model, fit = fresh(), trainer(devices=1)
        fit.fit(model, datamodule=Drawn(batch_size=8, eval_batch_size=4))
        return state(model, fit)

    steps = torch.load(kept, weights_only=True)["global_step"]  # in the middle of the second epoch
    assert steps == 4 or (number == signal.SIGTERM and steps == 5)  # the batch in which SIGTERM comes may be finished
    model, fit = fresh(), trainer(devices=1)  # of one process, which must make no difference
    fit.fit(model, datamodule=Drawn(batch_size=8, eval_batch_size=4), ckpt_path=kept, weights_only=True)
    compare([state(model, fit)], straight())


@pytest.mark.parametrize("batch", [1, 2], ids=["in an epoch", "in the last batch of an epoch"])
@pytest.mark.parametrize("victim", [0, 1])
def test_sigterm_ends_all_long_before_the_timeout(tmp_path: Path, victim: int, batch: int) -> None:
    """Catches an exchange that the signal adds on one process: the others would wait for a partner of another kind."""

    def share(rank: int) -> None:
        strategy = DDPStrategy(timeout=timedelta(minutes=30))
        saves = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1, save_top_k=0)
        signals = [Signal(batch, signal.SIGTERM)] if rank == victim else []
        fit = ddp(strategy=strategy, enable_checkpointing=True, callbacks=[saves, *signals])
        fit.fit(fresh(), datamodule=Drawn(batch_size=4, eval_batch_size=4))

    folder = tmp_path / "processes"
    folder.mkdir()
    workers = start(2, share, (), folder)
    for worker in workers:
        worker.join(SECONDS)
    waiting = [worker.is_alive() for worker in workers]
    for worker in workers:
        worker.kill()
        worker.join()
    assert waiting == [False, False]
    assert not list(folder.glob("result*")), "a process went on"


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path: Path) -> None:
    """Catches a checkpoint that is written in place, half a file left beside it, an error that names no file."""
    kept = tmp_path / "kept" / "last.ckpt"
    data = whole()

    class Full(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(kept)
            if trainer.current_epoch == 0:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writes fail as on a full disk
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))

    def run(rank: int) -> str:
        try:
            trainer(devices=1, callbacks=[Full()]).fit(module(), loader(data))
        except CheckpointError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            return str(error)
        return "no error"

    folder = tmp_path / "processes"
    folder.mkdir()
    (worker,) = start(1, run, (), folder)
    worker.join(SECONDS)
    said = torch.load(folder / "result0", weights_only=False)
    assert f"the checkpoint '{kept}' could not be written: File too large" in said
    assert list(kept.parent.iterdir()) == [kept]
    assert torch.load(kept, weights_only=True)["global_step"] == len(data)  # of the first epoch
    model, fit = module(), trainer(devices=1)
    fit.fit(model, loader(data), ckpt_path=kept, weights_only=True)
    straight, alone = module(), trainer(devices=1)
    alone.fit(straight, loader(data))
    compare([state(model, fit)], state(straight, alone), 0.0)


class Bomb:
    """Kills the process that writes it, when what comes before it in the file is written."""

    def __reduce__(self) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)
        return str, ()


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_process_killed_while_writing_leaves_the_checkpoint_before(tmp_path: Path, elsewhere: bool) -> None:
    """Catches a file that is written in its place, and one that is moved there from another file system, so copied."""
    kept = tmp_path / "kept" / "last.ckpt"
    data = whole()

    def run(rank: int) -> None:
        model, fit = module(), trainer(devices=1, max_epochs=1)
        fit.fit(model, loader(data))
        fit.save_checkpoint(kept)
        if elsewhere:
            tempfile.tempdir = str(tmp_path / "of another file system, and not there")
            fit.save_checkpoint(kept)
        model.on_save_checkpoint = lambda checkpoint: checkpoint.update(bomb=Bomb())  # type: ignore[method-assign]
        fit.save_checkpoint(kept)

    folder = tmp_path / "processes"
    folder.mkdir()
    (worker,) = start(1, run, (), folder)
    worker.join(SECONDS)
    assert worker.exitcode == -signal.SIGKILL
    model, fit = module(), trainer(devices=1)
    fit.fit(model, loader(data), ckpt_path=kept, weights_only=True)
    straight, alone = module(), trainer(devices=1)
    alone.fit(straight, loader(data))
    compare([state(model, fit)], state(straight, alone), 0.0)


DAMAGES: dict[str, tuple[Any, str]] = {
    "empty": (lambda content: b"", "it is empty"),
    "half": (lambda content: content[: len(content) // 2], "its end is missing"),
    "without its end": (lambda content: content[:-100], "its end is missing"),
    "no checkpoint": (lambda content: b"to be or not to be", "its end is missing, or it is no checkpoint"),
    "a changed bit": (lambda content: _flipped(content), "the checksum of its part '.*' is wrong"),
}


def _flipped(content: bytes) -> bytes:
    """One bit of the first layer's weights is another; torch loads such a file and says nothing."""
    weight = module().network.state_dict()["0.weight"].numpy().tobytes()
    assert content.count(weight) == 1
    place = content.index(weight) + 100
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, damage: str) -> None:
    """Catches a run that goes on from half a checkpoint or a spoiled one, and an error that does not say so."""
    kept = tmp_path / "run.ckpt"
    trained = module()
    fit = trainer(devices=1, max_epochs=1, limit_train_batches=0)
    fit.fit(trained, loader(whole()))
    fit.save_checkpoint(kept)
    spoil, reason = DAMAGES[damage]
    kept.write_bytes(spoil(kept.read_bytes()))
    model = module()
    with torch.no_grad():
        model.network[0].weight.add_(1.0)
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    said = rf"(?s)the checkpoint '{kept}' \(.* bytes\) is cut off or damaged: .*{reason}.*go on from an earlier"
    with pytest.raises(CheckpointError, match=said):
        trainer(devices=1).fit(model, loader(whole()), ckpt_path=kept)
    with pytest.raises(CheckpointError, match=said):
        trainer(devices=1).validate(model, loader(whole()), ckpt_path=kept)
    assert all(torch.equal(value, before[name]) for name, value in model.network.state_dict().items())
    with pytest.raises(CheckpointError, match=said):
        AltMinModule.load_from_checkpoint(kept, network=model.network)


def test_a_whole_file_that_torch_refuses_keeps_torchs_reason(tmp_path: Path) -> None:
    """Catches an untrusted object, or a missing file, that is called a damaged file."""
    torch.save({"state_dict": module()}, tmp_path / "run.ckpt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        trainer(devices=1).fit(module(), loader(whole()), ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    with pytest.raises(FileNotFoundError, match="Checkpoint file not found"):
        trainer(devices=1).fit(module(), loader(whole()), ckpt_path=tmp_path / "none.ckpt")


def test_another_model_on_one_process() -> None:
    """Catches a process that waits for ever for parameters that the others do not have, under the Trainer."""

    def share(rank: int) -> str:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(6, 8 + rank), nn.ReLU(), nn.Linear(8 + rank, 3)).double()
        try:
            ddp().fit(AltMinModule(network), loader(parts(whole(), rank)))
        except (RuntimeError, ValueError) as error:
            return str(error)
        return "no error"

    said = launch(2, share)
    assert "no error" not in said
    assert any("appears not to match sizes" in each for each in said), said


class Elsewhere(CheckpointIO):
    """Notes what it is asked for, and keeps checkpoints in memory."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}
        self.options: list[Any] = []

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        if "full" in str(path):
            raise OSError(28, "No space left on device")
        self.kept[str(path)] = checkpoint
        self.options.append(storage_options)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        return self.kept[str(path)]

    def remove_checkpoint(self, path: Any) -> None:
        del self.kept[str(path)]


@pytest.mark.parametrize("options", [None, {"retries": 3}])
def test_another_plugin_writes_its_own_checkpoints(tmp_path: Path, options: Any) -> None:
    """Catches a local file beside the one that the user's plugin writes, and options that it never gets."""
    inner = Elsewhere()
    checked, path = CheckedCheckpoints(inner), tmp_path / "run.ckpt"
    checked.save_checkpoint({"step": 3}, path, options)
    assert (inner.kept, inner.options) == ({str(path): {"step": 3}}, [options])
    assert checked.load_checkpoint(path) == {"step": 3}
    checked.remove_checkpoint(path)
    assert inner.kept == {}
    with pytest.raises(CheckpointError, match=r"full' could not be written: No space left on device.* go on from"):
        checked.save_checkpoint({"step": 4}, tmp_path / "full", options)
    assert not list(tmp_path.iterdir())


def test_options_that_lightning_refuses_are_refused(tmp_path: Path) -> None:
    """Catches options for a storage that are dropped because the file is written here."""
    with pytest.raises(TypeError, match="storage_options"):
        CheckedCheckpoints(TorchCheckpointIO()).save_checkpoint({}, tmp_path / "run.ckpt", {"retries": 3})
    assert not list(tmp_path.iterdir())


def test_a_path_of_another_file_system_is_lightnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a local folder called `memory:`, and a checkpoint that is not where its address says."""
    monkeypatch.chdir(tmp_path)
    checked = CheckedCheckpoints(TorchCheckpointIO())
    checked.save_checkpoint({"step": 3}, "memory://test_faults/run.ckpt")
    assert checked.load_checkpoint("memory://test_faults/run.ckpt", weights_only=True) == {"step": 3}
    checked.remove_checkpoint("memory://test_faults/run.ckpt")
    assert not list(tmp_path.iterdir())


class Refuses:
    """Cannot be pickled, and says why."""

    def __reduce__(self) -> Any:
        raise LookupError("not to be kept")


def test_an_error_of_the_run_is_not_taken_for_one_of_the_file(tmp_path: Path) -> None:
    """Catches the reason that a run ends for, while its last checkpoint is saved, told as that of the failed save."""
    checked = CheckedCheckpoints(TorchCheckpointIO())
    try:
        raise FileNotFoundError(2, "No such file or directory", "a batch's image")
    except FileNotFoundError:
        with pytest.raises(LookupError, match="not to be kept"):
            checked.save_checkpoint({"callback": Refuses()}, tmp_path / "run.ckpt")


def test_an_object_that_cannot_be_kept_says_so_itself(tmp_path: Path) -> None:
    """Catches its error called one of the disk, half a file left behind, and the checkpoint before it overwritten."""
    kept = tmp_path / "run.ckpt"
    checked = CheckedCheckpoints(TorchCheckpointIO())
    checked.save_checkpoint({"step": 3}, kept)
    with pytest.raises(LookupError, match="not to be kept"):
        checked.save_checkpoint({"step": 4, "large": torch.zeros(1000), "callback": Refuses()}, kept)
    assert list(tmp_path.iterdir()) == [kept]
    assert checked.load_checkpoint(kept, weights_only=True) == {"step": 3}
