"""Predicts the seconds per batch of layer and of data parallelism from measured costs of one process.

    python examples/benchmarks/layer_parallel_model.py --output docs/results/layer_parallel_model.csv

Measured here, inside whole steps of one process: each layer's seconds for encode and code step in batches of a
micro-batch's size, and for weight gradients in whole batches; seconds per parameter of the optimizer step and of what
is left of a step (judging the gradients); and seconds per byte and per message between two processes. The simulation
then lets every process do what it has, in the order of `LayerParallel`, as soon as what it waits for has come:

- encode part p needs the process's encode of part p - 1 and the code of part p from below;
- the code step of part p needs that of part p - 1, all encodes, and the moves of part p from above;
- weight gradients need all code steps, and the optimizer step needs the verdict of all processes.

Data parallelism is the whole batch's work divided by the processes, and a ring all-reduce of all gradients. Nothing
of this knows of memory bandwidth or caches that processes share. What it says of one and two processes is compared with
runs of the benchmark `layer_parallel.py`, made between two measurements of the costs.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from layer_parallel import batch, model
from layer_parallel import row as benchmark_row

from lightning_altmin.parallel.dealing import dealt_out, stage_costs


@dataclass
class Costs:
    """Seconds on one process: per layer and micro-batch, per parameter, per byte and per message."""

    encode: list[float]
    solve: list[float]  # the code below the layer
    weights: list[float]  # the layer's weight gradients, of a whole batch
    whole: list[float]  # encode and code step of a whole batch
    balance: list[float]  # what layers are dealt out by
    parameters: list[float]
    optimizer: float  # per parameter
    rest: float  # of a step, per parameter: judging the gradients, and all that is in no phase
    join: float  # of the parts of one code
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


class Timed:
    """Replaces a method of an object by one that adds up its seconds under a key made of its arguments."""

    def __init__(self) -> None:
        self.sums: dict[Any, float] = defaultdict(float)

    def method(self, owner: Any, name: str, key: Callable[..., Any]) -> None:
        original = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            where, begin = key(*args), time.perf_counter()
            result = original(*args, **kwargs)
            self.sums[where] += time.perf_counter() - begin
            return result

        setattr(owner, name, timed)


def timed_steps(hidden: list[int], samples: int, batches: int) -> dict[Any, float]:
    """Medians over batches of the seconds of each layer's phases, where they are: inside whole steps."""
    core = model(hidden)
    x, y = batch(samples)
    clock = Timed()
    for level, stage in enumerate(core.coded.stages):
        clock.method(stage, "encode", lambda _, level=level: ("encode", level))
    clock.method(core, "move_code", lambda _, level: ("solve", level + 1))
    clock.method(core, "_passing_gradients", lambda _, level: ("weights", level))
    clock.method(core.optimizer, "step", lambda: ("optimizer",))
    rows = []
    for number in range(batches + 2):
        core.batches_seen = 11  # a batch that measures no curvature, as nine in ten
        clock.sums.clear()
        begin = time.perf_counter()
        core.step(x, y, keep_codes=False)
        if number >= 2:
            whole = time.perf_counter() - begin
            rows.append({**clock.sums, "rest": whole - sum(clock.sums.values())})
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def measure(hidden: list[int], samples: int, parts: int, link: tuple[float, float], batches: int = 6) -> Costs:
    """Costs of one process, its network undivided: of parts from batches of their size, of the rest from whole ones."""
    whole, small = timed_steps(hidden, samples, batches), timed_steps(hidden, samples // parts, batches)
    core = model(hidden)
    parameters = [float(sum(p.numel() for p in stage.parameters())) for stage in core.coded.stages]
    levels = range(len(parameters))
    code = torch.zeros(samples // parts, max(hidden))
    return Costs(
        encode=[small["encode", level] for level in levels],
        solve=[small.get(("solve", level), 0.0) for level in levels],
        weights=[whole["weights", level] for level in levels],
        whole=[whole["encode", level] + whole.get(("solve", level), 0.0) for level in levels],
        balance=stage_costs(core),
        parameters=parameters,
        optimizer=whole["optimizer",] / sum(parameters),
        rest=whole["rest"] / sum(parameters),
        join=seconds(lambda: torch.cat([code] * parts), 7),
        byte=link[0],
        message=link[1],
        border_bytes=4.0 * samples // parts * max(hidden),
    )


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
    owners = dealt_out(costs.balance, processes)
    groups = [[i for i, owner in enumerate(owners) if owner == rank] for rank in range(processes)]
    encode = [sum(costs.encode[i] for i in group) for group in groups]
    solve = [sum(costs.solve[i] for i in group) for group in groups]
    numbers = [sum(costs.parameters[i] for i in group) for group in groups]
    # The codes of a process and the moves of its codes are joined for the weight step.
    weights = [sum(costs.weights[i] + 2 * costs.join for i in group) for group in groups]
    judge = [costs.rest * n for n in numbers]
    update = [costs.optimizer * n for n in numbers]
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
            free[rank] += weights[rank] + judge[rank]
        verdict = max(free) + 2 * costs.message * (processes - 1).bit_length()
        free = [verdict + seconds for seconds in update]
        ends.append(max(free))
    return ends[-1] - ends[-2]


def data_parallel(costs: Costs, processes: int) -> float:
    """Seconds per batch: the whole batch's work divided up, a ring all-reduce, and every weight's step."""
    work = (sum(costs.whole) + sum(costs.weights)) / processes
    numbers = sum(costs.parameters)
    ring = 2 * (processes - 1) * (costs.message + costs.byte * 4 * numbers / processes) if processes > 1 else 0.0
    return work + ring + (costs.rest + costs.optimizer) * numbers


def deeper(base: Costs, depth: int) -> Costs:
    """One network is measured; a deeper one repeats its middle layer."""
    lists = {}
    for name in ("encode", "solve", "weights", "whole", "balance", "parameters"):
        first, *_, middle, last = getattr(base, name)
        lists[name] = [first, *[middle] * (depth - 1), last]
    return replace(base, **lists)


def mean(one: Costs, other: Costs) -> Costs:
    """Of two measurements, number by number."""
    values = {}
    for field in fields(Costs):
        a, b = getattr(one, field.name), getattr(other, field.name)
        values[field.name] = [(x + y) / 2 for x, y in zip(a, b, strict=True)] if isinstance(a, list) else (a + b) / 2
    return Costs(**values)


def measured(args: argparse.Namespace) -> dict[int, float]:
    """Seconds per batch by the benchmark beside this script, on one process and on two."""
    found = benchmark_row(0, args)
    return {1: float(found[3]), 2: float(found[4])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2000)
    parser.add_argument("--depth", type=int, nargs="+", default=[6, 63], help="hidden layers; the first is measured")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    args.hidden, args.processes, args.blocks, args.batches = [args.width] * args.depth[0], 2, 6, 4
    torch.set_num_threads(1)
    connection = link()
    print(f"link: {1e6 * connection[1]:.0f} us per message, {1e-9 / max(connection[0], 1e-15):.2f} GB/s", flush=True)
    # Costs before and after the runs that they are to predict: a machine's speed drifts.
    before = measure(args.hidden, args.batch_size, args.micro_batches, connection)
    found = measured(args)
    base = mean(before, measure(args.hidden, args.batch_size, args.micro_batches, connection))
    rows = []
    for depth in args.depth:
        costs = deeper(base, depth)
        for processes in (1, 2, 4, 8, 16, 32, 64):
            data = data_parallel(costs, processes)
            layers = None
            if processes == 1:
                layers = data
            elif processes <= depth + 1:
                layers = layer_parallel(costs, processes, args.micro_batches)
            shown = "" if layers is None else f"{layers:.4f}"
            real = found.get(processes) if depth == args.depth[0] else None
            checked = ["", ""] if real is None or layers is None else [f"{real:.4f}", f"{layers / real - 1:+.3f}"]
            rows.append([depth, processes, args.micro_batches, shown, f"{data:.4f}", *checked])
            print(*rows[-1], flush=True)
    if args.output:
        with args.output.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            columns = ["hidden_layers", "processes", "micro_batches", "layer_parallel_s", "data_parallel_s"]
            writer.writerow([*columns, "layer_parallel_measured_s", "error"])
            writer.writerows(rows)


if __name__ == "__main__":
    main()
