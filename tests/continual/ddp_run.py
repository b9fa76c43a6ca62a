"""One run of a stream with one or two processes: ``python tests/continual/ddp_run.py <processes> <mode> <folder>``."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from lightning_altmin.continual import (
    ContinualEvaluation,
    OnlineEWC,
    OrthogonalWeights,
    PrequentialAccuracy,
    Replay,
    ReservoirBuffer,
    SynapticIntelligence,
    TaskStreamDataModule,
)
from tests.continual.problems import backprop, blob_stream
from tests.continual.recording import SaveAt


class Sees(Callback):
    """Which samples this process trains on, by their first feature, the replayed ones left out."""

    def __init__(self) -> None:
        self.samples: list[float] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        replay = trainer.datamodule.replay
        self.samples += batch[0][: None if replay is None else replay.new_samples, 0].tolist()


def main(processes: int, mode: str, folder: Path) -> None:
    """Train and write what came of it, a file per process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seed_everything(0, verbose=False)
    replay = Replay(ReservoirBuffer(15, seed=3), 4) if mode != "plain" else None
    # 25 training samples per class: the last batch of an epoch has two, one for each process.
    data = TaskStreamDataModule(blob_stream(per_class=25), 16 // processes, 2, eval_batch_size=7, replay=replay)
    ewc, si, orthogonal = OnlineEWC(0.5, samples=None), SynapticIntelligence(0.5), OrthogonalWeights(samples=None)
    evaluation, prequential, sees = ContinualEvaluation(every_n_batches=3), PrequentialAccuracy(), Sees()
    path, resumes = folder / f"{processes}.ckpt", mode == "resumed"
    trainer = Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        logger=False,
        enable_checkpointing=True,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            *(ewc, si, orthogonal, evaluation, prequential, sees),
            SaveAt("on_train_batch_end", -1 if resumes else 11, path),
        ],
        **data.trainer_kwargs(),
    )
    module = backprop(lr=0.1)
    trainer.fit(module, datamodule=data, ckpt_path=path if resumes else None, weights_only=True if resumes else None)
    result = {
        "weights": {k: v.detach() for k, v in module.named_parameters()},
        "matrix": evaluation.matrix.compute(),
        "totals": evaluation.matrix.total,
        "trajectory": evaluation.trajectory,
        "fisher": ewc.importance,
        "omega": si.importance,
        "moments": orthogonal.moments,
        "prequential": prequential.compute(),
        "samples": sees.samples,
        "buffer": None if replay is None else (replay.buffer.x, replay.buffer.size, replay.buffer.seen),
    }
    torch.save(result, folder / f"{processes}-{mode}-{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
