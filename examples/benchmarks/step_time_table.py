"""The table of docs/speed.md: rows of step_time.py, and the accuracies of the same settings with 95 % intervals."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for intervals and rows
from intervals import interval
from rows import markdown, read_values

RESULTS = Path(__file__).parent.parent.parent / "docs" / "results"
HEADER = (
    "network",
    "threads",
    "precision",
    "method",
    "core ms",
    "core ratio",
    "Trainer ratio",
    "multiply-adds ratio",
    "peak MB",
    "of matmul bound",
    "accuracy, 1 epoch",
    "accuracy, tuned",
)
_SAME = {
    f"{method}, {how}": method
    for method in ("backprop", "1 code step", "5 code steps")
    for how in ("compiled", "CUDA graphs")
}
"""Methods that compute the same as another."""
_TUNED = {"backprop": "backprop", "1 code step": "AltMin"}
"""Methods as accuracy.csv calls them."""


def accuracies() -> dict[tuple[str, str, str], str]:
    """Test accuracy in % by network, precision and method, after an epoch at the timed rate."""
    found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for row in read_values(RESULTS / "step_time_accuracy.csv"):
        found[row["network"], row["precision"], row["method"]].append(100 * float(row["accuracy"]))
    return {key: interval(values) for key, values in found.items()}


def tuned_accuracies() -> dict[tuple[str, str], str]:
    """Test accuracy in % by network and method, after the longest tuned run there is."""
    found: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in read_values(RESULTS / "accuracy.csv"):
        if row["phase"] == "final":
            found[row["network"], row["method"]][int(row["epochs"])].append(100 * float(row["accuracy"]))
    result = {}
    for key, by_epochs in found.items():
        epochs = max(by_epochs)
        result[key] = f"{interval(by_epochs[epochs])} ({epochs} epochs)"
    return result


def table(rows: list[dict[str, Any]], nets: list[str], methods: list[str]) -> str:
    """The rows as Markdown: a line per network and method, ratios to backprop."""
    by_key = {(r["net"], r["precision"], -r["threads"], r["method"], r["level"]): r for r in rows}
    settings = {key[:4] for key in by_key}
    order = sorted(settings, key=lambda k: (k[1] != "fp32", k[2], nets.index(k[0]), methods.index(k[3])))
    reached, tuned = accuracies(), tuned_accuracies()
    lines: list[tuple[object, ...]] = []
    for net, precision, threads, method in order:
        core, trainer = (by_key.get((net, precision, threads, method, level), {}) for level in ("core", "trainer"))
        any_row = core or trainer
        base = by_key.get((net, precision, threads, "backprop", "core" if core else "trainer"), {})
        work = any_row.get("million_multiply_adds")
        same = _SAME.get(method, method)
        cells = (
            net,
            -threads,
            precision,
            method,
            f"{core['ms']:.2f}" if core else "",
            f"{core['ratio']:.2f} ({core['ratio_range'][0]:.2f} to {core['ratio_range'][1]:.2f})" if core else "",
            f"{trainer['ratio']:.2f}" if trainer else "",
            "" if work is None else f"{work / base['million_multiply_adds']:.2f}",
            "" if "peak_mb" not in any_row else f"{any_row['peak_mb']:.2f}",
            "" if "matmul_bound" not in core else f"{100 * core['matmul_bound']:.0f} %",
            reached.get((net, precision, same), ""),
            tuned.get((net, _TUNED.get(same, "")), "") if precision == "fp32" else "",
        )
        lines.append(cells)
    return markdown(HEADER, lines)
