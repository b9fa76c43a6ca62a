"""How the time and memory of training grow: with width, depth, batch size, and the number of samples seen.

    python examples/benchmarks/scaling.py

Widths, depths and batch sizes are timed on the plain core (one thread, CPU time, the least of several runs). Samples
are two million rows of a synthetic CSV file with the layout of HIGGS (a label, 28 features), streamed once through the
Trainer by ``CSVDataModule``; every tenth of the way the time per sample and the process's peak memory are noted. The
file's rows are a block of 20,000 random ones repeated, for the loader does not know. Writes docs/results/scaling.csv.
"""

from __future__ import annotations

import argparse
import csv
import functools
import io
import logging
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn

from lightning_altmin import AltMin, AltMinModule, LocalGradient
from lightning_altmin.data import CSVDataModule
from lightning_altmin.nn import MLP

RESULTS = Path(__file__).parent.parent.parent / "docs" / "results" / "scaling.csv"
BLOCK, FEATURES, BATCH = 20_000, 28, 1000
adam = functools.partial(torch.optim.Adam, lr=0.001, fused=True)


def microseconds_per_sample(width: int, depth: int, batch: int) -> float:
    core = AltMin(MLP(784, [width] * depth, 10), nn.CrossEntropyLoss(), weights=LocalGradient(adam))
    x, y = torch.randn(batch, 784), torch.randint(10, (batch,))
    for _ in range(10):
        core.step(x, y, keep_codes=False)
    best = float("inf")
    for _ in range(15):
        start = time.process_time()
        for _ in range(10):  # as many as measure the curvature once
            core.step(x, y, keep_codes=False)
        best = min(best, (time.process_time() - start) / 10)
    return 1e6 * best / batch


def peak_megabytes() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


class Watch(Callback):
    """Time per sample and peak memory in every tenth of an epoch."""

    def __init__(self, batches: int) -> None:
        self.every = batches // 10
        self.rows: list[dict[str, Any]] = []

    def on_train_epoch_start(self, *_: Any) -> None:
        self.start = time.process_time()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % self.every == 0:
            now = time.process_time()
            per_sample = 1e6 * (now - self.start) / (self.every * BATCH)
            row = {"what": "samples", "value": (batch_idx + 1) * BATCH, "us_per_sample": round(per_sample, 2)}
            self.rows.append(row | {"peak_mb": round(peak_megabytes(), 1)})
            print(self.rows[-1], flush=True)
            self.start = now


def write_stream(path: Path, rows: int) -> None:
    """A label in front of 28 features, `rows` times."""
    generator = np.random.default_rng(0)
    features = generator.standard_normal((BLOCK, FEATURES))
    labels = (features[:, :4].sum(1) > 0).astype(float)
    text = io.StringIO()
    np.savetxt(text, np.column_stack([labels, features]), fmt="%.5e", delimiter=",")
    with path.open("w") as file:
        for _ in range(rows // BLOCK):
            file.write(text.getvalue())


def stream(rows: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "synthetic.csv"
        write_stream(path, rows)
        data = CSVDataModule(path, batch_size=BATCH, num_classes=2)
        module, watch = AltMinModule(MLP(FEATURES, [100, 100], 2), weights=LocalGradient(adam)), Watch(rows // BATCH)
        flags: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = Trainer(accelerator="cpu", max_epochs=1, enable_model_summary=False, callbacks=[watch], **flags)
        trainer.fit(module, datamodule=data)
    return watch.rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000, help="rows of the stream, a multiple of 20,000")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    rows = stream(arguments.rows)  # first, for peak memory does not fall
    cases = [("width", w, (w, 2, 200)) for w in (50, 100, 200, 400, 800, 1600)]
    cases += [("depth", d, (100, d, 200)) for d in (1, 2, 4, 8, 16, 32)]
    cases += [("batch", b, (100, 2, b)) for b in (20, 50, 100, 200, 500, 1000, 2000)]
    for what, value, case in cases:
        rows.append({"what": what, "value": value, "us_per_sample": round(microseconds_per_sample(*case), 2)})
        print(rows[-1], flush=True)
    with arguments.results.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["what", "value", "us_per_sample", "peak_mb"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
