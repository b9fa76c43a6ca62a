"""Continual learning: AM-mem, naive training, EWC, SI and replay on the same networks, streams and passes.

    python examples/continual/benchmark.py split_mnist --root data --out docs/results/continual.csv
    python examples/continual/benchmark.py split_mnist --root data --tune --out docs/results/continual_tuning.csv

Every row is one run: a suite, a method, a seed (of the network and of the order of samples), accuracy after the whole
stream and what it cost. Suites, all in a single pass:

- ``split_mnist``: five tasks of two digits, one head (class-incremental; task-incremental accuracy beside it);
- ``domain_mnist``: the same tasks with labels 0 and 1 in each (domain-incremental);
- ``permuted_mnist``: ten permutations of pixels, 6000 samples each;
- ``split_cifar10``: five tasks of two classes on frozen random features, which all methods share;
- ``wide_mnist``: split_mnist with 2000 hidden units that each see a random part of the image;
- ``bytes``: split_mnist by bytes of state, for the figure.

With ``--tune`` each method's settings are compared, by one seed, on a held-out tenth of a fifth of the training data
(``--share``). AM-mem with learnt features needs ``--share 1``: its features drift for as long as a task lasts.
"""

from __future__ import annotations

import argparse
import csv
import logging
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_altmin import AltMinModule, BackpropModule
from lightning_altmin.continual import (
    ContinualEvaluation,
    MemoryPolicy,
    OnlineEWC,
    Replay,
    ReservoirBuffer,
    SynapticIntelligence,
    TaskLearningRates,
    TaskStream,
    TaskStreamDataModule,
    from_datasets,
    metrics,
    permuted_mnist,
    split_cifar10,
    split_mnist,
)
from lightning_altmin.weights import CoactivationMemory, LayerwiseWeights, LocalGradient

# ---------------------------------------------------------------- networks


def conv(seed: int, outputs: int = 10, channels: int = 32) -> nn.Sequential:
    """One layer of 5x5 filters at every second pixel, 36 average-pooled positions, one head."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(1, channels, 5, stride=2), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36 * channels, outputs)
    )
    nn.init.normal_(network[0].weight, std=1 / 5)
    nn.init.normal_(network[0].bias, std=0.5)
    return network


def wide(seed: int, outputs: int = 10, hidden: int = 2000) -> nn.Sequential:
    """Hidden units that each see a rectangle of 8 to 20 pixels a side, at a random place."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
    weight = torch.zeros(hidden, 28, 28)
    for unit in weight:
        height, width = torch.randint(8, 21, (2,)).tolist()
        top, left = int(torch.randint(-3, 32 - height, ())), int(torch.randint(-3, 32 - width, ()))
        part = unit[max(top, 0) : top + height, max(left, 0) : left + width]
        part.copy_(torch.randn(part.shape) / math.sqrt(height * width))
    with torch.no_grad():
        network[1].weight.copy_(weight.flatten(1))
        nn.init.normal_(network[1].bias, std=0.5)
    return network


def dense(seed: int, outputs: int = 10, hidden: int = 1000) -> nn.Sequential:
    """A plain multilayer perceptron, PyTorch's own initialization."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def head(seed: int, outputs: int = 10, features: int = 1024, hidden: int = 1000) -> nn.Sequential:
    """A linear classifier on fixed random ReLU units of given features."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Flatten(), nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
    network[1].requires_grad_(False)
    return network


# ---------------------------------------------------------------- streams


def thinned(stream: TaskStream, number: int, seed: int) -> TaskStream:
    """At most ``number`` training samples per task."""
    g = torch.Generator().manual_seed(seed)
    trains = [task.train.take(torch.randperm(len(task.train), generator=g)[:number]) for task in stream]
    names, tests = [task.name for task in stream], [task.test for task in stream]
    return from_datasets(trains, tests, prepare=stream.prepare, names=names, num_classes=stream.num_classes)


def cifar_features(root: str, seed: int) -> TaskStream:
    """Split-CIFAR-10 seen through 64 random 7x7 filters, ReLU and 4x4 average-pooled positions."""
    stream, g = split_cifar10(root), torch.Generator().manual_seed(seed)
    filters = torch.randn(64, 3, 7, 7, generator=g) / math.sqrt(147)
    filters -= filters.mean((1, 2, 3), keepdim=True)
    bias = 0.3 * torch.randn(64, generator=g)

    def features(samples: Any) -> tuple[Tensor, Tensor]:
        parts, labels = [], []
        for rows in torch.arange(len(samples)).split(500):
            x, y = samples.read(rows)
            responses = nn.functional.conv2d(stream.prepared(x), filters, bias, stride=2).relu()
            parts.append(nn.functional.adaptive_avg_pool2d(responses, 4).flatten(1))
            labels.append(y)
        return torch.cat(parts), torch.cat(labels)

    trains, tests = [features(t.train) for t in stream], [features(t.test) for t in stream]
    return from_datasets(trains, tests, names=[t.name for t in stream], num_classes=10)


SUITES: dict[str, tuple[Callable[[str, int], TaskStream], Callable[..., nn.Sequential], int]] = {
    "split_mnist": (lambda root, seed: split_mnist(root), conv, 10),
    "domain_mnist": (lambda root, seed: split_mnist(root, labels="local"), conv, 2),
    "permuted_mnist": (lambda root, seed: thinned(permuted_mnist(root, seed=seed), 6000, seed), dense, 10),
    "split_cifar10": (cifar_features, head, 10),
    "wide_mnist": (lambda root, seed: split_mnist(root), wide, 10),
    "bytes": (lambda root, seed: split_mnist(root), conv, 10),
}

# ---------------------------------------------------------------- methods


@dataclass
class Run:
    """One method, ready to be trained."""

    module: LightningModule
    callbacks: list[Callback] = field(default_factory=list)
    replay: Replay | None = None
    joint: bool = False
    state_bytes: Callable[[], int] = lambda: 0


def backprop(network: nn.Sequential, lr: float, optimizer: Any = torch.optim.Adam) -> BackpropModule:
    return BackpropModule(network, optimizer=lambda p: optimizer(p, lr=lr))


def naive_sgd(network: nn.Sequential, lr: float = 0.03) -> Run:
    return Run(backprop(network, lr, torch.optim.SGD))


def naive_adam(network: nn.Sequential, lr: float = 1e-3) -> Run:
    return Run(backprop(network, lr))


def naive_am_adam(network: nn.Sequential, lr: float = 1e-3) -> Run:
    return Run(AltMinModule(network, weights=LocalGradient(lambda p: torch.optim.Adam(p, lr=lr))))


def ewc(network: nn.Sequential, lr: float = 1e-3, strength: float = 1e3) -> Run:
    penalty = OnlineEWC(strength, samples=200)
    return Run(backprop(network, lr), [penalty], state_bytes=lambda: penalty.state_bytes)


def si(network: nn.Sequential, lr: float = 1e-3, strength: float = 10.0) -> Run:
    penalty = SynapticIntelligence(strength)
    return Run(backprop(network, lr), [penalty], state_bytes=lambda: penalty.state_bytes)


def replay(network: nn.Sequential, lr: float = 1e-3, size: int = 1000) -> Run:
    replay = Replay(ReservoirBuffer(size), 100)
    return Run(backprop(network, lr), replay=replay, state_bytes=lambda: replay.buffer.state_bytes)


def joint_adam(network: nn.Sequential, lr: float = 1e-3) -> Run:
    return Run(backprop(network, lr), joint=True)


def memory(network: nn.Sequential, lr: float = 0.0, ridge: float = 1e-4, factor: float = 0.0) -> Run:
    """AM-mem on the output layer; layers below are trained by AltMin at ``lr``, which falls by ``factor`` per task."""
    output = CoactivationMemory(form="solve", ridge=ridge, every=20, inputs="forward")
    if lr == 0:
        for layer in list(network)[:-1]:
            layer.requires_grad_(False)
        weights: Any = output
    else:
        hidden = LocalGradient(lambda p: torch.optim.Adam(p, lr=lr))
        weights = LayerwiseWeights({"output": output, "default": hidden})
    module = AltMinModule(network, weights=weights)
    callbacks: list[Callback] = [MemoryPolicy("keep")]
    if lr > 0:
        callbacks.append(TaskLearningRates(factor, [stage.name for stage in module.core.coded.stages[:-1]]))
    held = [b for solver in output.modules() for b in solver.buffers(recurse=False)]
    return Run(module, callbacks, state_bytes=lambda: sum(b.numel() * b.element_size() for b in held))


ADAM = [{"lr": lr} for lr in (1e-3, 3e-3, 1e-2)]
METHODS: dict[str, tuple[Callable[..., Run], list[dict[str, float]]]] = {
    "naive SGD": (naive_sgd, [{"lr": lr} for lr in (0.01, 0.03, 0.1)]),
    "naive Adam": (naive_adam, ADAM),
    "naive AM-Adam": (naive_am_adam, ADAM),
    "online EWC": (ewc, [{"lr": lr, "strength": s} for lr in (1e-3, 3e-3) for s in (1e3, 1e5, 1e7)]),
    "SI": (si, [{"lr": lr, "strength": s} for lr in (1e-3, 3e-3) for s in (1e2, 1e4, 1e6)]),
    "replay 200": (lambda network, **settings: replay(network, size=200, **settings), ADAM),
    "replay 1000": (lambda network, **settings: replay(network, size=1000, **settings), ADAM),
    "replay, equal bytes": (lambda network, **settings: replay(network, size=equal_size(network), **settings), ADAM),
    "joint Adam": (joint_adam, ADAM),
    "AM-mem, frozen features": (memory, [{"ridge": r} for r in (1e-5, 1e-4, 1e-3)]),
    "AM-mem, joint": (lambda network, **settings: as_joint(memory(network, **settings)), [{"ridge": 1e-4}]),
    "AM-mem, learnt features": (
        memory,
        [
            {"lr": lr, "ridge": ridge, "factor": 0.0}
            for lr, ridge in ((1e-4, 1e-3), (3e-5, 1e-3), (3e-4, 1e-2), (1e-4, 1e-2))
        ],
    ),
}
HEAD_ONLY = ("naive SGD", "naive Adam", "replay 200", "replay 1000", "AM-mem, frozen features")  # of `head`


def as_joint(run: Run) -> Run:
    run.joint = True
    return run


def equal_size(network: nn.Sequential) -> int:
    """Samples in as many bytes as the memory of this network's output layer takes: A, B and a count, in double."""
    inputs, outputs = network[-1].in_features + 1, network[-1].out_features
    sample = 784 + 8  # an image in bytes and its label
    return 8 * (inputs * inputs + outputs * inputs + 1) // sample


# ---------------------------------------------------------------- one run


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
    if not path.exists():
        return {}
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row["suite"] == suite and row["method"] == method]
    if not rows:
        return {}
    best = max(rows, key=lambda row: float(row["accuracy"]))
    return {k: float(v) for k, v in (pair.split("=") for pair in best["settings"].split())}


def done(path: Path) -> set[tuple[str, str, str]]:
    """Suite, method and seed of the rows that a file has: an interrupted benchmark goes on where it was."""
    if not path.exists():
        return set()
    with path.open() as file:
        return {(row["suite"], row["method"], row["seed"]) for row in csv.DictReader(file)}


COLUMNS = (
    "suite", "method", "settings", "seed", "accuracy", "task_incremental", "forgetting", "learning_accuracy",
    "state_bytes", "seconds",
)  # fmt: skip


def write(path: Path, row: dict[str, Any]) -> None:
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        if new:
            writer.writeheader()
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    print({k: v for k, v in row.items() if k != "suite"}, flush=True)


def described(settings: dict[str, float]) -> str:
    return " ".join(f"{k}={v:g}" for k, v in settings.items())


def tune(suite: str, methods: list[str], root: str, out: Path, share: float) -> None:
    stream_of, network_of, outputs = SUITES[suite]
    stream = stream_of(root, 1000)
    for method in methods:
        make, grid = METHODS[method]
        for settings in grid:
            small = [t.train.take(torch.randperm(len(t.train))[: int(share * len(t.train))]) for t in stream]
            part = from_datasets(small, small, val_split=0.1, seed=1, prepare=stream.prepare, num_classes=outputs)
            result = train(make(network_of(1000, outputs), **settings), part, 1000, part="val")
            write(out, {"suite": suite, "method": method, "settings": described(settings), "seed": 1000, **result})


def bytes_curve(root: str, seeds: int, out: Path, tuning: Path) -> None:
    """AM-mem with fewer and more filters; replay of more and fewer images on 32 filters."""
    stream = split_mnist(root)
    for seed in range(seeds):
        for channels in (2, 4, 8, 16, 32, 48):
            run = memory(conv(seed, channels=channels), **tuned(tuning, "split_mnist", "AM-mem, frozen features"))
            name = f"AM-mem, {channels} filters"
            write(out, {"suite": "bytes", "method": name, "seed": seed, **train(run, stream, seed)})
        for size in (30, 200, 1000, 4000, 13000):
            run = replay(conv(seed), size=size, **tuned(tuning, "split_mnist", "replay 1000"))
            write(out, {"suite": "bytes", "method": f"replay {size}", "seed": seed, **train(run, stream, seed)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--root", default="data", help="folder with the data sets")
    parser.add_argument("--methods", nargs="*", choices=METHODS, help="all if not given")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--share", type=float, default=0.2, help="of the training data, with --tune")
    parser.add_argument("--tuning", type=Path, default=Path("docs/results/continual_tuning.csv"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/continual.csv"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    suite, root = arguments.suite, arguments.root
    methods = arguments.methods or (HEAD_ONLY if suite == "split_cifar10" else list(METHODS))
    if arguments.tune:
        tune(suite, methods, root, arguments.out, arguments.share)
        return
    if suite == "bytes":
        bytes_curve(root, arguments.seeds, arguments.out, arguments.tuning)
        return
    stream_of, network_of, outputs = SUITES[suite]
    for seed in range(arguments.seeds):
        stream = stream_of(root, seed)
        for method in methods:
            if (suite, method, str(seed)) in done(arguments.out):
                continue
            settings = tuned(arguments.tuning, suite, method)
            run = METHODS[method][0](network_of(seed, outputs), **settings)
            result = train(run, stream, seed)
            row = {"suite": suite, "method": method, "settings": described(settings), "seed": seed, **result}
            write(arguments.out, row)


if __name__ == "__main__":
    main()
