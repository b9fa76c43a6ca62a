"""Accuracy by how much a method has seen: the rows that the paper's experiments keep, their choice, table and plot."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for figures, intervals, rows
from figures import pyplot, save
from intervals import interval
from rows import append, markdown, read
from workers import results

Run = tuple[str, str, str, str, int]
"""Suite (network and data), phase, method, its setting, seed."""


@dataclass(frozen=True)
class Row:
    """The accuracy of one run after it has seen so much, in the unit of its script; 0 once it has diverged."""

    suite: str
    phase: str
    method: str
    setting: str
    seed: int
    seen: int
    accuracy: float = math.nan

    @property
    def run(self) -> Run:
        return self.suite, self.phase, self.method, self.setting, self.seed


def unfinished(runs: Iterable[Run], rows: Iterable[Row]) -> list[Run]:
    """The runs that have no rows yet."""
    done = {row.run for row in rows}
    return [run for run in runs if run not in done]


def record(path: Path, found: Sequence[Row]) -> None:
    """Add a finished run to the file, and say so."""
    append(path, found)
    print(*found[0].run, *(f"{row.seen}: {100 * row.accuracy:.2f}" for row in found), flush=True)


def execute(
    runs: Sequence[Run], train: Callable[[Run], list[Row]], path: Path, workers: int, at: int | None = None
) -> None:
    """Train what has no rows yet, and record every run when it is finished.

    Args:
        runs: All that are wanted.
        train: Gives a run's rows. What it has loaded before, the processes share.
        path: The file of rows.
        workers: How many processes train; 1 for none but this one.
        at: Only a row with so much seen makes a run finished; ``None`` for any.
    """
    left = unfinished(runs, (row for row in read(path, Row) if at in (None, row.seen)))
    for found in results(train, left, workers):
        record(path, found)


def best(rows: Iterable[Row], suite: str, method: str) -> str:
    """The setting with the highest mean accuracy over the tuning rows that are given.

    Raises:
        SystemExit: If there are none.
    """
    tuned = [r for r in rows if (r.suite, r.phase, r.method) == (suite, "tune", method)]
    if not tuned:
        raise SystemExit(f"no tuning runs of {method} on {suite}: run `tune` first")
    settings = dict.fromkeys(r.setting for r in tuned)
    return max(settings, key=lambda s: statistics.mean(r.accuracy for r in tuned if r.setting == s))


def final_rows(rows: Iterable[Row]) -> dict[str, dict[str, list[Row]]]:
    """By suite, in the order in which they were run, and method, in that of the alphabet."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        if row.phase == "final":
            found.setdefault(row.suite, {}).setdefault(row.method, []).append(row)
    return {suite: dict(sorted(mine.items(), key=lambda m: m[0].lower())) for suite, mine in found.items()}


def table(rows: Iterable[Row], unit: str, shown: Collection[int] = ()) -> str:
    """Means over seeds with 95 % intervals (t distribution), a column for each amount seen that is to be shown.

    Where fewer seeds have been run so far than elsewhere, their number is beside the mean.

    Args:
        rows: Of all phases; the final ones are shown.
        unit: What ``seen`` counts, with the number in the place of ``{}``.
        shown: These amounts, as far as there are any; all, if empty.
    """
    parts = []
    for suite, methods in final_rows(rows).items():
        amounts = sorted({row.seen for mine in methods.values() for row in mine})
        amounts = [amount for amount in amounts if amount in shown] or amounts
        lines = []
        for method, mine in methods.items():
            seeds = len({r.seed for r in mine})
            found = [[100 * r.accuracy for r in mine if r.seen == amount] for amount in amounts]
            fewer = [f" (of {len(values)})" if 0 < len(values) < seeds else "" for values in found]
            cells = [interval(values) + note for values, note in zip(found, fewer, strict=True)]
            lines.append((method, mine[0].setting, seeds, *cells))
        heads = ["method", "setting", "seeds", *(unit.format(f"{amount:,}") for amount in amounts)]
        parts += [f"{suite}:", markdown(heads, lines)]
    return "\n\n".join(parts)


def plot(rows: Iterable[Row], path: Path, label: str, errors: bool = False, squares: Collection[str] = ()) -> None:
    """Means over seeds, a panel for each suite.

    Args:
        rows: Of all phases; the final ones are drawn.
        path: The SVG file.
        label: Of the horizontal axis.
        errors: Whether errors are drawn, on a logarithmic scale, and not accuracies.
        squares: Methods drawn with squares and dashes.
    """
    suites = final_rows(rows)
    figure, axes = pyplot.subplots(1, len(suites), figsize=(4.7 * len(suites), 3.5), squeeze=False)
    for axis, (suite, methods) in zip(axes[0], suites.items(), strict=True):
        for method, mine in methods.items():
            amounts = sorted({row.seen for row in mine})
            means = [statistics.mean(100 * r.accuracy for r in mine if r.seen == amount) for amount in amounts]
            values = [100 - mean for mean in means] if errors else means
            style = "s--" if method in squares else "o-"
            axis.plot(amounts, values, style, markersize=3, linewidth=1, label=method)
        axis.set(title=suite, xlabel=label, xscale="log", yscale="log" if errors else "linear")
    axes[0][0].set(ylabel="test error, %" if errors else "test accuracy, %")
    axes[0][0].legend(fontsize="x-small", loc="best")
    figure.tight_layout()
    save(figure, path)
