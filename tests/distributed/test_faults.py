"""A process that dies, hangs or cannot write: the others end with an error that says so, and checkpoints stay whole."""

from __future__ import annotations

import os
import resource
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from lightning_altmin import AltMinModule
from lightning_altmin.strategies import ProcessLostError
from tests.distributed.gloo import start
from tests.distributed.test_ddp import Drawn, compare, ddp, loader, module, state, trainer, whole

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

    assert torch.load(kept, weights_only=True)["global_step"] == 4  # in the middle of the second epoch
    model, fit = fresh(), trainer(devices=1)  # of one process, which must make no difference
    fit.fit(model, datamodule=Drawn(batch_size=8, eval_batch_size=4), ckpt_path=kept, weights_only=True)
    compare([state(model, fit)], straight())


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path: Path) -> None:
    """Catches a checkpoint that is written in place: the disk is full for the second one."""
    kept = tmp_path / "run.ckpt"
    data = whole()

    class Full(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(kept)
            if trainer.current_epoch == 0:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writes fail as on a full disk
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    def run(rank: int) -> str:
        try:
            trainer(devices=1, callbacks=[Full()]).fit(module(), loader(data))
        except OSError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
            (tmp_path / "error").write_text(str(error))
        return "done"

    folder = tmp_path / "processes"
    folder.mkdir()
    (worker,) = start(1, run, (), folder)
    worker.join(SECONDS)
    assert "File too large" in (tmp_path / "error").read_text()
    assert torch.load(kept, weights_only=True)["epoch"] == 0
    assert torch.load(kept, weights_only=True)["global_step"] == len(data)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(tmp_path: Path, share: float) -> None:
    """Catches a run that goes on from half a checkpoint."""
    kept = tmp_path / "run.ckpt"
    fit = trainer(devices=1, max_epochs=1)
    fit.fit(module(), loader(whole()))
    fit.save_checkpoint(kept)
    content = kept.read_bytes()
    kept.write_bytes(content[: int(share * len(content))])
    model = module()
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    with pytest.raises((RuntimeError, OSError, EOFError)):  # torch's own words
        trainer(devices=1).fit(model, loader(whole()), ckpt_path=kept)
    assert all(torch.equal(value, before[name]) for name, value in model.network.state_dict().items())
