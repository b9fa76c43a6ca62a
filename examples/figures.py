"""Figures of results as SVG files: the same file from the same rows."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

matplotlib.use("svg")
from matplotlib import pyplot

__all__ = ["pyplot", "save"]


def save(figure: Figure, path: Path) -> None:
    """Write a file without a date, and with names that are the same every time."""
    with matplotlib.rc_context({"svg.hashsalt": "lightning_altmin"}):
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
