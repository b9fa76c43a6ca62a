"""Means of results over seeds, as the tables show them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from scipy import stats


def half_width(values: Sequence[float]) -> float:
    """Half the 95 % interval of the mean of two or more independent values, by Student's t."""
    quantile = float(stats.t.ppf(0.975, len(values) - 1))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def interval(values: Sequence[float], mean: str = ".2f", half: str = ".2f") -> str:
    """Mean and half a 95 % interval in these formats: the mean alone of one value, nothing of none."""
    shown = f"{statistics.mean(values):{mean}}" if values else ""
    return f"{shown} ± {half_width(values):{half}}" if len(values) > 1 else shown
