"""Continual learning: AM-mem, naive training, EWC, SI and replay on the same networks, streams and passes.

    python examples/continual/benchmark.py split_mnist --root data --tune
    python examples/continual/benchmark.py split_mnist --root data

Every row is one run: a suite, a method, a seed (of the network and of the order of samples), accuracy after the whole
stream and what it cost. Suites, all in a single pass:

- ``split_mnist``: five tasks of two digits, one head (class-incremental; task-incremental accuracy beside it);
- ``split_mnist_64``: the same on twice as many filters;
- ``domain_mnist``: the same tasks with labels 0 and 1 in each (domain-incremental);
- ``permuted_mnist``: ten permutations of pixels, 6000 samples each;
- ``split_cifar10``: five tasks of two classes on frozen random features, which all methods share;
- ``bytes``: split_mnist by more and fewer bytes of state than the suites take, for the figure.

With ``--tune`` each method's settings are compared, by one seed, on a held-out tenth of the training data: a grid, and
then, one setting at a time, what lies next to the best, until nothing there is better. ``--share`` takes less of the
data, which is faster and not the same: rates that suit a fifth of a stream need not suit all of it, and features that
learn on drift for as long as a task lasts.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for rows
import torch
from lightning.pytorch import LightningModule, Trainer
from methods import GRIDS, GRIDS_OF, METHODS, Run, memory, neighbours, replay
from rows import append_values, finished, read_values
from suites import SUITES, conv

from lightning_altmin.continual import (
    ContinualEvaluation,
    TaskStream,
    TaskStreamDataModule,
    from_datasets,
    metrics,
    split_mnist,
)
from lightning_altmin.guard import NonFiniteError


def train(run: Run, stream: TaskStream, seed: int, part: str = "test", batch_size: int = 100) -> dict[str, float]:
    """Train on the stream in one pass and measure."""
    evaluation = ContinualEvaluation(part=part, before_training=False)  # type: ignore[arg-type]
    trained_on = stream.joint() if run.joint else stream
    data = TaskStreamDataModule(trained_on, batch_size, replay=run.replay, seed=seed, eval_batch_size=500)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[*run.callbacks, *([] if run.joint else [evaluation])],
        **data.trainer_kwargs(),
    )
    began = time.process_time()
    trainer.fit(run.module, datamodule=data)
    seconds = time.process_time() - began
    if run.joint:
        row = after_joint(run.module, stream, part)
        return {"accuracy": row, "seconds": seconds, "state_bytes": run.state_bytes()}
    R = evaluation.matrix.compute()
    return {
        "accuracy": float(metrics.average_accuracy(R)),
        "task_incremental": float(metrics.average_accuracy(evaluation.task_incremental.compute())),
        "forgetting": float(metrics.forgetting(R)),
        "learning_accuracy": float(metrics.learning_accuracy(R)),
        "seconds": seconds,
        "state_bytes": run.state_bytes(),
    }


@torch.no_grad()
def after_joint(module: LightningModule, stream: TaskStream, part: str) -> float:
    """Mean accuracy over the tasks of a module that was trained on all of them together."""
    module.eval()
    row = []
    for task in stream:
        samples = task.parts()[part]
        right = 0
        for rows in torch.arange(len(samples)).split(500):
            x, y = samples.read(rows)
            right += int((module(stream.prepared(x)).argmax(1) == y).sum())
        row.append(right / len(samples))
    return sum(row) / len(row)


def tuned(path: Path, suite: str, method: str) -> dict[str, float]:
    """The settings that were best in a file written with ``--tune``; the method's own defaults without one."""
    rows = [row for row in read_values(path) if row["suite"] == suite and row["method"] == method]
    if not rows:
        return {}
    best = max(rows, key=lambda row: float(row["accuracy"]))
    return {k: float(v) for k, v in (pair.split("=") for pair in best["settings"].split())}


COLUMNS = (
    "suite", "method", "settings", "seed", "accuracy", "task_incremental", "forgetting", "learning_accuracy",
    "state_bytes", "seconds",
)  # fmt: skip


def write(path: Path, row: dict[str, Any]) -> None:
    """Add a row; columns that it does not have are left empty."""
    values = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
    append_values(path, COLUMNS, [[values.get(column, "") for column in COLUMNS]])
    print({k: v for k, v in row.items() if k != "suite"}, flush=True)


def described(settings: dict[str, float]) -> str:
    return " ".join(f"{k}={v:g}" for k, v in settings.items() if (k, v) != ("factor", 1.0))  # which changes nothing


def made(method: str, suite: str, seed: int, settings: dict[str, float]) -> Run:
    """A method on its suite's network."""
    network = SUITES[suite].network(seed, SUITES[suite].outputs)
    if method == "replay, equal bytes":
        return METHODS[method](network, size=SUITES[suite].equal_size, **settings)
    return METHODS[method](network, **settings)


def tune(suite: str, methods: list[str], root: str, out: Path, share: float) -> None:
    """A row for each of the settings, measured on held-out training samples."""
    stream, g = SUITES[suite].stream(root, 1000), torch.Generator().manual_seed(1000)
    small = [t.train.take(torch.randperm(len(t.train), generator=g)[: int(share * len(t.train))]) for t in stream]
    part = from_datasets(small, small, val_split=0.1, seed=1, prepare=stream.prepare, num_classes=SUITES[suite].outputs)

    def compare(method: str, chosen: list[dict[str, float]]) -> dict[str, float]:
        """Measure what is not in the file yet; the best of all there."""
        for settings in chosen:
            row = {"suite": suite, "method": method, "settings": described(settings), "seed": 1000}
            if (suite, method, row["settings"]) not in finished(out, "suite", "method", "settings"):
                try:
                    result = train(made(method, suite, 1000, settings), part, 1000, part="val")
                except NonFiniteError:  # rates at which it diverges are the worst ones
                    result = {"accuracy": 0.0}
                write(out, row | result)
        best = tuned(out, suite, method)
        return {name: best.get(name, 1.0) for name in chosen[0]}  # a factor of 1 is not written

    for method in methods:
        best, before = compare(method, GRIDS_OF.get(suite, {}).get(method, GRIDS[method])), {}
        while best != before:
            best, before = compare(method, neighbours(method, best)), best


def measure(suite: str, methods: list[str], seeds: int, root: str, out: Path, tuning: Path) -> None:
    """A row for each seed, with the settings that were chosen; rows of other settings stay, tables pass over them."""
    for seed in range(seeds):
        rows = [
            {"suite": suite, "method": m, "settings": described(tuned(tuning, suite, m)), "seed": seed} for m in methods
        ]
        there = finished(out, "suite", "method", "settings", "seed")
        missing = [row for row in rows if tuple(map(str, row.values())) not in there]
        stream = SUITES[suite].stream(root, seed) if missing else None
        for row in missing:
            assert stream is not None
            method = str(row["method"])
            run = made(method, suite, seed, tuned(tuning, suite, method))
            write(out, row | train(run, stream, seed))


def bytes_curve(root: str, seeds: int, out: Path, tuning: Path) -> None:
    """AM-mem with fewer and more filters than the suites; replay of more and fewer images on 32 filters."""
    stream = split_mnist(root)
    frozen, replayed = (tuned(tuning, "split_mnist", method) for method in ("AM-mem, frozen features", "replay 1000"))
    memories = [(f"AM-mem, {size} filters", size, frozen) for size in (2, 4, 8, 16, 48, 78)]
    for seed, (name, size, settings) in itertools.product(range(seeds), memories):
        if ("bytes", name, str(seed)) not in finished(out, "suite", "method", "seed"):
            result = train(memory(conv(seed, channels=size), **settings), stream, seed)
            write(out, {"suite": "bytes", "method": name, "seed": seed, **result})
    for seed, size in itertools.product(range(seeds), (30, 7500, 20000)):
        name = f"replay {size}"
        if ("bytes", name, str(seed)) not in finished(out, "suite", "method", "seed"):
            result = train(replay(conv(seed), size=size, **replayed), stream, seed)
            write(out, {"suite": "bytes", "method": name, "seed": seed, **result})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=[*SUITES, "bytes"])
    parser.add_argument("--root", default="data", help="folder with the data sets")
    parser.add_argument("--methods", nargs="*", choices=METHODS, help="all that make sense if not given")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--share", type=float, default=1.0, help="of the training data, with --tune")
    parser.add_argument("--tuning", type=Path, default=Path("docs/results/continual_tuning.csv"))
    parser.add_argument(
        "--out", type=Path, help="the rows; docs/results/continual.csv, or --tuning's file, if not given"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    suite, root = arguments.suite, arguments.root
    out = arguments.out or (arguments.tuning if arguments.tune else Path("docs/results/continual.csv"))
    if suite == "bytes":
        bytes_curve(root, arguments.seeds, out, arguments.tuning)
        return
    methods = arguments.methods or [m for m in METHODS if m not in SUITES[suite].without]
    if arguments.tune:
        tune(suite, methods, root, out, arguments.share)
    else:
        measure(suite, methods, arguments.seeds, root, out, arguments.tuning)


if __name__ == "__main__":
    main()
