"""Predicts the seconds per batch of layer and of data parallelism from measured costs of one process.

    python examples/benchmarks/layer_parallel_model.py --output docs/results/layer_parallel_model.csv

Measured here: each layer's seconds for encode, code step and weight gradients on a micro-batch, seconds per parameter
of the optimizer step, and seconds per byte and per message between two processes. The simulation then lets every
process do what it has, in the order of `LayerParallel`, as soon as what it waits for has come:

- encode part p needs the process's encode of part p - 1 and the code of part p from below;
- code step and gradients of part p need those of part p - 1, all encodes, and the moves of part p from above;
- the optimizer step needs the verdict of all processes.

Data parallelism is the whole batch's work divided by the processes, and a ring all-reduce of all gradients. Nothing
of this knows of memory bandwidth or caches that processes share.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from lightning_altmin import AltMin
from lightning_altmin.nn import MLP
from lightning_altmin.strategies.layer_parallel import balanced


@dataclass
class Costs:
    """Seconds on one process: per layer and micro-batch, per parameter, per byte and per message."""

    encode: list[float]
    solve: list[float]  # the code below the layer
    weights: list[float]  # the layer's weight gradients
    parameters: list[int]
    optimizer: float  # per parameter
    byte: float
    message: float
    border_bytes: float  # of a code of one micro-batch


def seconds(work: Callable[[], Any], repeats: int = 3) -> float:
    work()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


@torch.no_grad()
def measure(hidden: list[int], samples: int, link: tuple[float, float]) -> Costs:
    torch.manual_seed(0)
    core = AltMin(MLP(784, hidden, 10), nn.CrossEntropyLoss())
    x, y = torch.rand(samples, 784), torch.randint(10, (samples,))
    core.batches_seen = 11  # a batch that measures no curvature, as nine in ten
    step = core.encode(x, y)
    core.solve_codes(step)
    inputs = [x, *step.codes_forward]
    encode, solve, weights, parameters = [], [], [], []
    problems = {level + 1: problem for problem, level in core.code_problems(step)}
    for level, stage in enumerate(core.coded.stages):
        encode.append(seconds(lambda stage=stage, level=level: stage.encode(inputs[level])))
        solve.append(seconds(lambda level=level: core.codes.solve(problems[level])) if level in problems else 0.0)
        weights.append(seconds(lambda level=level: core.weights.gradients(core.weight_problem(step, level))))
        parameters.append(sum(p.numel() for p in stage.parameters()))
    core.fill_gradients(step)
    optimizer = seconds(core.optimizer.step) / sum(parameters)
    return Costs(encode, solve, weights, parameters, optimizer, *link, border_bytes=4.0 * samples * max(hidden))


def _ping(rank: int, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = []
    for numbers in (1, 1_000_000):
        message = torch.zeros(numbers)

        def round_trip(message: torch.Tensor = message) -> None:
            for sender in (0, 1):
                (dist.send if rank == sender else dist.recv)(message, 1 - rank)

        found.append(seconds(round_trip, 7) / 2)
    if rank == 0:
        results.put((max(found[1] - found[0], 0.0) / 4e6, found[0]))
    dist.destroy_process_group()


def link() -> tuple[float, float]:
    """Seconds per byte and per message between two processes."""
    store = Path("layer_parallel_model_store").resolve()
    store.unlink(missing_ok=True)
    results = mp.get_context("spawn").Queue()
    mp.spawn(_ping, (str(store), results), nprocs=2)
    store.unlink(missing_ok=True)
    byte, message = results.get()
    return byte, message


def layer_parallel(costs: Costs, processes: int, parts: int, batches: int = 6) -> float:
    """Seconds per batch in the steady state."""
    bounds = balanced([float(n) for n in costs.parameters], processes)
    groups = [range(low, high + 1) for low, high in bounds]
    encode = [sum(costs.encode[i] for i in group) for group in groups]
    solve = [sum(costs.solve[i] for i in group) for group in groups]
    weights = [sum(costs.weights[i] for i in group) for group in groups]
    update = [costs.optimizer * sum(costs.parameters[i] for i in group) for group in groups]
    travel = 2 * costs.message + costs.byte * costs.border_bytes
    free = [0.0] * processes  # when each has finished what it has begun
    ends = []
    for _ in range(batches):
        arrived = [0.0] * parts
        for rank in range(processes):
            for part in range(parts):
                free[rank] = max(free[rank], arrived[part]) + encode[rank]
                arrived[part] = free[rank] + travel
        arrived = [0.0] * parts
        for rank in range(processes - 1, -1, -1):
            for part in range(parts):
                free[rank] = max(free[rank], arrived[part]) + solve[rank]
                arrived[part] = free[rank] + travel + 2 * costs.message
                free[rank] += weights[rank]
        verdict = max(free) + 2 * costs.message * (processes - 1).bit_length()
        free = [verdict + seconds for seconds in update]
        ends.append(max(free))
    return ends[-1] - ends[-2]


def data_parallel(costs: Costs, processes: int, parts: int) -> float:
    """Seconds per batch: the work of ``parts`` micro-batches divided up, a ring all-reduce, and every weight's step."""
    work = parts * (sum(costs.encode) + sum(costs.solve) + sum(costs.weights)) / processes
    numbers = sum(costs.parameters)
    ring = 2 * (processes - 1) * (costs.message + costs.byte * 4 * numbers / processes) if processes > 1 else 0.0
    return work + ring + costs.optimizer * numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2000)
    parser.add_argument("--depth", type=int, nargs="+", default=[6, 63], help="hidden layers; one network each")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    connection = link()
    print(f"link: {1e6 * connection[1]:.0f} us per message, {1e-9 / max(connection[0], 1e-15):.2f} GB/s")
    # One network is measured; a deeper one repeats its middle layer.
    base = measure([args.width] * 6, args.batch_size // args.micro_batches, connection)
    rows = []
    for depth in args.depth:
        costs = Costs(**vars(base))
        for name in ("encode", "solve", "weights", "parameters"):
            first, *_, middle, last = getattr(base, name)
            setattr(costs, name, [first, *[middle] * (depth - 1), last])
        for processes in (1, 2, 4, 8, 16, 32, 64):
            data = data_parallel(costs, processes, args.micro_batches)
            layers = None
            if processes <= depth + 1:
                layers = layer_parallel(costs, processes, args.micro_batches)
            shown = "" if layers is None else f"{layers:.4f}"
            rows.append([depth, processes, args.micro_batches, shown, f"{data:.4f}"])
            print(*rows[-1], flush=True)
    if args.output:
        with args.output.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["hidden_layers", "processes", "micro_batches", "layer_parallel_s", "data_parallel_s"])
            writer.writerows(rows)


if __name__ == "__main__":
    main()
