"""The counters of energy that a benchmark reads, on a folder that is made as the kernel's."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture
def energy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("energy")


def zone(folder: Path, number: str, name: str, microjoules: int, limit: int = 10_000_000) -> Path:
    path = folder / f"intel-rapl:{number}"
    path.mkdir()
    for file, value in (("name", name), ("energy_uj", microjoules), ("max_energy_range_uj", limit)):
        (path / file).write_text(f"{value}\n")
    return path


def test_packages_are_summed_and_their_parts_are_not(energy: ModuleType, tmp_path: Path) -> None:
    """Catches a core, or the whole platform, that is counted beside the package it is in or holds."""
    first, second = zone(tmp_path, "0", "package-0", 1_000_000), zone(tmp_path, "1", "package-1", 2_000_000)
    inner, whole = zone(tmp_path, "0:0", "core", 0), zone(tmp_path, "2", "psys", 0)
    (tmp_path / "intel-rapl").mkdir()  # the driver's own folder, which has no counter
    counters = energy.packages(tmp_path)
    assert [counter.name for counter in counters] == ["RAPL package-0", "RAPL package-1"]

    def work() -> None:
        for path, end in ((first, 1_500_000), (second, 5_000_000), (inner, 9_000_000), (whole, 9_000_000)):
            (path / "energy_uj").write_text(f"{end}\n")

    assert energy.spent(counters, work) == pytest.approx(0.5 + 3.0)


def test_a_counter_that_begins_anew(energy: ModuleType, tmp_path: Path) -> None:
    """Catches a negative energy: counters of 32 bits begin anew every few minutes."""
    path = zone(tmp_path, "0", "package-0", 9_000_000)
    counters = energy.packages(tmp_path)
    assert energy.spent(counters, lambda: (path / "energy_uj").write_text("500000\n")) == pytest.approx(1.5)


def test_a_machine_without_counters_has_none(energy: ModuleType, tmp_path: Path) -> None:
    """Catches a figure where nothing was measured."""
    assert energy.packages(tmp_path / "absent") == []
