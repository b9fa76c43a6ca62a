"""One run of a stream, for a process that is killed: ``python -m tests.continual.killed_run <kind> <folder>``.

Resumes from the newest checkpoint in the folder if there is one; appends a byte to ``batches`` after each batch; at the
end writes the final state to ``final.pt``.
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from lightning_altmin import AltMinModule
from lightning_altmin.continual import (
    ClassBalancedBuffer,
    ContinualEvaluation,
    MemoryPolicy,
    OnlineEWC,
    OnlineTaskStreamDataModule,
    OrthogonalWeights,
    PrequentialAccuracy,
    Replay,
    ReservoirBuffer,
    SynapticIntelligence,
    TaskCheckpoint,
    TaskEarlyStopping,
    TaskStreamDataModule,
)
from lightning_altmin.weights import CoactivationMemory, LayerwiseWeights
from tests.continual.problems import backprop, blob_stream, small_network
from tests.continual.recording import state_of

PAUSE = 0.03  # seconds per batch, so that a run can be killed at any of them


class Slowly(Callback):
    """Says how far the run is."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, *rest: Any) -> None:
        with self.path.open("a") as file:
            file.write(".")
        time.sleep(PAUSE)


def parts(kind: str) -> tuple[Any, Any, list[Callback]]:
    """Module, data module and callbacks."""
    if kind == "backprop":
        replay = Replay(ClassBalancedBuffer(20), 6)
        data: Any = TaskStreamDataModule(blob_stream(val_split=4), 8, epochs_per_task=3, replay=replay)
        return (
            backprop(momentum=0.9),
            data,
            [TaskEarlyStopping(patience=1), SynapticIntelligence(1.0), OnlineEWC(0.1, samples=10), OrthogonalWeights()],
        )
    output = CoactivationMemory(form="solve", every=3, inputs="forward")
    module = AltMinModule(
        small_network(), weights=LayerwiseWeights({"output": output, "default": CoactivationMemory(every=2)})
    )
    data = OnlineTaskStreamDataModule(blob_stream(), 6, replay=Replay(ReservoirBuffer(20), 4), boundaries=True)
    return module, data, [MemoryPolicy("decay"), PrequentialAccuracy()]


def main(kind: str, folder: Path) -> None:
    """Run to the end, from wherever the folder says."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    newest = folder / "last.ckpt"
    seed_everything(len(list(folder.iterdir())), verbose=False)  # must not matter
    module, data, callbacks = parts(kind)
    evaluation = ContinualEvaluation(every_n_batches=4)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[Slowly(folder / "batches"), *callbacks, evaluation, TaskCheckpoint(folder, 1, tasks=False)],
        **data.trainer_kwargs(),
    )
    ckpt = newest if newest.exists() else None
    if ckpt is None:
        torch.manual_seed(0)  # the random state of a run is in its checkpoints, and begins with the first
    trainer.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=True if ckpt else None)
    state = state_of(trainer)
    torch.save({**state, "matrix": evaluation.matrix.compute()}, folder / "final.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
