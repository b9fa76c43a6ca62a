"""The accuracy that the settings timed by step_time.py reach: one epoch, constant rate 0.002, nothing tuned.

    python examples/benchmarks/step_time_accuracy.py --root data --nets "MLP 2x100" LeNet
    python examples/benchmarks/step_time_accuracy.py --images cifar10 --nets VGG-like --seeds 1

The training step is the very object that step_time.py times; MNIST, and for the VGG-like network CIFAR-10 from folders
of images. Rows of docs/results/step_time_accuracy.csv are written as runs end; runs whose rows exist are not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for rows
import torch
from rows import append, finished
from step_time import METHODS, NETS
from step_time_table import RESULTS
from torch import nn

from lightning_altmin.data import ImageFolderDataModule, VisionDataModule

CHOSEN = ("backprop", "1 code step", "1 code step, fixed rate", "5 code steps")


@dataclass(frozen=True)
class Row:
    """One run."""

    network: str
    precision: str
    method: str
    seed: int
    accuracy: float


def data_module(net: str, arguments: argparse.Namespace) -> Any:
    batch_size = NETS[net][1][0]
    if len(NETS[net][1]) == 4 and NETS[net][1][1] == 3:
        data: Any = ImageFolderDataModule(arguments.images, batch_size=batch_size, val_split=0.0, augment=False)
    else:
        data = VisionDataModule("MNIST", root=arguments.root, batch_size=batch_size, val_split=0.0)
    data.setup("fit")
    data.setup("test")
    return data


def run(net: str, method: str, precision: str, seed: int, data: Any) -> float:
    """Test accuracy after one epoch."""
    torch.manual_seed(seed)
    network: nn.Module = NETS[net][0]()
    step = METHODS[method].step(network)
    for x, y in data.train_dataloader():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            step(x, y)
    network.eval()
    right = total = 0
    with torch.no_grad():
        for x, y in data.test_dataloader():
            right += int((network(x).argmax(1) == y).sum())
            total += len(y)
    return right / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data")
    parser.add_argument("--images", default="cifar10", help="folder of images, for the VGG-like network")
    parser.add_argument("--results", type=Path, default=RESULTS / "step_time_accuracy.csv")
    parser.add_argument("--nets", nargs="+", choices=tuple(NETS), default=[n for n in NETS if n != "VGG-like"])
    parser.add_argument("--methods", nargs="+", choices=CHOSEN, default=CHOSEN)
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32"])
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path: Path = arguments.results
    known = finished(path, "network", "precision", "method", "seed")
    for net in arguments.nets:
        data = data_module(net, arguments)
        for seed, precision, method in itertools.product(
            range(arguments.seeds), arguments.precision, arguments.methods
        ):
            if (net, precision, method, str(seed)) not in known:
                accuracy = run(net, method, precision, seed, data)
                append(path, [Row(net, precision, method, seed, round(accuracy, 4))])


if __name__ == "__main__":
    main()
