"""Time, memory and multiply-adds of a training step: AltMin beside backprop and beside its own autograd engine.

    python examples/benchmarks/step_time.py --json docs/results/step_time.json
    python examples/benchmarks/step_time.py --nets "MLP 2x100" --threads 1 2
    python examples/benchmarks/step_time.py --profile LeNet

Every method trains the same network on the same batches with fused Adam, through the raw core ("core") or the Trainer
("trainer"). Runs of the methods alternate; a ratio is the median over rounds of a method's time divided by that of
backprop in the same round, with the smallest and the largest. Compilation happens in the warm-up and is not counted.
Peak memory is what a step's tensors hold beyond parameters and optimizer state. The share of the matmul bound is the
step's multiply-adds (those of matrix products and convolutions) at this machine's measured rate, over the step's time.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import platform
import statistics
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lightning_altmin import (
    AltMin,
    AltMinModule,
    BackpropModule,
    CodedNetwork,
    CurvatureCodes,
    GradientCodes,
    LocalGradient,
)
from lightning_altmin.nn import MLP, ConvNet, LeNet5

adam = functools.partial(torch.optim.Adam, lr=0.002, fused=True)
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP 2x100": (functools.partial(MLP, 784, [100] * 2, 10), (200, 784)),
    "MLP 2x500": (functools.partial(MLP, 784, [500] * 2, 10), (200, 784)),
    "MLP 10x100": (functools.partial(MLP, 784, [100] * 10, 10), (200, 784)),
    "MLP 4x2000": (functools.partial(MLP, 784, [2000] * 4, 10), (200, 784)),
    "LeNet": (LeNet5, (128, 1, 28, 28)),
    "VGG-like": (functools.partial(ConvNet, 3, 10, channels=(32, 64, 128), convs_per_block=2), (64, 3, 32, 32)),
}


@dataclass(frozen=True)
class Method:
    """How a network is trained; ``codes`` makes the code solver, ``None`` is backprop."""

    codes: Callable[[], Any] | None = None
    compile: bool = False
    engine: str = "auto"

    @property
    def counted(self) -> bool:
        """Whether memory and multiply-adds can be counted: compiled kernels hide them, autograd.grad has no hooks."""
        return not self.compile and self.engine == "auto"

    def module(self, network: nn.Module) -> AltMinModule | BackpropModule:
        if self.codes is None:
            return BackpropModule(network, optimizer=adam)
        coded = CodedNetwork(network, self.engine)
        return AltMinModule(coded, codes=self.codes(), weights=LocalGradient(adam), compile=self.compile)

    def step(self, network: nn.Module) -> Callable[[Tensor, Tensor], Any]:
        loss = nn.CrossEntropyLoss()
        if self.codes is not None:
            coded = CodedNetwork(network, self.engine)
            core = AltMin(coded, loss, codes=self.codes(), weights=LocalGradient(adam), compile=self.compile)
            return functools.partial(core.step, keep_codes=False)
        optimizer = adam(network.parameters())

        def backprop(x: Tensor, y: Tensor) -> None:
            optimizer.zero_grad()
            loss(network(x), y).backward()
            optimizer.step()

        return backprop


five = functools.partial(CurvatureCodes, steps=5)
METHODS = {
    "backprop": Method(),
    "1 code step": Method(CurvatureCodes),
    "1 code step, compiled": Method(CurvatureCodes, compile=True),
    "1 code step, fixed rate": Method(functools.partial(GradientCodes, 1, 0.1)),
    "5 code steps": Method(five),
    "5 code steps, compiled": Method(five, compile=True),
    "5 code steps, autograd engine": Method(five, engine="autograd"),
}


def batches(shape: tuple[int, ...], count: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(shape), torch.randint(10, shape[:1])) for _ in range(count)]


class Repeated:
    """A loader of ``count`` batches that costs nothing, so that steps are timed and not loading."""

    def __init__(self, data: list[tuple[Tensor, Tensor]], count: int) -> None:
        self.data, self.count = data, count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self.data[index % len(self.data)] for index in range(self.count))

    def __len__(self) -> int:
        return self.count


class Clock(Callback):
    """Seconds from the first batch of an epoch to its end."""

    def on_train_epoch_start(self, *_: Any) -> None:
        self.seconds = -time.perf_counter()

    def on_train_epoch_end(self, *_: Any) -> None:
        self.seconds += time.perf_counter()


def core_runner(method: Method, net: str, precision: str) -> Callable[[int], float]:
    """A function that trains for n steps and returns milliseconds per step."""
    make, shape = NETS[net]
    step, data = method.step(make()), batches(shape, 8)

    def run(count: int) -> float:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            for index in range(count):
                step(*data[index % len(data)])
        return 1e3 * (time.perf_counter() - start) / count

    return run


def trainer_runner(method: Method, net: str, precision: str) -> Callable[[int], float]:
    """The same through the Trainer, on one module whose compiled function is kept from run to run."""
    make, shape = NETS[net]
    module, data = method.module(make()), batches(shape, 8)
    flags: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}

    def run(count: int) -> float:
        clock = Clock()
        plugin = "bf16-mixed" if precision == "bf16" else "32-true"
        trainer = Trainer(
            accelerator="cpu", max_epochs=1, precision=plugin, enable_model_summary=False, callbacks=[clock], **flags
        )
        trainer.fit(module, Repeated(data, count))
        return 1e3 * clock.seconds / count

    return run


def compare(runners: dict[str, Callable[[int], float]], seconds: float, rounds: int) -> dict[str, dict[str, Any]]:
    """Alternate the methods; times and ratios to the first of them."""
    counts = {}
    for name, run in runners.items():
        run(7)  # past compilation and, for CurvatureCodes, past the first batches, which all measure
        counts[name] = max(10, int(1e3 * seconds / run(10)))
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, run in runners.items():
            times[name].append(run(counts[name]))
    base = times[next(iter(runners))]
    results = {}
    for name, values in times.items():
        ratios = [a / b for a, b in zip(values, base, strict=True)]
        results[name] = {
            "ms": statistics.median(values),
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
        }
    return results


class PeakMemory(TorchDispatchMode):
    """Largest number of bytes held at once by tensors made inside this context."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                self._note(value.untyped_storage(), made_here=False)
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._note(value.untyped_storage(), made_here=True)
        return result

    def _note(self, storage: Any, made_here: bool) -> None:
        """A view's storage is known already, one that is first seen as an argument was made before."""
        key, size = storage._cdata, storage.nbytes() if made_here else 0
        if key in self._known:
            return
        self._known.add(key)
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.held -= size


def costs(method: Method, net: str) -> dict[str, float]:
    """Peak memory in MB and multiply-adds in millions of one step; eager methods only."""
    make, shape = NETS[net]
    network = make()
    step, (batch,) = method.step(network), batches(shape, 1)
    for _ in range(7):  # past the first batches, which all measure
        step(*batch)
    for parameter in network.parameters():
        parameter.grad = None
    with PeakMemory() as memory:
        step(*batch)
    with FlopCounterMode(display=False) as counter:
        step(*batch)
    return {"peak_mb": memory.peak / 1e6, "million_multiply_adds": counter.get_total_flops() / 2e6}


def gemm_rate() -> float:
    """Multiply-adds per second of a large matrix product in single precision."""
    a = torch.randn(1500, 1500)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 1500**3 / best


def measure(nets: Iterable[str], threads: int, precision: str, seconds: float, rounds: int) -> list[dict[str, Any]]:
    torch.set_num_threads(threads)
    rate, rows = gemm_rate(), []
    for net in nets:
        chosen = {n: m for n, m in METHODS.items() if precision == "fp32" or "autograd" not in n}
        cost = {name: costs(method, net) for name, method in chosen.items() if method.counted}
        for level, runner in (("core", core_runner), ("trainer", trainer_runner)):
            taken = {n: m for n, m in chosen.items() if level == "core" or "autograd" not in n}
            times = compare({n: runner(m, net, precision) for n, m in taken.items()}, seconds, rounds)
            for name, result in times.items():
                row = {"net": net, "level": level, "threads": threads, "precision": precision, "method": name, **result}
                row |= cost.get(name, {})
                if precision == "fp32" and "million_multiply_adds" in row:
                    row["matmul_bound"] = 1e9 * row["million_multiply_adds"] / rate / row["ms"]
                rows.append(row)
                low, high = result["ratio_range"]
                extra = f", peak {row['peak_mb']:.1f} MB" if "peak_mb" in row else ""
                print(
                    f"{net}, {level}, {threads} threads, {precision}, {name}: {result['ms']:.2f} ms, "
                    f"{result['ratio']:.2f}x ({low:.2f} to {high:.2f}){extra}",
                    flush=True,
                )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown: a line per network and method, ratios to backprop."""
    lines = [
        "| network | threads | precision | method | core ms | core ratio | Trainer ratio | multiply-adds ratio "
        "| peak MB | of matmul bound |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    by_key = {(r["net"], r["threads"], r["precision"], r["method"], r["level"]): r for r in rows}
    for net, threads, precision, method, level in by_key:
        if level != "core":
            continue
        row = by_key[net, threads, precision, method, "core"]
        trainer = by_key.get((net, threads, precision, method, "trainer"))
        base = by_key[net, threads, precision, "backprop", "core"]
        work = row.get("million_multiply_adds")
        cells = [
            net,
            threads,
            precision,
            method,
            f"{row['ms']:.2f}",
            f"{row['ratio']:.2f} ({row['ratio_range'][0]:.2f} to {row['ratio_range'][1]:.2f})",
            "" if trainer is None else f"{trainer['ratio']:.2f}",
            "" if work is None else f"{work / base['million_multiply_adds']:.2f}",
            "" if "peak_mb" not in row else f"{row['peak_mb']:.1f}",
            "" if "matmul_bound" not in row else f"{100 * row['matmul_bound']:.0f} %",
        ]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def profile(net: str) -> None:
    """Where the time of backprop and of one AltMin step goes."""
    make, shape = NETS[net]
    (batch,) = batches(shape, 1)
    for name in ("backprop", "1 code step"):
        step = METHODS[name].step(make())
        for _ in range(10):
            step(*batch)
        with torch.profiler.profile() as recorded:
            for _ in range(20):
                step(*batch)
        print(name)
        print(recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=15))


KEY = ("net", "level", "threads", "precision", "method")


def read(path: Path | None) -> list[dict[str, Any]]:
    """The rows measured before; those measured anew replace them."""
    if path is None or not path.exists():
        return []
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="add all rows, and the machine, to this file")
    parser.add_argument("--nets", nargs="+", choices=tuple(NETS), default=list(NETS))
    parser.add_argument("--threads", nargs="+", type=int, default=[2])
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32"])
    parser.add_argument("--seconds", type=float, default=0.5, help="length of one timed run")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--profile", choices=tuple(NETS), help="only print where the time goes")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if arguments.profile:
        profile(arguments.profile)
        return
    rows = read(arguments.json)
    for threads in arguments.threads:
        for precision in arguments.precision:
            for net in arguments.nets:
                new = measure([net], threads, precision, arguments.seconds, arguments.rounds)
                keys = {tuple(row[key] for key in KEY) for row in new}
                rows = [row for row in rows if tuple(row[key] for key in KEY) not in keys] + new
                if arguments.json:
                    machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
                    arguments.json.parent.mkdir(parents=True, exist_ok=True)
                    arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
