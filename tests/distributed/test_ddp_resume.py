"""Two processes stopped in the middle of an epoch and started again end as if nothing had happened, bit for bit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import nn

from lightning_altmin import AltMinModule, CoactivationMemory, CurvatureCodes
from tests.distributed.gloo import launch
from tests.distributed.problems import CLASSES
from tests.distributed.test_ddp import Drawn, ddp, state, stream
from tests.module.interruption import assert_equal

# A checkpoint between a batch and its validation: Lightning leaves that validation out, and training does not notice.
pytestmark = pytest.mark.filterwarnings("ignore:the checkpoint was written between a batch and the validation")
SIZES = {2: 4, 4: 3}  # samples of a batch per process, by their number: of 22, the last ones uneven
EPOCHS = 2
VALIDATED = {"limit_val_batches": None}
# Number of processes, arguments of the module, of the Trainer.
SETTINGS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "two processes": (2, {}, {}),
    "four processes": (4, {}, {}),
    "stream": (2, {}, VALIDATED),
    "memory": (2, {"weights": CoactivationMemory(every=2)}, {}),
    "schedule": (2, {"lr_scheduler": lambda opt: torch.optim.lr_scheduler.StepLR(opt, 1, 0.8)}, VALIDATED),
    "accumulation": (2, {"accumulate_batches": 2}, VALIDATED | {"val_check_interval": 2}),
}


class SaveAlways(Callback):
    """Saves a checkpoint after every batch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, *rest: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.fit_loop.total_batch_idx + 1}.ckpt")


def fresh(seed: int, rank: int, **settings: Any) -> AltMinModule:
    """With dropout, whose masks each process draws for its own samples."""
    seed_everything(seed + rank, verbose=False)
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 7), nn.Tanh()]
    network = nn.Sequential(*layers, nn.Linear(7, CLASSES)).double()
    return AltMinModule(network, codes=CurvatureCodes(every=2), **settings)


def run(rank: int, seed: int, make: Any, setting: Any, callbacks: list[Callback], ckpt: Path | None = None) -> Any:
    """Final state of everything, and of the generators of this process."""
    world, settings, flags = setting
    model, fit = fresh(seed, rank, **settings), ddp(devices=world, max_epochs=EPOCHS, callbacks=callbacks, **flags)
    data = make(batch_size=SIZES[world], eval_batch_size=4)
    fit.fit(model, datamodule=data, ckpt_path=ckpt, weights_only=True if ckpt else None)
    found = {name: value for name, value in state(model, fit).items() if not name.startswith("val_")}
    return found | {"steps": fit.global_step, "python": random.getstate(), "torch": torch.get_rng_state()}


@pytest.mark.parametrize("name", SETTINGS)
def test_in_any_batch(name: str, tmp_path: Path) -> None:
    """Catches a process that waits for one which waits elsewhere, and dropout masks of another process's checkpoint."""
    setting = SETTINGS[name]
    world = setting[0]
    make = stream(tmp_path, 26) if name == "stream" else Drawn
    expected = launch(world, lambda rank: run(rank, 3, make, setting, [SaveAlways(tmp_path)]))
    assert not torch.equal(expected[0]["torch"], expected[1]["torch"]), "the processes draw the same masks"
    *earlier, _ = sorted(tmp_path.glob("*.ckpt"))
    assert len(earlier) == {2: 5, 4: 3}[world]
    for kept in earlier:
        found = launch(world, lambda rank, kept=kept: run(rank, 50, make, setting, [], kept))
        assert_equal(found, expected, f"resumed from {kept.name}: ")
