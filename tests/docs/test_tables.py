"""The means, intervals and tables that the scripts in examples/ print for the documentation."""

from __future__ import annotations

import csv
import importlib
import json
import math
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def _examples(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (EXAMPLES / "continual", EXAMPLES / "paper", EXAMPLES / "benchmarks", EXAMPLES):
        monkeypatch.syspath_prepend(folder)


@pytest.fixture
def page() -> ModuleType:
    """``examples/benchmark_page.py``."""
    return importlib.import_module("benchmark_page")


@pytest.mark.parametrize(
    ("values", "quantile", "deviation"),
    [
        ([1.0, 3.0], math.tan(0.475 * math.pi), math.sqrt(2)),  # one degree of freedom: Cauchy
        ([1.0, 2.0, 3.0], 0.95 * math.sqrt(2 / (1 - 0.95**2)), 1.0),  # two: F(t) = 1/2 + t / (2 sqrt(2 + t^2))
    ],
)
def test_half_an_interval_is_that_of_students_t(values: list[float], quantile: float, deviation: float) -> None:
    """Catches wrong degrees of freedom, a one-sided quantile and the population's deviation."""
    half = importlib.import_module("intervals").half_width(values)
    assert half == pytest.approx(quantile * deviation / math.sqrt(len(values)), rel=1e-9)


def test_one_value_has_no_interval_and_none_no_mean() -> None:
    """Catches a deviation of one value, which does not exist, shown as a number."""
    intervals = importlib.import_module("intervals")
    assert [intervals.interval([2.0]), intervals.interval([])] == ["2.00", ""]
    assert intervals.interval([1.0, 2.0, 3.0], "+.1f") == "+2.0 ± 2.48"  # 4.3027 / sqrt(3)


def test_a_table_has_a_head_a_rule_and_a_line_per_row() -> None:
    """Catches a rule shorter than the head, which Markdown does not take for a table."""
    table = importlib.import_module("rows").markdown(("a", "b"), [(1, ""), ("x", 0.5)])
    assert table == "| a | b |\n| --- | --- |\n| 1 |  |\n| x | 0.5 |"


def test_tuning_alone_is_not_shown_as_measured(
    page: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an empty section that claims to be measured."""
    first_epoch = importlib.import_module("first_epoch")
    with (tmp_path / "first_epoch.csv").open("w", newline="") as file:
        row = asdict(first_epoch.Row("mlp_100", "tune", "Adam", "0.001", 100, 5, 0.5))
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerow(row)
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    assert page.page().count("Not measured yet") == len(page.SECTIONS)  # the other files are not there at all


def test_seconds_of_an_epoch_are_those_of_the_networks_own_batches(
    page: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches one batch size for all networks: the VGG-like one takes 64 images, so 60,000 are 937.5 steps. At 40 ms a
    step that is 37.5 s, by a method of ratio 2 it is 75 s; LeNet's 128 images make 468.75 steps of 40 ms, 18.75 s.
    """
    row = {"level": "core", "precision": "fp32", "threads": 2, "ms": 40.0}
    found = [("VGG-like", "backprop", 1.0), ("VGG-like", "5 code steps", 2.0), ("LeNet", "backprop", 1.0)]
    rows = [row | {"net": net, "method": method, "ratio": ratio} for net, method, ratio in found]
    (tmp_path / "step_time.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    lines = page.time_and_memory().splitlines()[2:]
    assert [line.split(" | ")[3] for line in lines] == ["37.50", "75.00", "18.75"]


def test_new_rows_have_the_columns_of_the_committed_files(tmp_path: Path) -> None:
    """Catches other columns or another order, a missing value that shifts those after it, and a second head."""
    rows, per_second = importlib.import_module("rows"), importlib.import_module("accuracy_per_second")
    values = {"suite": "bytes", "method": "new", "seed": 7, "accuracy": 0.25, "state_bytes": 3, "seconds": 1.0}
    accuracy = importlib.import_module("step_time_accuracy").Row("LeNet", "fp32", "new", 7, 0.25)
    for _ in range(2):
        importlib.import_module("benchmark").write(tmp_path / "continual.csv", values)
        rows.append(tmp_path / "step_time_accuracy.csv", [accuracy])
        rows.append(tmp_path / "accuracy_per_second.csv", [per_second.Row("2x100", "new", 7, 30, 1.5, 0.25)])
    for name, line in {
        "continual.csv": "bytes,new,,7,0.25,,,,3,1",
        "step_time_accuracy.csv": "LeNet,fp32,new,7,0.25",
        "accuracy_per_second.csv": "2x100,new,7,30,1.5,0.25",
    }.items():
        head = (EXAMPLES.parent / "docs" / "results" / name).read_text(encoding="utf-8").splitlines()[0]
        assert (tmp_path / name).read_text(encoding="utf-8") == f"{head}\n{line}\n{line}\n"


@pytest.mark.parametrize(
    ("page_name", "script"),
    [
        ("binary.md", "binary"),
        ("deep.md", "deep_networks"),
        ("results.md", "code_solvers"),
        ("sparse.md", "sparse"),
        ("speed.md", "accuracy_per_second"),
    ],
)
def test_pages_show_the_rows_that_are_committed(page_name: str, script: str) -> None:
    """Catches a page that was left behind when runs were added."""
    text = (EXAMPLES.parent / "docs" / page_name).read_text(encoding="utf-8")
    assert importlib.import_module(script).table() in text


def test_the_continual_page_shows_the_rows_that_are_committed() -> None:
    """Catches the same of the tables of the continual benchmark, one for each suite."""
    report = importlib.import_module("report")
    results = EXAMPLES.parent / "docs" / "results"
    found = report.suites(results / "continual.csv", results / "continual_tuning.csv")
    text = (EXAMPLES.parent / "docs" / "continual.md").read_text(encoding="utf-8")
    assert set(found) == set(report.TITLES)
    for methods in found.values():
        assert report.table(methods) in text


def test_the_readme_shows_rows_of_the_results() -> None:
    """Catches a line of the README's table that no longer is what the runs say."""
    accuracy = importlib.import_module("accuracy")
    known = accuracy.table(accuracy.RESULTS).splitlines()
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    shown = [line for line in readme.splitlines() if line.startswith("|")]
    assert len(shown) > 2
    assert set(shown) <= set(known)


def test_the_page_of_speed_shows_the_rows_that_are_committed() -> None:
    """Catches the same of the table of steps, which has its rows from several files."""
    step_time = importlib.import_module("step_time")
    rows = step_time.read(EXAMPLES.parent / "docs" / "results" / "step_time.json")
    text = (EXAMPLES.parent / "docs" / "speed.md").read_text(encoding="utf-8")
    assert step_time.table(rows, list(step_time.NETS), list(step_time.METHODS)) in text


@pytest.mark.parametrize("name", ["README.md", "docs/speed.md"])
def test_pages_say_what_a_step_costs_by_the_rows(page: ModuleType, name: str) -> None:
    """Catches ranges of one level given for the other, and older ones."""
    text = (EXAMPLES.parent / name).read_text(encoding="utf-8")
    assert page.step_costs() in " ".join(text.split())


def test_the_page_of_benchmarks_is_that_of_the_rows(page: ModuleType) -> None:
    """Catches the same of the page that a script writes."""
    assert (page.DOCS / "benchmarks.md").read_text(encoding="utf-8") == page.page()


def test_a_mean_of_fewer_seeds_says_so() -> None:
    """Catches a mark that an interrupted command has reached with one seed, shown as if it were of all."""
    curves = importlib.import_module("curves")
    rows = [curves.Row("s", "final", "SGD", "0.1", seed, 5, 0.5) for seed in (0, 1)]
    rows.append(curves.Row("s", "final", "SGD", "0.1", 0, 25, 0.75))
    line = curves.table(rows, "{} batches").splitlines()[-1]
    assert line == "| SGD | 0.1 | 2 | 50.00 ± 0.00 | 75.00 (of 1) |"
