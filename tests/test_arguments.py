"""Numbers in constructors: counts, rates, shares and prices that cannot be meant."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_altmin import (
    AltMinModule,
    AltMinObjective,
    BackpropModule,
    CoactivationMemory,
    CurvatureCodes,
    DiscreteCodes,
    GradientCodes,
    LeastSquaresCodes,
    LineSearchCodes,
    LocalGradient,
    ProximalCodes,
)
from lightning_altmin.arguments import check_count, check_number
from lightning_altmin.baselines import ADMMModule, BCDModule, MACModule
from lightning_altmin.callbacks import CodeMonitor, MuSchedule
from lightning_altmin.continual import Replay, ReservoirBuffer, TaskStream, fuzzy, split_classes
from lightning_altmin.continual.callbacks import (
    ContinualEvaluation,
    MemoryPolicy,
    OnlineEWC,
    OrthogonalWeights,
    PrequentialAccuracy,
    SynapticIntelligence,
    TaskCheckpoint,
    TaskEarlyStopping,
    TaskLearningRates,
)
from lightning_altmin.continual.metrics import stability_gap
from lightning_altmin.data import CSVDataModule, DigitsDataModule
from lightning_altmin.nn import HardThreshold, Heaviside, Quantise, Staircase
from lightning_altmin.weights import ProximalSGD
from lightning_altmin.weights.limited_descent import LimitedDescent


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def altmin(**settings: Any) -> AltMinModule:
    return AltMinModule(network(), **settings)


def backprop(**settings: Any) -> BackpropModule:
    return BackpropModule(network(), **settings)


def limited(**settings: Any) -> LimitedDescent:
    return LimitedDescent([torch.zeros(2)], **settings)


def proximal_sgd(**settings: Any) -> ProximalSGD:
    return ProximalSGD([torch.zeros(2)], lr=0.1, **settings)


def offline(kind: Any) -> Any:
    def make(**settings: Any) -> Any:
        return kind(network(), **settings)

    make.__name__ = kind.__name__
    return make


def csv(**settings: Any) -> CSVDataModule:
    return CSVDataModule("rows.csv", **settings)


def checkpoint(**settings: Any) -> TaskCheckpoint:
    return TaskCheckpoint("folder", **settings)


def replay(**settings: Any) -> Replay:
    return Replay(ReservoirBuffer(9), **settings)


def gap(**settings: Any) -> torch.Tensor:
    return stability_gap([[0.5, 0.0], [0.4, 0.5]], [0, 1], **settings)


COUNTS: list[tuple[Any, dict[str, Any], str]] = [
    (CoactivationMemory, {}, "rank"),
    (CoactivationMemory, {}, "every"),
    (CoactivationMemory, {"form": "solve"}, "window"),
    (LocalGradient, {}, "steps"),
    (GradientCodes, {}, "steps"),
    (ProximalCodes, {}, "steps"),
    (LineSearchCodes, {}, "steps"),
    (CurvatureCodes, {}, "steps"),
    (CurvatureCodes, {}, "every"),
    (DiscreteCodes, {}, "flips"),
    (DiscreteCodes, {}, "rounds"),
    (altmin, {}, "lr_frequency"),
    (backprop, {}, "lr_frequency"),
    (altmin, {}, "accumulate_batches"),
    (offline(ADMMModule), {}, "warm_start"),
    (offline(MACModule), {}, "every"),
    (ContinualEvaluation, {}, "every_n_batches"),
    (checkpoint, {}, "every_n_batches"),
    (PrequentialAccuracy, {}, "log_every_n_batches"),
    (TaskEarlyStopping, {}, "patience"),
    (OnlineEWC, {}, "samples"),
    (OrthogonalWeights, {}, "samples"),
    (replay, {}, "samples"),
    (gap, {}, "window"),
    (csv, {}, "chunk_rows"),
    (csv, {}, "shuffle_buffer"),
    (DigitsDataModule, {}, "val_split"),
]


@pytest.mark.parametrize(("make", "settings", "name"), COUNTS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_true_is_no_number_of_anything(make: Any, settings: dict[str, Any], name: str) -> None:
    """Catches a switch given for a number: to Python, True is the integer 1, which all of these allow."""
    make(**settings, **{name: 1})
    for value in (True, 2.5, "1", [1]):
        with pytest.raises(ValueError, match=rf"^{name} must .*integer.*, got {re.escape(repr(value))}"):
            make(**settings, **{name: value})


def blurred(**settings: Any) -> TaskStream:
    samples = torch.zeros(4, 3), torch.tensor([0, 0, 1, 1])
    return fuzzy(split_classes(samples, samples, 2), **settings)


NUMBERS: list[tuple[Any, dict[str, Any], str, float]] = [
    (AltMinObjective, {}, "mu", 1),
    (AltMinObjective, {}, "lambda_c", 0),
    (AltMinObjective, {}, "lambda_w", 1),
    (AltMinObjective.reference, {}, "mu", 1),
    (GradientCodes, {}, "lr", 1),
    (GradientCodes, {}, "momentum", 0),
    (GradientCodes, {}, "tol", 0.5),
    (ProximalCodes, {}, "lr", 1),
    (LineSearchCodes, {}, "relaxation", 1),
    (CurvatureCodes, {}, "share", 1),
    (LeastSquaresCodes, {}, "damping", 1),
    (LeastSquaresCodes, {}, "weight", 1),
    (DiscreteCodes, {}, "margin", 1),
    (CoactivationMemory, {}, "ridge", 1),
    (CoactivationMemory, {}, "forgetting", 1),
    (CoactivationMemory, {}, "step", 1),
    (CoactivationMemory, {}, "limit", 1),
    (CoactivationMemory, {"form": "solve"}, "ridge", 1),
    (CoactivationMemory, {"form": "solve", "storage": "single"}, "ridge", 1),
    (CoactivationMemory, {"form": "solve", "solver": "bcd"}, "lambda_w", 1),
    (limited, {}, "lr", 1),
    (limited, {"lr": 1.0}, "limit", 1),
    (proximal_sgd, {}, "lambda_w", 1),
    (altmin, {}, "gradient_clip_norm", 1),
    (CodeMonitor, {}, "dead_slope", 1),
    (offline(ADMMModule), {}, "beta", 1),
    (offline(ADMMModule), {}, "gamma", 1),
    (offline(ADMMModule), {}, "ridge", 1),
    (offline(BCDModule), {}, "rho", 1),
    (offline(MACModule), {}, "mu", 1),
    (offline(MACModule), {}, "growth", 1),
    (OnlineEWC, {}, "strength", 1),
    (OnlineEWC, {}, "gamma", 1),
    (TaskEarlyStopping, {}, "min_delta", 1),
    (TaskLearningRates, {}, "factor", 1),
    (SynapticIntelligence, {}, "damping", 1),
    (OrthogonalWeights, {}, "ridge", 1),
    (MemoryPolicy, {}, "factor", 0.5),
    (blurred, {}, "mix", 0),
    (MuSchedule, {}, "add", 1),
    (MuSchedule, {}, "multiply", 1),
    (MuSchedule, {}, "maximum", 1),
    (Staircase, {"rise": 1.0, "first": 0.0}, "low", 1),
    (Staircase, {"low": 0.0, "first": 0.0}, "rise", 1),
    (Staircase, {"low": 0.0, "rise": 1.0}, "first", 1),
    (Staircase, {"low": 0.0, "rise": 1.0, "first": 0.0}, "gap", 1),
    (Heaviside, {}, "threshold", 1),
    (HardThreshold, {}, "threshold", 1),
    (Quantise, {}, "low", 0),
    (Quantise, {}, "high", 1),
]
OPTIONAL = {"tol", "gradient_clip_norm", "maximum"}  # None has a meaning, as in all of a memory's settings


@pytest.mark.parametrize(
    ("make", "settings", "name", "good"), NUMBERS, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_what_is_no_number_is_refused_by_name(make: Any, settings: dict[str, Any], name: str, good: float) -> None:
    """Catches a bare TypeError without the argument's name, and a switch, NaN or a tensor that trains.

    Each of the values refused is ``good``, which is accepted, in other clothes, or no number at all.
    """
    make(**settings, **{name: good})
    make(**settings, **{name: np.float32(good)})  # as a sweep over np.linspace gives them
    wrong: list[Any] = [bool(good), str(good), [good], torch.tensor(float(good)), math.nan]
    if name not in OPTIONAL and make is not CoactivationMemory:
        wrong.append(None)
    for value in wrong:
        with pytest.raises(ValueError, match=rf"^{name} must .*got {re.escape(repr(value))}"):
            make(**settings, **{name: value})


INTERVALS: list[tuple[dict[str, float], list[float], list[float], str]] = [
    ({}, [-1e300, 0, 1e300], [], "be a finite number"),
    ({"above": 0}, [5e-324, 1], [0, -1], "be a positive number"),
    ({"above": 2}, [2.5], [2, -3], "be a number > 2"),
    ({"least": 0}, [0, 1], [-5e-324], "be a number >= 0"),
    ({"above": 0, "below": 1}, [0.5], [0, 1], "lie in (0, 1)"),
    ({"above": 0, "most": 1}, [0.5, 1], [0, 1.5], "lie in (0, 1]"),
    ({"least": 0, "below": 1}, [0, 0.5], [-0.5, 1], "lie in [0, 1)"),
    ({"least": 0.1, "most": 10}, [0.1, 10], [0, 11], "lie in [0.1, 10]"),
    ({"below": 1}, [0.5, -9], [1, 2], "lie in (-inf, 1)"),
]


@pytest.mark.parametrize(("bounds", "inside", "outside", "rule"), INTERVALS, ids=lambda value: str(value))
def test_ends_of_intervals(bounds: dict[str, float], inside: list[float], outside: list[float], rule: str) -> None:
    """Catches an end that belongs to the interval in the message and not in the check, or the other way about."""
    for value in inside:
        check_number("x", value, **bounds)
    for value in (*outside, math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=re.escape(f"x must {rule}, or None for all, got {value!r}")):
            check_number("x", value, otherwise="None for all", **bounds)


def test_real_numbers_of_any_kind_count() -> None:
    """Catches a refusal, or an OverflowError, where a number is not a float: all of these are positive."""
    for value in (1, 10**400, Fraction(1, 3), np.float32(0.1), np.float64(0.1), np.int64(1)):
        check_number("x", value, above=0)
    with pytest.raises(ValueError, match=r"x must be a positive number, got \(1\+0j\) of type complex"):
        check_number("x", 1 + 0j, above=0)


def test_counts_with_a_largest() -> None:
    """Catches an end of the range that is refused, and one beyond it that is not."""
    for bits in (2, 16):
        check_count("bits", bits, 2, 16)
    for bad in (1, 17, 2.0, None):
        with pytest.raises(ValueError, match=f"bits must be an integer from 2 to 16, or so, got {bad}$"):
            check_count("bits", bad, 2, 16, otherwise="so")
