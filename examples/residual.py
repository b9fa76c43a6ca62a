"""A ResNet-18 on CIFAR-10: backprop inside each residual block, AltMin between them, beside backprop throughout.

    python examples/residual.py tune   --root cifar10
    python examples/residual.py final  --root cifar10
    python examples/residual.py memory
    python examples/residual.py table

    python examples/residual.py final  --root cifar10 --width 64 --epochs 10 --accelerator gpu --results gpu.csv

The network is torchvision's ResNet-18 with a 3x3 stem of stride 1 (its max-pool stays) and ``--width`` channels in the
first stage: 64 is the original, 8 is what two CPU cores can carry. `tune` holds out 5,000 training images and tries
each rate for one epoch with each method. `final` trains on the other images for ``--epochs`` epochs, each method at
its best rate, and asks the test set once, at the end. A row is written after every epoch, with a checkpoint beside
it: a command that was interrupted, or ended after ``--minutes``, goes on where it stopped. `memory` measures the peak
of one step at several batch sizes.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import resource
import statistics
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from intervals import interval
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from rows import append, markdown, read
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from lightning_altmin import AltMin, AltMinModule, BackpropModule, CodedNetwork, LocalGradient
from lightning_altmin.data import ImageFolderDataModule

RESULTS = Path(__file__).parent.parent / "docs" / "results"
BATCH = 128
RATES = (0.001, 0.002, 0.004, 0.008)
METHODS = ("backprop", "AltMin", "AltMin, live BatchNorm")


class ResNet18(nn.Module):
    """torchvision's ResNet-18 with a 3x3 stem of stride 1 and ``width`` channels in the first stage."""

    def __init__(self, width: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = _stage(width, width, stride=1)
        self.layer2 = _stage(width, 2 * width, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, stride=2)
        self.layer4 = _stage(4 * width, 8 * width, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        output: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return output


def _stage(channels: int, out: int, stride: int) -> nn.Sequential:
    shortcut = None
    if stride != 1:
        shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
    return nn.Sequential(BasicBlock(channels, out, stride, shortcut), BasicBlock(out, out))


@dataclass(frozen=True)
class Row:
    """One epoch of one run, or, with the phase "test", its end."""

    phase: str
    width: int
    method: str
    lr: float
    seed: int
    epochs: int
    epoch: int
    val_accuracy: float
    seconds: float
    test_accuracy: str = ""


class Rows(Callback):
    """After each epoch: a row with the validation accuracy and the seconds of training alone; stops when time is up."""

    def __init__(self, path: Path, run: dict[str, Any], deadline: float) -> None:
        self._path, self._run, self._deadline = path, run, deadline
        self._start = self._seconds = 0.0

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._start = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._seconds = time.perf_counter() - self._start

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        accuracy = float(trainer.callback_metrics["val_acc"])
        row = Row(**self._run, epoch=trainer.current_epoch + 1, val_accuracy=accuracy, seconds=round(self._seconds, 1))
        append(self._path, [row])
        print(row, flush=True)
        if time.monotonic() > self._deadline:
            trainer.should_stop = True


def build(width: int, method: str, lr: float, steps: int) -> AltMinModule | BackpropModule:
    network = ResNet18(width)
    optimizer = functools.partial(torch.optim.Adam, lr=lr, fused=True)
    schedule: dict[str, Any] = {
        "lr_scheduler": functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps),
        "lr_interval": "step",
    }
    if method == "backprop":
        return BackpropModule(network, optimizer=optimizer, **schedule)
    coded = CodedNetwork(network, batch_norm="live" if "live" in method else "fixed")
    return AltMinModule(coded, weights=LocalGradient(optimizer), **schedule)


@functools.cache
def images(root: str) -> ImageFolderDataModule:
    """All images, decoded once for all runs of this process."""
    data = ImageFolderDataModule(root, batch_size=BATCH, val_split=5000)
    data.setup()
    return data


def train(phase: str, method: str, lr: float, seed: int, arguments: argparse.Namespace) -> None:
    """One run, from its checkpoint if there is one."""
    epochs = 1 if phase == "tune" else arguments.epochs
    key = (phase, arguments.width, method, lr, seed, epochs)
    run = dict(zip(("phase", "width", "method", "lr", "seed", "epochs"), key, strict=True))
    if any(_key(row) == key and row.epoch == epochs for row in read(arguments.results, Row)):
        return
    data = images(arguments.root)
    seed_everything(seed, verbose=False)
    module = build(arguments.width, method, lr, epochs * len(data.train_dataloader()))
    folder = arguments.checkpoints / "-".join(map(str, key)).replace(", ", "_").replace(" ", "_")
    trainer = Trainer(
        accelerator=arguments.accelerator,
        devices=1,
        max_epochs=epochs,
        num_sanity_val_steps=0,
        callbacks=[
            Rows(arguments.results, run, arguments.deadline),
            ModelCheckpoint(folder, save_last=True, save_top_k=0, save_on_train_epoch_end=True),
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    last = folder / "last.ckpt"
    trainer.fit(module, datamodule=data, ckpt_path=last if last.exists() else None)
    if trainer.current_epoch >= epochs and phase == "final":
        result = trainer.test(module, datamodule=data, verbose=False)[0]
        last_row = next(row for row in read(arguments.results, Row) if _key(row) == key and row.epoch == epochs)
        append(arguments.results, [replace(last_row, phase="test", test_accuracy=f"{result['test_acc']:.4f}")])
    if time.monotonic() > arguments.deadline:
        raise SystemExit("time is up; run the command again to go on")


def _key(row: Row) -> tuple[Any, ...]:
    return (row.phase, row.width, row.method, row.lr, row.seed, row.epochs)


def best_rate(path: Path, width: int, method: str) -> float:
    found = [row for row in read(path, Row) if (row.phase, row.width, row.method) == ("tune", width, method)]
    if not found:
        raise SystemExit(f"no tuning runs of {method} at width {width}: run `tune` first")
    return max(found, key=lambda row: row.val_accuracy).lr


# ---------------------------------------------------------------- memory


def one_step(width: int, method: str, batch: int) -> None:
    """Print the growth of this process's peak memory over one step, in MiB; to be run in a process of its own."""
    torch.manual_seed(0)
    network = ResNet18(width)
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)  # without a state that would drown the activations
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if method == "backprop":
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    else:
        weights = LocalGradient(functools.partial(torch.optim.SGD, lr=0.01))
        core = AltMin(CodedNetwork(network, batch_norm="live"), nn.CrossEntropyLoss(), weights=weights)
        core.step(x, y, keep_codes=False)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def memory() -> None:
    path = RESULTS / "residual_memory.csv"
    rows = []
    for width, batch in ((8, 128), (8, 512), (64, 128)):
        for method in ("backprop", "AltMin"):
            command = [sys.executable, __file__, "step", "--step", str(width), method, str(batch)]
            peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            rows.append({"width": width, "batch": batch, "method": method, "peak_mib": round(peak)})
            print(rows[-1], flush=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


# ---------------------------------------------------------------- table


def table(path: Path) -> str:
    lines = []
    ends = [row for row in read(path, Row) if row.phase == "test"]
    for width, epochs, method in itertools.product(
        sorted({row.width for row in ends}), sorted({row.epochs for row in ends}), METHODS
    ):
        rows = [row for row in ends if (row.width, row.epochs, row.method) == (width, epochs, method)]
        if rows:
            accuracy = interval([100 * float(row.test_accuracy) for row in rows], ".1f", ".1f")
            pace = statistics.median(row.seconds for row in rows)
            lines.append((width, epochs, method, rows[0].lr, len(rows), accuracy, f"{pace:.1f}"))
    columns = ("width", "epochs", "method", "rate", "seeds", "test accuracy %", "seconds per epoch")
    return markdown(columns, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("tune", "final", "memory", "table", "step"))
    parser.add_argument("--root", default="cifar10", help="folder with train/<class>/ and test/<class>/")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--width", type=int, default=8, help="channels of the first stage")
    parser.add_argument("--epochs", type=int, default=3, help="of a final run")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--minutes", type=float, default=1e9, help="stop at the end of the epoch after so long")
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"))
    parser.add_argument("--results", type=Path, default=RESULTS / "residual.csv")
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.deadline = time.monotonic() + 60 * arguments.minutes
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    if arguments.command == "step":
        one_step(int(arguments.step[0]), arguments.step[1], int(arguments.step[2]))
    elif arguments.command == "memory":
        memory()
    elif arguments.command == "table":
        print(table(arguments.results))
    elif arguments.command == "tune":
        for lr, method in itertools.product(arguments.rates, arguments.methods):
            train("tune", method, lr, 100, arguments)
    else:
        for seed in arguments.seeds:
            for method in arguments.methods:
                rate = best_rate(arguments.results, arguments.width, method)
                train("final", method, rate, seed, arguments)


if __name__ == "__main__":
    main()
