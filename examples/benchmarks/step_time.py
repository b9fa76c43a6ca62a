"""Time, memory and multiply-adds of a training step: AltMin beside backprop and beside its own autograd engine.

    python examples/benchmarks/step_time.py --json docs/results/step_time.json
    python examples/benchmarks/step_time.py --nets "MLP 2x100" --threads 1 2
    python examples/benchmarks/step_time.py --nets VGG-like --rounds 3 --methods "1 code step"
    python examples/benchmarks/step_time.py --profile LeNet --methods "1 code step"
    python examples/benchmarks/step_time.py --device cuda --levels core --json docs/results/step_time_cuda.json

Every method trains the same network on the same batches with fused Adam, through the raw core ("core") or the Trainer
("trainer"). Runs of the methods alternate, each from the initial weights with a new optimizer; a ratio is the median
over rounds of a method's time divided by that of backprop in the same round, with the smallest and the largest.
Compilation happens in the warm-up and is not counted, nor are the first batches of a run.
Rows of the JSON file are replaced by those measured anew; each row's ratio is to backprop in its own run. Peak memory
is what a step's tensors hold beyond parameters and optimizer state. The share of the matmul bound is the step's
multiply-adds (those of matrix products and convolutions) at this machine's measured rate, over the step's time. The
accuracies in the table are those of step_time_accuracy.py and, tuned, of examples/paper/accuracy.py.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import logging
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from peak_memory import PeakMemory
from step_time_table import table
from torch import Tensor, nn
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
    "VGG-like": (functools.partial(ConvNet, 3, 10, channels=(16, 32, 64), convs_per_block=2), (64, 3, 32, 32)),
}


@dataclass(frozen=True)
class Method:
    """How a network is trained; ``codes`` makes the code solver, ``None`` is backprop."""

    codes: Callable[[], Any] | None = None
    compile: bool | str = False
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
        return self.trained(network)[0]

    def trained(self, network: nn.Module) -> tuple[Callable[[Tensor, Tensor], Any], nn.Module, torch.optim.Optimizer]:
        """A training step, and what holds its state."""
        loss = nn.CrossEntropyLoss()
        if self.codes is not None:
            coded = CodedNetwork(network, self.engine)
            core = AltMin(coded, loss, codes=self.codes(), weights=LocalGradient(adam), compile=self.compile)
            return functools.partial(core.step, keep_codes=False), core, core.optimizer
        optimizer = adam(network.parameters())
        if self.compile:
            network.compile(mode=self.compile if isinstance(self.compile, str) else None)

        def backprop(x: Tensor, y: Tensor) -> None:
            optimizer.zero_grad()
            loss(network(x), y).backward()
            optimizer.step()

        return backprop, network, optimizer


five = functools.partial(CurvatureCodes, steps=5)
METHODS = {
    "backprop": Method(),
    "backprop, compiled": Method(compile=True),
    "backprop, CUDA graphs": Method(compile="reduce-overhead"),
    "1 code step": Method(CurvatureCodes),
    "1 code step, compiled": Method(CurvatureCodes, compile=True),
    "1 code step, CUDA graphs": Method(CurvatureCodes, compile="reduce-overhead"),
    "1 code step, fixed rate": Method(functools.partial(GradientCodes, 1, 0.1)),
    "5 code steps": Method(five),
    "5 code steps, compiled": Method(five, compile=True),
    "5 code steps, CUDA graphs": Method(five, compile="reduce-overhead"),
    "5 code steps, autograd engine": Method(five, engine="autograd"),
}


WARM_UP = 7  # batches of a run before its time counts: in the first five CurvatureCodes always measures
CORE_ONLY = ("backprop, compiled", "backprop, CUDA graphs", "5 code steps, autograd engine")


def batches(shape: tuple[int, ...], count: int, device: str) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(shape, device=device), torch.randint(10, shape[:1], device=device)) for _ in range(count)]


def wait(device: str) -> None:
    """Until all that was asked of the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()


class Repeated:
    """A loader of ``count`` batches that costs nothing, so that steps are timed and not loading."""

    def __init__(self, data: list[tuple[Tensor, Tensor]], count: int) -> None:
        self.data, self.count = data, count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self.data[index % len(self.data)] for index in range(self.count))

    def __len__(self) -> int:
        return self.count


class Clock(Callback):
    """Seconds from the first timed batch of an epoch to its end."""

    def __init__(self, device: str) -> None:
        self._device = device

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == WARM_UP:
            wait(self._device)
            self.seconds = -time.perf_counter()

    def on_train_epoch_end(self, *_: Any) -> None:
        wait(self._device)
        self.seconds += time.perf_counter()


def core_runner(method: Method, net: str, precision: str, device: str) -> Callable[[int], float]:
    """A function that trains anew, and returns milliseconds per step of n steps after the first ones."""
    make, shape = NETS[net]
    step, module, optimizer = method.trained(make().to(device))
    initial, data = copy.deepcopy(module.state_dict()), batches(shape, 8, device)

    def run(count: int) -> float:
        module.load_state_dict(initial)
        optimizer.state.clear()
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            for index in range(WARM_UP + count):
                if index == WARM_UP:
                    wait(device)
                    start = time.perf_counter()
                step(*data[index % len(data)])
        wait(device)
        return 1e3 * (time.perf_counter() - start) / count

    return run


def trainer_runner(method: Method, net: str, precision: str, device: str) -> Callable[[int], float]:
    """The same through the Trainer, on one module whose compiled function is kept from run to run."""
    make, shape = NETS[net]
    module, data = method.module(make()), batches(shape, 8, device)
    initial = copy.deepcopy(module.state_dict())
    flags: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}

    def run(count: int) -> float:
        module.load_state_dict(initial)
        clock = Clock(device)
        plugin = "bf16-mixed" if precision == "bf16" else "32-true"
        trainer = Trainer(
            accelerator=device,
            devices=1,
            max_epochs=1,
            precision=plugin,
            enable_model_summary=False,
            callbacks=[clock],
            **flags,
        )
        trainer.fit(module, Repeated(data, WARM_UP + count))
        return 1e3 * clock.seconds / count

    return run


def compare(runners: dict[str, Callable[[int], float]], seconds: float, rounds: int) -> dict[str, dict[str, Any]]:
    """Alternate the methods; times and ratios to the first of them."""
    counts = {}
    for name, run in runners.items():
        run(1)  # past compilation
        counts[name] = max(30, int(1e3 * seconds / run(5)))
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


def costs(method: Method, net: str, device: str) -> dict[str, float]:
    """Peak memory in MB and multiply-adds in millions of one step; eager methods only."""
    make, shape = NETS[net]
    network = make().to(device)
    step, (batch,) = method.step(network), batches(shape, 1, device)
    for _ in range(7):  # past the first batches, which all measure
        step(*batch)
    for parameter in network.parameters():
        parameter.grad = None  # backprop's own are left over
    with PeakMemory() as memory:
        step(*batch)
    with FlopCounterMode(display=False) as counter:
        step(*batch)
    return {"peak_mb": memory.peak / 1e6, "million_multiply_adds": counter.get_total_flops() / 2e6}


def gemm_rate(device: str) -> float:
    """Multiply-adds per second of a large matrix product in single precision."""
    size = 1500 if device == "cpu" else 8192
    a = torch.randn(size, size, device=device)
    best = float("inf")
    for _ in range(10):
        wait(device)
        start = time.perf_counter()
        a @ a
        wait(device)
        best = min(best, time.perf_counter() - start)
    return size**3 / best


def measure(
    net: str, threads: int, precision: str, methods: list[str], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    torch.set_num_threads(threads)
    device = arguments.device
    rate, rows = gemm_rate(device), []
    chosen = {n: METHODS[n] for n in methods if precision == "fp32" or "autograd" not in n}
    cost = {n: costs(method, net, device) for n, method in chosen.items() if method.counted and precision == "fp32"}
    for level in arguments.levels:
        runner = {"core": core_runner, "trainer": trainer_runner}[level]
        taken = {n: m for n, m in chosen.items() if level == "core" or n not in CORE_ONLY}
        runners = {n: runner(m, net, precision, device) for n, m in taken.items()}
        times = compare(runners, arguments.seconds, arguments.rounds)
        for name, result in times.items():
            row = {"net": net, "level": level, "threads": threads, "precision": precision, "method": name, **result}
            row |= cost.get(name, {})
            if precision == "fp32" and "million_multiply_adds" in row:
                row["matmul_bound"] = 1e9 * row["million_multiply_adds"] / rate / row["ms"]
            rows.append(row)
            low, high = result["ratio_range"]
            extra = f", peak {row['peak_mb']:.2f} MB" if "peak_mb" in row else ""
            print(
                f"{net}, {level}, {threads} threads, {precision}, {name}: {result['ms']:.2f} ms, "
                f"{result['ratio']:.2f}x ({low:.2f} to {high:.2f}){extra}",
                flush=True,
            )
    return rows


def renew_costs(rows: list[dict[str, Any]], device: str) -> None:
    """Memory and multiply-adds of rows timed before, which noise does not touch."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        key = row["net"], row["method"]
        if "peak_mb" in row:
            found[key] = found.get(key) or costs(METHODS[row["method"]], row["net"], device)
            row |= found[key]


def profile(net: str, methods: list[str], device: str) -> None:
    """Where the time of a step goes, and which tensors there are at its peak of memory."""
    make, shape = NETS[net]
    (batch,) = batches(shape, 1, device)
    for name in methods:
        network = make().to(device)
        step = METHODS[name].step(network)
        for _ in range(10):
            step(*batch)
        with torch.profiler.profile() as recorded:
            for _ in range(20):
                step(*batch)
        print(name)
        print(recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=15))
        for parameter in network.parameters():
            parameter.grad = None
        if METHODS[name].counted:
            with PeakMemory(explain=True) as memory:
                step(*batch)
            print(memory)


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
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), help="beside backprop; all that make sense")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--levels", nargs="+", choices=("core", "trainer"), default=["core", "trainer"])
    parser.add_argument("--seconds", type=float, default=0.5, help="length of one timed run, of 30 steps at least")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--profile", choices=tuple(NETS), help="only print where time and memory go")
    parser.add_argument(
        "--costs", action="store_true", help="only renew memory and multiply-adds of the rows there are"
    )
    parser.add_argument("--table", action="store_true", help="only print the table")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_float32_matmul_precision("high")  # where a device has TF32, every method uses it
    default = [name for name in METHODS if arguments.device == "cuda" or "CUDA" not in name]
    methods = list(dict.fromkeys(["backprop", *(arguments.methods or default)]))
    if arguments.profile:
        profile(arguments.profile, methods, arguments.device)
        return
    rows = read(arguments.json)
    if arguments.costs:
        renew_costs(rows, arguments.device)
        write(arguments.json, rows)
    elif not arguments.table:
        for threads, precision, net in itertools.product(arguments.threads, arguments.precision, arguments.nets):
            new = measure(net, threads, precision, methods, arguments)
            keys = {tuple(row[key] for key in KEY) for row in new}
            rows = [row for row in rows if tuple(row[key] for key in KEY) not in keys] + new
            write(arguments.json, rows)
    print(table(rows, list(NETS), list(METHODS)))


def write(path: Path | None, rows: list[dict[str, Any]]) -> None:
    if path is not None:
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        machine = {"processor": gpu or platform.processor() or platform.machine(), "torch": torch.__version__}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
