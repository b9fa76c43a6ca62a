"""The tables of the documentation, from the rows that ``benchmark.py`` wrote, and accuracy against bytes as a figure.

python examples/continual/report.py --rows docs/results/continual.csv --figure docs/results/continual_bytes.png
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for intervals and rows
from benchmark import described, tuned
from intervals import interval
from rows import markdown, read_values

Rows = dict[str, list[dict[str, str]]]

TITLES = {
    "split_mnist": "Split-MNIST, class-incremental",
    "split_mnist_64": "Split-MNIST, class-incremental, twice as many filters",
    "domain_mnist": "Split-MNIST, domain-incremental",
    "split_cifar10": "Split-CIFAR-10, class-incremental, on frozen random features",
    "permuted_mnist": "Permuted-MNIST, ten tasks of 6000 samples",
    "bytes": "Split-MNIST by bytes of state, beside the rows above",
}


def per_cent(rows: list[dict[str, str]], column: str) -> str:
    """Mean over seeds with its 95 % interval."""
    return interval([100 * float(row[column]) for row in rows if row[column]]) or "-"


def table(methods: Rows) -> str:
    """One row per method, best first."""
    lines = []
    for method in sorted(methods, key=lambda m: -statistics.mean(float(row["accuracy"]) for row in methods[m])):
        rows = methods[method]
        state = statistics.mean(float(row["state_bytes"]) for row in rows)
        seconds = statistics.mean(float(row["seconds"]) for row in rows)
        cells = [per_cent(rows, column) for column in ("accuracy", "task_incremental", "forgetting")]
        lines.append((method, *cells, "-" if state == 0 else f"{state / 1e6:.2f} MB", f"{seconds:.0f}", len(rows)))
    columns = ("Method", "Average accuracy", "Task told", "Forgetting", "State", "CPU seconds", "Seeds")
    return markdown(columns, lines)


def figure(found: dict[str, Rows], path: Path) -> None:
    """Accuracy on Split-MNIST against bytes of state, for AM-mem and replay."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(6, 3.6), layout="constrained")
    axes = drawing.subplots()
    for kind, marker in (("AM-mem", "o"), ("replay", "s")):
        points = []
        for suite in ("split_mnist", "bytes", *(["split_mnist_64"] if kind == "AM-mem" else [])):
            for method, rows in found.get(suite, {}).items():
                if method.startswith(kind) and not any(other in method for other in ("joint", "learnt", "innovation")):
                    mean = statistics.mean(100 * float(row["accuracy"]) for row in rows)
                    points.append((float(rows[0]["state_bytes"]), mean))
        points.sort()
        axes.plot([x for x, _ in points], [y for _, y in points], marker=marker, label=kind)
    axes.set_xscale("log")
    axes.set_xlabel("bytes of state")
    axes.set_ylabel("average accuracy, %")
    axes.legend()
    drawing.savefig(path, dpi=120)


def suites(path: Path, tuning: Path) -> dict[str, Rows]:
    """The rows of each suite and method; of a method that was tuned anew, those with the settings that are best now."""
    found: dict[str, Rows] = defaultdict(lambda: defaultdict(list))
    for row in read_values(path):
        found[row["suite"]][row["method"]].append(row)
    for suite, methods in found.items():
        for method, rows in methods.items():
            if suite != "bytes":
                chosen = described(tuned(tuning, suite, method))
                methods[method] = [row for row in rows if row["settings"] == chosen]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=Path("docs/results/continual.csv"))
    parser.add_argument("--tuning", type=Path, default=Path("docs/results/continual_tuning.csv"))
    parser.add_argument("--figure", type=Path, help="where to draw accuracy against bytes")
    arguments = parser.parse_args()
    found = suites(arguments.rows, arguments.tuning)
    for suite, methods in found.items():
        print(f"**{TITLES[suite]}**\n\n{table(methods)}\n")
    if arguments.figure is not None:
        figure(found, arguments.figure)


if __name__ == "__main__":
    main()
