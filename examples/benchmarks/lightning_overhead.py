"""What Lightning's loop costs per batch: the Trainer with a module that does nothing, and with ones that train.

    python examples/benchmarks/lightning_overhead.py --threads 2

"nothing" is a LightningModule of one parameter whose ``training_step`` returns at once, so its time is the loop's; "a
step of nothing" calls an optimizer without gradients besides, which is Lightning's wrapping of the step and of the
optimizer. Beside them the core step of 784-500-500-10 alone, and through the Trainer. Rounds alternate; medians.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from step_time import METHODS, NETS, WARM_UP, Clock, Repeated, batches, core_runner, trainer_runner
from torch import nn

NET = "MLP 2x500"


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


def nothing_runner(steps: bool) -> Callable[[int], float]:
    """Milliseconds per batch of n batches."""
    data = batches(NETS[NET][1], 8, "cpu")

    def run(count: int) -> float:
        clock = Clock("cpu")
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[clock],
        )
        trainer.fit(Nothing(steps), Repeated(data, WARM_UP + count))
        return 1e3 * clock.seconds / count

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
    runners = {"nothing": nothing_runner(False), "a step of nothing": nothing_runner(True)}
    for name in ("backprop", "1 code step"):
        runners[f"{name}, core"] = core_runner(METHODS[name], NET, "fp32", "cpu")
        runners[f"{name}, Trainer"] = trainer_runner(METHODS[name], NET, "fp32", "cpu")
    times: dict[str, list[float]] = {name: [] for name in runners}
    for number in range(arguments.rounds + 1):
        for name, run in runners.items():
            taken = run(arguments.batches)
            if number > 0:  # the first fills caches
                times[name].append(taken)
    print("| what | ms per batch | smallest to largest |\n| --- | --- | --- |")
    for name, values in times.items():
        print(f"| {name} | {statistics.median(values):.2f} | {min(values):.2f} to {max(values):.2f} |")


if __name__ == "__main__":
    main()
