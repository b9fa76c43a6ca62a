"""What two processes exchange per batch, counted: AltMin by data parallelism, and backprop by PyTorch's DDP.

    python examples/benchmarks/ddp_volume.py --output docs/results/ddp_volume.csv --figure docs/results/ddp_volume.svg

Counted are the collectives that a training step starts and the bytes that one process puts into them, over `--batches`
batches after the first, in which processes compare their models. Barriers would count as collectives of no bytes. What
the Trainer adds to either is not in it: one broadcast of 8 bytes per batch.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_altmin import AltMin, CoactivationMemory, CurvatureCodes, WeightSolver
from lightning_altmin.nn import MLP, ConvNet, LeNet5
from lightning_altmin.parallel import DataParallel

COLUMNS = ("network", "parameters", "method", "collectives_per_batch", "bytes_per_batch", "bytes_per_parameter")
COLLECTIVES = ("all_reduce", "broadcast", "barrier", "all_gather", "all_gather_object", "reduce", "send", "isend")
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP 784-500-500-10": (lambda: MLP(784, [500, 500], 10), (784,)),
    "LeNet-5": (lambda: LeNet5(), (1, 28, 28)),
    "ConvNet 32-64 BatchNorm": (lambda: ConvNet(3, 10, channels=[32, 64], image_size=32, batch_norm=True), (3, 32, 32)),
}
METHODS: dict[str, Callable[[], WeightSolver | None]] = {
    "AltMin, Adam": lambda: None,
    "AltMin, memory (every=10)": lambda: CoactivationMemory(every=10),
}


class Counter:
    """Stands between a program and torch.distributed."""

    def __init__(self) -> None:
        self.calls = self.bytes = 0
        for name in COLLECTIVES:
            setattr(dist, name, self._counted(getattr(dist, name)))

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.add(args[0] if args and isinstance(args[0], Tensor) else None)
            return function(*args, **kwargs)

        return call

    def add(self, tensor: Tensor | None) -> None:
        self.calls += 1
        self.bytes += 0 if tensor is None else tensor.numel() * tensor.element_size()

    def reset(self) -> None:
        self.calls = self.bytes = 0


def bucket_counted(counter: Counter, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's own averaging, which runs below torch.distributed's functions; this one counts itself."""
    mean = bucket.buffer() / dist.get_world_size()
    work = dist.all_reduce(mean, async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


# DDP wants the classes themselves, which postponed annotations are not.
bucket_counted.__annotations__ |= {"bucket": dist.GradBucket, "return": torch.futures.Future[Tensor]}


def altmin(network: nn.Module, method: str) -> Callable[[Tensor, Tensor], Any]:
    codes = CurvatureCodes()
    weights = METHODS[method]()
    core = AltMin(network, nn.CrossEntropyLoss(), codes=codes, weights=weights, processes=DataParallel())
    return core.step


def backprop(network: nn.Module, counter: Counter) -> Callable[[Tensor, Tensor], Any]:
    wrapped, loss = DistributedDataParallel(network), nn.CrossEntropyLoss()
    wrapped.register_comm_hook(counter, bucket_counted)
    optimizer = torch.optim.Adam(network.parameters())
    buffers = list(network.buffers())

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        loss(wrapped(x), y).backward()
        optimizer.step()
        if buffers:  # broadcast before each forward pass, below torch.distributed's functions too: in one call
            counter.calls += 1
            counter.bytes += sum(b.numel() * b.element_size() for b in buffers)

    return step


def measure(rank: int, world: int, name: str, method: str, batches: int, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    network, counter = make(), Counter()
    step = backprop(network, counter) if method == "backprop, DDP" else altmin(network, method)
    generator = torch.Generator().manual_seed(rank)
    for number in range(batches + 1):
        if number == 1:
            counter.reset()
        step(torch.rand(16, *shape, generator=generator), torch.randint(10, (16,), generator=generator))
    if rank == 0:
        results.put((sum(p.numel() for p in network.parameters()), counter.calls / batches, counter.bytes / batches))
    dist.destroy_process_group()


def draw(rows: list[list[Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.0), layout="constrained")
    axes = figure.subplots()
    methods = list(dict.fromkeys(row[2] for row in rows))
    networks = list(dict.fromkeys(row[0] for row in rows))
    for place, method in enumerate(methods):
        heights = [float(next(row[5] for row in rows if row[0] == n and row[2] == method)) for n in networks]
        axes.bar([index + 0.27 * (place - 1) for index in range(len(networks))], heights, 0.25, label=method)
    axes.axhline(4, color="black", linewidth=0.8, linestyle="--", label="gradients alone")
    axes.set_xticks(range(len(networks)), networks)
    axes.set_ylabel("bytes per parameter and batch")
    axes.legend(fontsize="small")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batches", type=int, default=50)
    parser.add_argument("--output", type=Path, default=Path("ddp_volume.csv"))
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    spawn = mp.get_context("spawn")
    rows: list[list[Any]] = []
    for name in NETWORKS:
        for method in (*METHODS, "backprop, DDP"):
            results = spawn.Queue()
            store = Path(tempfile.mkdtemp()) / "store"
            mp.spawn(measure, (args.processes, name, method, args.batches, str(store), results), nprocs=args.processes)
            shutil.rmtree(store.parent)
            parameters, calls, volume = results.get()
            rows.append([name, parameters, method, f"{calls:.2f}", f"{volume:.0f}", f"{volume / parameters:.3f}"])
            print(*rows[-1], sep=", ", flush=True)
            with args.output.open("w", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
    if args.figure:
        draw(rows, args.figure)


if __name__ == "__main__":
    main()
