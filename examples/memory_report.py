"""The tables and the figure of the documentation's page on memories, from the rows that ``memory.py`` wrote.

python examples/memory_report.py --figure docs/results/memory.svg
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path

from figures import pyplot, save
from intervals import half_width, interval
from memory import DEFAULT, MEMORY, RATES, RESULTS, SUITES, Row, best
from rows import markdown, read


def curves(rows: list[Row], suite: str, method: str) -> dict[int, dict[int, float]]:
    """Final accuracies in percent by number of batches and seed, backprop at its best rate for that number."""
    found: dict[int, dict[int, float]] = {}
    for mark in SUITES[suite].marks:
        setting = DEFAULT if method == MEMORY else best(rows, suite, method, mark)
        found[mark] = {
            r.seed: 100 * r.accuracy
            for r in rows
            if (r.suite, r.phase, r.method, r.setting, r.batches) == (suite, "final", method, setting, mark)
        }
    return found


def suites(rows: list[Row], phase: str) -> list[str]:
    """Those that have rows, in the order of `SUITES`."""
    return [name for name in SUITES if any((r.suite, r.phase) == (name, phase) for r in rows)]


def difference(ours: dict[int, float], theirs: dict[int, float]) -> str:
    """The mean difference, paired by seed, with its 95 % interval (t distribution)."""
    return interval([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())], "+.2f")


def finals(rows: list[Row]) -> str:
    """AM-mem beside backprop on the test set: means over seeds and paired differences, with 95 % intervals."""
    lines = []
    for suite in suites(rows, "final"):
        ours = curves(rows, suite, MEMORY)
        for mark in SUITES[suite].marks:
            cells = [suite, mark, interval(list(ours[mark].values()))]
            for method in RATES:
                theirs = curves(rows, suite, method)[mark]
                rate = best(rows, suite, method, mark)
                cells += [f"{interval(list(theirs.values()))} ({rate})", difference(ours[mark], theirs)]
            lines.append(cells)
    columns = ("network", "batches", "AM-mem %", "Adam % (rate)", "AM-mem - Adam", "SGD % (rate)", "AM-mem - SGD")
    return markdown(columns, lines)


def sweeps(rows: list[Row]) -> str:
    """The extremes of the settings' range after each number of batches, and how many runs diverged."""
    lines = []
    for suite in suites(rows, "sweep"):
        for mark in SUITES[suite].marks:
            swept = [r for r in rows if (r.suite, r.phase, r.batches) == (suite, "sweep", mark)]
            swept.sort(key=lambda row: row.accuracy)
            ends = [f"{100 * r.accuracy:.2f} ({r.setting})" for r in (swept[0], swept[-1])]
            default = [f"{100 * r.accuracy:.2f}" for r in swept if r.setting == DEFAULT]
            diverged = sum(math.isnan(r.loss) for r in swept)
            lines.append((suite, mark, len(swept), diverged, *ends, *(default or ["-"])))
    columns = ("network", "batches", "settings", "diverged", "worst % (setting)", "best % (setting)", "default %")
    return markdown(columns, lines)


def studies(rows: list[Row]) -> str:
    """Parts replaced: means over seeds with 95 % intervals, after each number of batches."""
    lines = []
    for suite, setting in sorted({(r.suite, r.setting) for r in rows if r.phase == "study"}):
        studied = [r for r in rows if (r.suite, r.phase, r.setting) == (suite, "study", setting)]
        at = {mark: [100 * r.accuracy for r in studied if r.batches == mark] for mark in SUITES[suite].marks}
        cells = [f"{mark}: {interval(values) if any(values) else 'diverged'}" for mark, values in at.items()]
        seeds = len({r.seed for r in studied})
        lines.append((suite, setting or "default", seeds, "; ".join(cells)))
    return markdown(("network", "setting", "seeds", "accuracy % after batches"), lines)


def plot(rows: list[Row], path: Path) -> None:
    shown = suites(rows, "final")
    figure, axes = pyplot.subplots(1, len(shown), figsize=(4 * len(shown), 3.2), squeeze=False)
    for axis, suite in zip(axes[0], shown, strict=True):
        for method in (MEMORY, *RATES):
            found = curves(rows, suite, method)
            means = [statistics.mean(found[mark].values()) for mark in found]
            halves = [half_width(list(found[mark].values())) for mark in found]
            label = "AM-mem, default settings" if method == MEMORY else f"backprop, {method}, best rate at each point"
            axis.errorbar(range(len(found)), means, halves, marker="o", capsize=3, label=label)
        axis.set_xticks(range(len(SUITES[suite].marks)), [str(mark) for mark in SUITES[suite].marks])
        axis.set(title=suite, xlabel="mini-batches")
    axes[0][0].set_ylabel("test accuracy, %")
    axes[0][0].legend(fontsize="x-small", loc="lower right")
    figure.tight_layout()
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    rows = read(arguments.results, Row)
    print("\n\n".join([finals(rows), sweeps(rows), studies(rows)]))
    if arguments.figure:
        plot(rows, arguments.figure)


if __name__ == "__main__":
    main()
