"""Throughput of LayerParallel on 2 processes with one thread each, over one process with one thread.

    python examples/benchmarks/layer_parallel.py --output docs/results/layer_parallel.csv

Runs of the two kinds alternate, so that other load on the machine meets both. Reported are medians of the seconds per
batch, their ratio, and the parameters that each process holds.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from lightning_altmin import AltMin
from lightning_altmin.nn import MLP
from lightning_altmin.strategies import LayerParallel


def model(hidden: list[int]) -> AltMin:
    torch.manual_seed(0)
    return AltMin(MLP(784, hidden, 10), nn.CrossEntropyLoss())


def batch(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(size, 784, generator=generator), torch.randint(10, (size,), generator=generator)


def timed(step: Any, x: Tensor, y: Tensor, batches: int) -> float:
    """Median seconds per batch; the first ones, which measure curvatures and fill caches, are not counted."""
    times = []
    for number in range(batches + 5):
        begin = time.perf_counter()
        step(x, y)
        if number >= 5:
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def alone(args: argparse.Namespace) -> float:
    torch.set_num_threads(1)
    core = model(args.hidden)
    return timed(lambda x, y: core.step(x, y, keep_codes=False), *batch(args.batch_size), args.batches)


def together(rank: int, args: argparse.Namespace, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=args.processes)
    layers = LayerParallel(model(args.hidden), micro_batches=args.micro_batches)
    seconds = timed(layers.step, *batch(args.batch_size), args.batches)
    results.put((rank, seconds, sum(p.numel() for p in layers.core.network.parameters())))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[2000] * 6)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--batches", type=int, default=5, help="timed batches per run")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    whole = sum(p.numel() for p in model(args.hidden).network.parameters())
    spawn = mp.get_context("spawn")
    rows = []
    for run in range(args.runs):
        results = spawn.Queue()
        store = Path(f"layer_parallel_store_{run}").resolve()
        store.unlink(missing_ok=True)
        mp.spawn(together, (args, str(store), results), nprocs=args.processes)
        store.unlink(missing_ok=True)
        found = [results.get() for _ in range(args.processes)]
        with spawn.Pool(1) as pool:
            single = pool.apply(alone, (args,))
        seconds = max(seconds for _, seconds, _ in found)
        share = max(parameters for *_, parameters in found) / whole
        rows.append([run, args.processes, args.micro_batches, f"{single:.4f}", f"{seconds:.4f}"])
        rows[-1] += [f"{single / seconds:.3f}", f"{share:.3f}"]
        print(*rows[-1], flush=True)
    print("median speed-up:", statistics.median(float(row[5]) for row in rows))
    if args.output:
        with args.output.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(
                ["run", "processes", "micro_batches", "one_process_s", "layer_parallel_s", "speed_up", "largest_share"]
            )
            writer.writerows(rows)


if __name__ == "__main__":
    main()
