"""Time of a training step with a co-activation memory, beside AM-Adam's.

    python examples/benchmarks/memory_time.py --json docs/results/memory_time.json
    python examples/benchmarks/memory_time.py --nets "MLP 5000-100" --cycle 10 --json docs/results/memory_time_wide.json

The methods train the same network on batches of the same shape through the raw core, with the default code solver.
Runs alternate; a ratio is the median over rounds of a method's time divided by AM-Adam's in the same round, with the
smallest and the largest. Every run covers whole cycles of `every` batches, so measurements and inversions are in it
at their due share; the first batches, which measure more often, are not. Megabytes are those of the statistics of all
layers, the inverse included.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_altmin import AltMin, CoactivationMemory, LocalGradient, WeightSolver
from lightning_altmin.nn import MLP, LeNet5

NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP 2x100": (functools.partial(MLP, 784, [100, 100], 10), (200, 784)),
    "MLP 2x500": (functools.partial(MLP, 784, [500, 500], 10), (200, 784)),
    "MLP 5000-100": (functools.partial(MLP, 784, [5000, 100], 10), (200, 784)),
    "LeNet": (LeNet5, (128, 1, 28, 28)),
}
METHODS: dict[str, Callable[[], WeightSolver]] = {
    "AM-Adam": LocalGradient,
    "AM-mem, every=10": CoactivationMemory,
    "AM-mem, every=50": functools.partial(CoactivationMemory, every=50),
    **{
        f"AM-mem, every=10, rank={rank}": functools.partial(CoactivationMemory, rank=rank)
        for rank in (0, 4, 16, 64, 256)
    },
    "AM-mem, every=1": functools.partial(CoactivationMemory, every=1),
    "solve form, every=10": functools.partial(CoactivationMemory, "solve"),
}


def runner(net: str, method: Callable[[], WeightSolver], cycle: int) -> tuple[Callable[[], float], float]:
    """A function that trains for a cycle and returns milliseconds per step, and the megabytes that it remembers."""
    make, shape = NETS[net]
    torch.manual_seed(0)
    core = AltMin(make(), nn.CrossEntropyLoss(), weights=method())
    data = [(torch.randn(shape), torch.randint(10, shape[:1])) for _ in range(8)]

    def run() -> float:
        start = time.perf_counter()
        for index in range(cycle):
            core.step(*data[index % len(data)], keep_codes=False)
        return 1e3 * (time.perf_counter() - start) / cycle

    return run, sum(buffer.numel() * buffer.element_size() for buffer in core.weights.buffers()) / 1e6


def compare(net: str, rounds: int, methods: list[str], cycle: int) -> list[dict[str, Any]]:
    made = {name: runner(net, METHODS[name], cycle) for name in ("AM-Adam", *methods)}
    runners = {name: run for name, (run, _) in made.items()}
    times: dict[str, list[float]] = {name: [] for name in runners}
    for run in runners.values():
        run()
    for _ in range(rounds):
        for name, run in runners.items():
            times[name].append(run())
    rows = []
    for name, values in times.items():
        ratios = [a / b for a, b in zip(values, times["AM-Adam"], strict=True)]
        rows.append(
            {
                "net": net,
                "method": name,
                "megabytes": made[name][1],
                "ms": statistics.median(values),
                "ratio": statistics.median(ratios),
                "ratio_range": [min(ratios), max(ratios)],
            }
        )
        spread = f"{rows[-1]['ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {net} | {name} | {rows[-1]['ms']:.2f} | {spread} | {made[name][1]:.1f} |", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all rows and the machine to this file")
    parser.add_argument("--nets", nargs="+", choices=tuple(NETS), default=list(NETS))
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS)[1:], default=list(METHODS)[1:])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cycle", type=int, default=50, help="batches of a run, a multiple of each `every`")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("| network | method | ms per step | times AM-Adam's | megabytes |\n|" + " --- |" * 5)
    rows: list[dict[str, Any]] = []
    for net in arguments.nets:
        rows += compare(net, arguments.rounds, arguments.methods, arguments.cycle)
        if arguments.json:
            machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            settings = {"threads": arguments.threads, "rounds": arguments.rounds, "cycle": arguments.cycle}
            arguments.json.write_text(json.dumps({"machine": machine, **settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
