"""What Lightning's loop costs per batch: the Trainer with a module that does nothing, and with ones that train.

    python examples/benchmarks/lightning_overhead.py --threads 2

"nothing" is a LightningModule of one parameter whose ``training_step`` returns at once, so its time is the loop's; "a
step of nothing" calls an optimizer without gradients besides, which is Lightning's wrapping of the step and of the
optimizer. Beside them the core step of 784-500-500-10 alone, and through the Trainer; each run from the initial
weights. Runs alternate, and every batch is timed by itself, from its start to the start of the next: the lower quartile
of all batches is what other work on the machine has disturbed least, and it is printed beside the median.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from step_time import METHODS, NETS, WARM_UP, Method, Repeated, batches
from torch import nn

NET = "MLP 2x500"
METHODS_TIMED = ("backprop", "1 code step", "5 code steps")


class Nothing(LightningModule):
    """Trains nothing, by hand."""

    def __init__(self, steps: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = nn.Parameter(torch.zeros(1))
        self.steps = steps

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if self.steps:
            optimizer: Any = self.optimizers()
            optimizer.step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Starts(Callback):
    """When each batch begins."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.times.append(time.perf_counter())


def through_trainer(module: LightningModule) -> Callable[[int], list[float]]:
    """A function that trains anew on n batches by the Trainer and returns when each began."""
    data, initial = batches(NETS[NET][1], 8, "cpu"), copy.deepcopy(module.state_dict())

    def run(count: int) -> list[float]:
        module.load_state_dict(initial)
        starts = Starts()
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[starts],
        )
        trainer.fit(module, Repeated(data, count))
        return starts.times

    return run


def alone(method: Method) -> Callable[[int], list[float]]:
    """The same in a loop of nothing but core steps."""
    data, (step, module, optimizer) = batches(NETS[NET][1], 8, "cpu"), method.trained(NETS[NET][0]())
    initial = copy.deepcopy(module.state_dict())

    def run(count: int) -> list[float]:
        module.load_state_dict(initial)
        optimizer.state.clear()
        times = []
        for index in range(count):
            times.append(time.perf_counter())
            step(*data[index % len(data)])
        return times

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batches", type=int, default=200, help="of one run")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(arguments.threads)
    runners = {"nothing": through_trainer(Nothing(False)), "a step of nothing": through_trainer(Nothing(True))}
    for name in METHODS_TIMED:
        runners[f"{name}, core"] = alone(METHODS[name])
        runners[f"{name}, Trainer"] = through_trainer(METHODS[name].module(NETS[NET][0]()))
    times: dict[str, list[float]] = {name: [] for name in runners}
    for number in range(arguments.rounds + 1):
        for name, run in runners.items():
            starts = run(arguments.batches)[WARM_UP:]
            if number > 0:  # the first fills caches
                times[name] += [1e3 * (after - before) for before, after in itertools.pairwise(starts)]
    print("| what | ms per batch, lower quartile | median |\n| --- | --- | --- |")
    found = {name: statistics.quantiles(values)[:2] for name, values in times.items()}
    for name, (quartile, median) in found.items():
        print(f"| {name} | {quartile:.2f} | {median:.2f} |")
    for name in METHODS_TIMED:
        by_core, by_trainer = found[f"{name}, core"], found[f"{name}, Trainer"]
        shares = [f"{100 * (slow / fast - 1):.1f} %" for fast, slow in zip(by_core, by_trainer, strict=True)]
        print(f"{name}: the Trainer adds {shares[0]} (lower quartile), {shares[1]} (median)")


if __name__ == "__main__":
    main()
