"""Where an eager step's time goes: matrix products, optimizer, checks, other kernels, and what is between them.

    python examples/benchmarks/step_parts.py --net "MLP 2x500" --threads 2

Kernels' times are those that PyTorch's profiler gives, summed over the calls of a step; the time of a whole step is
measured without it. What is left is Python, autograd and dispatch, less what the profiler itself adds to each call, so
it is the least certain of the numbers. Rounds alternate between the methods; medians are printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable

import torch
from step_time import METHODS, NETS, batches

GROUPS = {
    "matrix products": (
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::mkldnn_convolution",
        "aten::_slow_conv2d_forward",
    ),
    "optimizer": ("aten::_fused_adam_",),
    "checks for NaN": ("aten::dot",),
}
PARTS = (*GROUPS, "other kernels", "between kernels", "whole step")


def parts(run: Callable[[], object], repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds per step of each part, and numbers of calls."""
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    whole = (time.perf_counter() - began) / repeats * 1e3
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(repeats):
            run()
    took: dict[str, float] = defaultdict(float)
    calls: dict[str, float] = defaultdict(float)
    for event in profile.key_averages():
        if event.key.startswith("aten::"):
            group = next((group for group, names in GROUPS.items() if event.key in names), "other kernels")
            took[group] += event.self_cpu_time_total / 1e3 / repeats
            calls[group] += event.count / repeats
    took["between kernels"] = whole - sum(took.values())
    took["whole step"] = whole
    return took, calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=tuple(NETS), default="MLP 2x500")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=50, help="steps per round and method")
    parser.add_argument("--methods", nargs="+", default=["1 code step", "5 code steps"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    make, shape = NETS[arguments.net]
    (batch,) = batches(shape, 1, "cpu")
    steps = {method: METHODS[method].step(make()) for method in ("backprop", *arguments.methods)}
    for step in steps.values():
        for _ in range(20):
            step(*batch)
    took: dict[tuple[str, str], list[float]] = defaultdict(list)
    calls: dict[tuple[str, str], float] = {}
    for _ in range(arguments.rounds):
        for method, step in steps.items():
            found, numbers = parts(lambda step=step: step(*batch), arguments.repeats)  # type: ignore[misc]
            for part in PARTS:
                took[method, part].append(found.get(part, 0.0))
                calls[method, part] = numbers.get(part, 0.0)
    medians = {key: statistics.median(values) for key, values in took.items()}
    print(f"{arguments.net}, {arguments.threads} threads: milliseconds, of backprop's whole step, calls\n")
    print(f"| part | {' | '.join(steps)} |\n| --- |{' --- |' * len(steps)}")
    for part in PARTS:
        cells = []
        for method in steps:
            count = calls[method, part]
            share = medians[method, part] / medians["backprop", "whole step"]
            cells.append(f"{medians[method, part]:.2f}, {share:.2f}" + (f", {count:.0f}" if count else ""))
        print(f"| {part} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
