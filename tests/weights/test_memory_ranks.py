"""Oracle: one process that sees what two processes see between them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_altmin import AltMin, CoactivationMemory, GradientCodes
from lightning_altmin.parallel import DataParallel
from lightning_altmin.processes import Processes
from tests.distributed.gloo import join_gloo, launch

SETTINGS: list[dict[str, Any]] = [
    {"every": 3},
    {"every": 3, "rank": 4},
    {"every": 3, "rank": 0},
    {"form": "solve", "every": 2},
    {"form": "solve", "every": 3, "forgetting": 0.8},
    {"form": "solve", "every": 2, "solver": "bcd", "lambda_w": 1e-4},
    {"form": "solve", "every": 2, "window": 2},
    {"form": "solve", "every": 2, "storage": "triangle"},
]


def stream() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(12, 1, 6, 6, generator=generator, dtype=torch.float64),
            torch.randint(4, (12,), generator=generator),
        )
        for _ in range(7)
    ]


def model(settings: dict[str, Any], processes: Processes | None = None) -> AltMin:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 6), nn.Tanh(), nn.Linear(6, 4)
    ).double()
    codes = GradientCodes(steps=2, lr=0.5)  # what CurvatureCodes measures depends on the process
    return AltMin(
        network, nn.CrossEntropyLoss(), codes=codes, weights=CoactivationMemory(**settings), processes=processes
    )


class Counting(DataParallel):
    """Remembers the length of each vector of statistics that was summed."""

    sizes: list[int]

    def sum(self, vector: Tensor) -> Tensor:
        self.sizes.append(vector.numel())
        return super().sum(vector)


def run(core: AltMin, rank: int, count: int) -> None:
    """Train on a process's part of each batch; a memory with a window begins a task amid shares of another."""
    for number, (x, y) in enumerate(stream()):
        if number == 3 and core.weights.window is not None:
            core.weights.begin_task()
        core.step(x.chunk(count)[rank], y.chunk(count)[rank])


def train(rank: int, settings: dict[str, Any], count: int) -> tuple[dict[str, Tensor], int, int]:
    """Every process trains on its part of each batch."""
    core, sizes = model(settings, Counting()), []
    core.processes.sizes = sizes
    run(core, rank, count)
    before_save = len(sizes)
    state = {name: value for name, value in core.state_dict().items() if "codes." not in name}
    return state, before_save, sizes[-1]


def train_all(rank: int, count: int) -> list[tuple[dict[str, Tensor], int, int]]:
    return [train(rank, settings, count) for settings in SETTINGS]


@pytest.fixture(scope="module")
def two_processes() -> list[Any]:
    """Of each of two processes, its results with all settings: starting processes is most of the time."""
    return launch(2, join_gloo(train_all), 2)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(SETTINGS)), ids=[str(settings) for settings in SETTINGS])
def test_two_processes_equal_one(index: int, two_processes: list[Any]) -> None:
    """Catches statistics of one process only, ones discounted or counted per process, ones used before they are summed,
    a checkpoint with a process's share, processes that end apart, and more collectives than uses of new statistics.
    """
    settings = SETTINGS[index]
    alone = model(settings)
    run(alone, 0, 1)
    (first, calls, numbers), (second, *_) = (results[index] for results in two_processes)
    expected = {name: value for name, value in alone.state_dict().items() if "codes." not in name}
    for name, value in expected.items():
        torch.testing.assert_close(first[name], value, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
    solves = settings.get("form") == "solve"  # innovation: after batches 0, 1, 2, 3, 6
    assert calls == (7 // settings["every"] + ("window" in settings) if solves else 5)
    assert numbers == sum(numbers_of(settings, inputs, outputs) for inputs, outputs in ((10, 3), (49, 6), (7, 4)))


def numbers_of(settings: dict[str, Any], inputs: int, outputs: int) -> int:
    """Of a layer: upper triangle of A, B, products with leading directions and their trace, a number of rows."""
    rank = settings.get("rank")
    if rank is not None:
        return inputs * rank + 2 if rank else 2 * inputs + 1
    return inputs * (inputs + 1) // 2 + 1 + (inputs * outputs if settings.get("form") == "solve" else 0)


def rows_after_bad_batches(rank: int) -> list[float]:
    """A bad batch in the middle of shares, one that would sum them, and a model that shares with nobody."""
    found = []
    for bad in (2, 3):
        core = AltMin(
            nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
            nn.CrossEntropyLoss(),
            weights=CoactivationMemory("solve", every=2),
            nonfinite="skip",
            processes=DataParallel(),
        )
        core.processes.broadcast(core)
        for number in range(4):
            x = torch.randn(16, 3)
            core.step(x.fill_(torch.nan) if number == bad and rank == 0 else x, torch.randint(2, (16,)))
        core.weights.synchronize()
        found.append(float(core.weights._memories["0"].statistics.rows))
    alone = AltMin(
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
        nn.CrossEntropyLoss(),
        weights=CoactivationMemory("solve", every=1),
    )
    alone.step(torch.randn(16, 3), torch.randint(2, (16,)))
    return [*found, float(alone.weights._memories["0"].statistics.rows)]


@pytest.mark.slow
def test_rows_are_counted_once() -> None:
    """Catches shares taken for the whole after a bad batch was undone, and statistics of unrelated models added."""
    for found in launch(2, join_gloo(rows_after_bad_batches)):
        assert found == [3 * 32, 3 * 32, 16]
