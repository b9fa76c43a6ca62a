"""Energy of a training step by the counters of the machine: AltMin beside backprop.

    python examples/benchmarks/energy.py --json docs/results/energy.json

Reads the processor packages' counters (RAPL, /sys/class/powercap; mostly for root only) and, with `--device cuda`, the
GPU's (NVML, by the package nvidia-ml-py). They count all that runs, the idle machine too, so run nothing else. Methods
alternate as in step_time.py; a figure is the median over rounds of joules per step, and of its ratio to backprop's in
the same round. Where a machine has no counter, the file says which were looked for, and has no rows.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from step_time import METHODS, NETS, core_runner

COMPARED = ("backprop", "1 code step", "1 code step, compiled", "5 code steps")
POWERCAP = Path("/sys/class/powercap")


class Counter(Protocol):
    """Counts joules from an unknown origin, and begins anew at ``range`` of them."""

    name: str
    range: float

    def read(self) -> float: ...


class Package:
    """A processor package's counter, a folder of files."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "energy_uj"
        self.name = f"RAPL {(folder / 'name').read_text().strip()}"
        self.range = 1e-6 * int((folder / "max_energy_range_uj").read_text())
        self.read()

    def read(self) -> float:
        return 1e-6 * int(self._file.read_text())


class Gpu:
    """The first NVIDIA GPU's counter.

    Raises:
        ImportError: Without nvidia-ml-py.
    """

    name, range = "NVML GPU 0", float("inf")

    def __init__(self) -> None:
        self._library: Any = importlib.import_module("pynvml")
        self._library.nvmlInit()
        self._handle = self._library.nvmlDeviceGetHandleByIndex(0)

    def read(self) -> float:
        return 1e-3 * float(self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle))


def packages(folder: Path = POWERCAP) -> list[Package]:
    """The counters of the packages; what is inside a package, or holds several, would count twice.

    Raises:
        PermissionError: If there are some that this user may not read.
    """
    zones = sorted(zone for zone in folder.glob("*") if (zone / "energy_uj").exists())
    return [Package(zone) for zone in zones if (zone / "name").read_text().startswith("package")]


def spent(counters: Sequence[Counter], work: Callable[[], object]) -> float:
    """Joules while the work is done, for less than the time in which a counter begins anew twice."""
    before = [counter.read() for counter in counters]
    work()
    after = [counter.read() for counter in counters]
    return sum(
        end - start + (counter.range if end < start else 0.0)
        for counter, start, end in zip(counters, before, after, strict=True)
    )


def measure(net: str, counters: Sequence[Counter], device: str, steps: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each method."""
    runners = {name: core_runner(METHODS[name], net, "fp32", device) for name in COMPARED}
    for run in runners.values():
        run(1)  # past compilation
    joules: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, run in runners.items():
            joules[name].append(spent(counters, lambda run=run: run(steps)) / steps)  # type: ignore[misc]
    base = joules["backprop"]
    return [
        {
            "net": net,
            "method": name,
            "joules": statistics.median(values),
            "ratio": statistics.median(mine / theirs for mine, theirs in zip(values, base, strict=True)),
        }
        for name, values in joules.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--nets", nargs="+", choices=tuple(NETS), default=["MLP 2x100", "MLP 2x500", "LeNet"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    counters: list[Counter] = [*packages()]
    if arguments.device == "cuda":
        counters.append(Gpu())
    rows = [
        row
        for net in arguments.nets
        if counters
        for row in measure(net, counters, arguments.device, arguments.steps, arguments.rounds)
    ]
    found = {"counters": [counter.name for counter in counters], "rows": rows}
    arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1) if counters else f"no counters of packages in {POWERCAP}: nothing was measured")


if __name__ == "__main__":
    main()
