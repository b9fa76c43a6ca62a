"""The scripts of examples/paper, run whole on a data set that is made up."""

from __future__ import annotations

import csv
import importlib
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

PAPER = Path(__file__).parents[2] / "examples" / "paper"
METHODS = {"AM-mem": ("step=0.8 ridge=1.0 every=10",), "SGD": ("0.02", "1e9")}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the format of MNIST: 1200 and 400 images of ten patterns and noise."""
    folder = tmp_path_factory.mktemp("data")
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    patterns = random.integers(0, 128, (10, 28, 28))
    for part, count in (("train", 1200), ("t10k", 400)):
        labels = random.integers(0, 10, count)
        images = patterns[labels] + random.integers(0, 128, (count, 28, 28))
        for kind, values in (("labels-idx1", labels), ("images-idx3", images)):
            head = np.array([0x800 + values.ndim, *values.shape], ">i4").tobytes()
            (raw / f"{part}-{kind}-ubyte").write_bytes(head + values.astype(np.uint8).tobytes())
    return folder


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Runs a script in this process, with few settings of two methods."""
    for folder in (PAPER.parent, PAPER):
        monkeypatch.syspath_prepend(folder)
    first_epoch, threads = importlib.import_module("first_epoch"), torch.get_num_threads()
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    monkeypatch.setattr(first_epoch, "METHODS", METHODS)
    for name in ("epochs", "higgs"):
        monkeypatch.setattr(importlib.import_module(name), "METHODS", METHODS)
    monkeypatch.setattr(importlib.import_module("higgs"), "ONLINE", tuple(METHODS))

    def run(name: str, *arguments: str | Path) -> None:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        first_epoch.loaded.cache_clear()
        importlib.import_module(name).main()

    yield run
    torch.set_num_threads(threads)
    logger.setLevel(level)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()[1:]


@pytest.mark.parametrize(("name", "marks"), [("first_epoch", 3), ("epochs", 2)])
def test_a_script_goes_on_where_it_stopped(script: Callable[..., Any], root: Path, name: str, marks: int) -> None:
    """Catches a finished run that is repeated, one that is left out, an order of batches that depends on what ran
    before in the process, a diverged setting that is chosen or ends the script, and a table of tuning runs.
    """
    results = root / f"{name}.csv"
    common = ("--root", root, "--small", "--results", results, "--methods", *METHODS)
    script(name, "tune", *common)
    assert len(lines(results)) == 3 * marks
    script(name, "final", *common)
    whole = lines(results)
    final = [line.split(",") for line in whole[3 * marks :]]
    assert len(final) == 2 * marks
    assert {line[3] for line in final} == {METHODS["AM-mem"][0], "0.02"}
    assert all(float(line[-1]) > 0.5 for line in final[marks - 1 :: marks])  # at the last mark: ten classes
    kept = whole[:marks] + whole[2 * marks :]
    results.write_text("\n".join(["suite,phase,method,setting,seed,seen,accuracy", *kept, ""]))
    script(name, "tune", *common)
    script(name, "final", *common)
    assert sorted(lines(results)) == sorted(whole)


@pytest.mark.parametrize(
    ("name", "options", "methods", "tries"),
    [
        ("accuracy", ["--suite", "mnist_mlp_100"], ["backprop", "AltMin"], 6),
        ("recurrent", ["--hidden", "15"], ["backprop", "AltMin"], 4),
        ("binary", [], ["discrete codes, flips=0", "straight-through backprop"], 4),
    ],
)
def test_a_table_goes_on_where_it_stopped(
    script: Callable[..., Any],
    root: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    options: list[str],
    methods: list[str],
    tries: int,
) -> None:
    """Catches a finished run that is repeated, one left out, methods that are tuned with unequal effort, and a final
    run with another setting than the one that the held-out samples chose.
    """
    results = root / f"{name}.csv"
    common = (*options, "--root", root, "--small", "--results", results, "--methods", *methods)
    script(name, "tune", *common)
    with results.open() as file:
        tuned = list(csv.DictReader(file))
    assert [row["method"] for row in tuned].count(methods[0]) == tries
    assert len(tuned) == len(methods) * tries
    script(name, "final", *common)
    with results.open() as file:
        final = list(csv.DictReader(file))[len(tuned) :]
    rate, judged = ("rate", "val_accuracy") if name == "binary" else ("lr", "accuracy")
    for method, row in zip(methods, final, strict=True):
        chosen = max((r for r in tuned if r["method"] == method), key=lambda r: float(r[judged]))
        assert (row["method"], row[rate]) == (method, chosen[rate])
    whole = results.read_text().splitlines(keepends=True)
    results.write_text("".join(whole[:2] + whole[3:-1]))  # a tuning run and a final one are lost
    capsys.readouterr()
    script(name, "tune", *common)
    assert len(results.read_text().splitlines()) == len(whole) - 1
    script(name, "final", *common)
    again = results.read_text().splitlines()
    assert len(again) == len(whole)
    assert len(set(again)) == len(whole)


def test_offline_methods_are_fitted_anew_at_each_mark(
    script: Callable[..., Any], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a module that the Trainer refuses, a batch that is not all samples seen by then, and a mark that is left
    out, or done twice, when an interrupted command goes on.
    """
    first_epoch = importlib.import_module("first_epoch")
    monkeypatch.setattr(first_epoch, "SWEEPS", 3)
    monkeypatch.setattr(first_epoch, "OFFLINE_MARKS", {"tune": (2,), "final": (1, 3)})
    settings = {"ADMM": ("loss=hinge gamma=10",), "MAC": ("mu=0.1 growth=1.5",)}
    monkeypatch.setattr(first_epoch, "METHODS", settings)
    seen: list[int] = []
    module = first_epoch.offline_module

    def recorded(*arguments: Any) -> Any:
        made = module(*arguments)
        begin = made.begin
        monkeypatch.setattr(made, "begin", lambda x, y: seen.append(len(x)) or begin(x, y))
        return made

    monkeypatch.setattr(first_epoch, "offline_module", recorded)
    results = root / "offline.csv"
    for phase in ("tune", "final"):
        script("first_epoch", phase, "--root", root, "--small", "--results", results, "--methods", *settings)
    assert seen == [400, 400, 200, 200, 600, 600]
    whole = results.read_text()
    assert all(float(line.split(",")[-1]) > 0.2 for line in lines(results))
    results.write_text("\n".join([*whole.splitlines()[:-1], ""]))  # MAC's last mark
    script("first_epoch", "final", "--root", root, "--small", "--results", results, "--methods", *settings)
    assert seen[6:] == [600]
    assert results.read_text() == whole


def test_a_synthetic_stream_in_one_pass(
    script: Callable[..., Any], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an accuracy above the best possible one, and a pass that is not judged at its end."""
    higgs = importlib.import_module("higgs")
    monkeypatch.setattr(higgs, "TUNE_ROWS", 20_000)
    monkeypatch.setattr(higgs.Synthetic, "rows", 40_000)
    for phase in ("tune", "final"):
        script("higgs", phase, "--small", "--results", root / "higgs.csv")
    found = [line.split(",") for line in lines(root / "higgs.csv") if ",final," in line]
    bound = {float(line[-1]) for line in found if line[2] == "best possible"}
    assert len(bound) == 1
    assert {line[5] for line in found} == {"2000", "4000"}
    assert {line[2] for line in found} == {"best possible", *METHODS}
    assert all(0.5 < float(line[-1]) <= max(bound) for line in found)


def test_processes_find_what_one_finds(script: Callable[..., Any], root: Path) -> None:
    """Catches an order of the batches that depends on the process, and rows that are lost on their way to it."""
    common = ("tune", "--root", root, "--small", "--methods", "SGD", "--results")
    script("first_epoch", *common, root / "here.csv")
    subprocess.run(
        [sys.executable, PAPER / "first_epoch.py", *common, root / "there.csv", "--workers", "2"],
        check=True,
        timeout=300,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(PAPER.parents[1])},
    )
    there = lines(root / "there.csv")  # of the script's own six rates
    assert len(there) == 6 * 3
    assert {line for line in lines(root / "here.csv") if ",0.02," in line} <= set(there)
