"""Throughput of LayerParallel on several processes with one thread each, over one process with one thread.

    python examples/benchmarks/layer_parallel.py --output docs/results/layer_parallel.csv

Three things alternate in short blocks of batches, so that a machine that is now faster, now slower meets all alike: the
layers shared out; the first process running the whole model while the others wait; and every process running a whole
model of its own, without a word to the others. A row has the medians of seconds per batch over a run's blocks, the
median of the blocks' ratios, and the ratio of the fastest blocks, which other load has disturbed least. ``independent``
is the throughput of the processes on their own over that of one alone: what the machine gives at most, for its cores
share their memory.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from lightning_altmin import AltMin
from lightning_altmin.nn import MLP
from lightning_altmin.parallel import LayerParallel

COLUMNS = ["run", "processes", "micro_batches", "one_process_s", "layer_parallel_s", "speed_up"]
COLUMNS += ["speed_up_of_fastest", "independent", "largest_share"]


def model(hidden: list[int]) -> AltMin:
    torch.manual_seed(0)
    return AltMin(MLP(784, hidden, 10), nn.CrossEntropyLoss())


def batch(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(size, 784, generator=generator), torch.randint(10, (size,), generator=generator)


def timed(step: Callable[[], Any], batches: int) -> list[float]:
    times = []
    for _ in range(batches):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    return times


def run(rank: int, args: argparse.Namespace, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=args.processes)
    x, y = batch(args.batch_size)
    whole = model(args.hidden)
    layers = LayerParallel(model(args.hidden), micro_batches=args.micro_batches)
    step_alone = partial(whole.step, x, y, keep_codes=False)
    alone, apart, together = [], [], []
    for block in range(args.blocks + 1):
        dist.barrier()
        layers.core.batches_seen = 11  # batches that measure no curvature, as nine in ten
        times = timed(partial(layers.step, x, y), args.batches)
        dist.barrier()
        whole.batches_seen = 11
        single = timed(step_alone, args.batches) if rank == 0 else []
        dist.barrier()
        whole.batches_seen = 11
        side_by_side = timed(step_alone, args.batches)
        if block > 0:  # the first fills caches
            alone.append(single)
            apart.append(side_by_side)
            together.append(times)
    parameters = sum(p.numel() for stage in layers.stages for p in stage.parameters())
    results.put((rank, together, alone, apart, parameters))
    dist.barrier()
    dist.destroy_process_group()


def row(number: int, args: argparse.Namespace) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        results = mp.get_context("spawn").SimpleQueue()
        mp.spawn(run, (args, os.path.join(folder, "store"), results), nprocs=args.processes)
        found = sorted(results.get() for _ in range(args.processes))
    # The slowest process of each block; all leave a batch together but for the work that follows the verdict.
    blocks, apart = (
        [max(times, key=statistics.mean) for times in zip(*(each[kind] for each in found), strict=True)]
        for kind in (1, 3)
    )
    alone = found[0][2]
    ratios = [statistics.mean(a) / statistics.mean(b) for a, b in zip(alone, blocks, strict=True)]
    one = statistics.median(statistics.mean(times) for times in alone)
    several = statistics.median(statistics.mean(times) for times in blocks)
    fastest = min(statistics.mean(times) for times in alone) / min(statistics.mean(times) for times in blocks)
    independent = statistics.median(
        args.processes * statistics.mean(a) / statistics.mean(b) for a, b in zip(alone, apart, strict=True)
    )
    share = max(each[4] for each in found) / sum(each[4] for each in found)
    numbers = [f"{one:.4f}", f"{several:.4f}"]
    numbers += [f"{value:.3f}" for value in (statistics.median(ratios), fastest, independent, share)]
    return [str(number), str(args.processes), str(args.micro_batches), *numbers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[2000] * 6)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--batches", type=int, default=4, help="batches of a block")
    parser.add_argument("--blocks", type=int, default=8, help="blocks of a run")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows = []
    for number in range(args.runs):
        rows.append(row(number, args))
        print(*rows[-1], flush=True)
        if args.output:
            with args.output.open("w", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
    print("median speed-up:", statistics.median(float(each[5]) for each in rows))


if __name__ == "__main__":
    main()
