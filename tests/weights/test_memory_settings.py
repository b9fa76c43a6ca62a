"""What a memory refuses, and how it says so."""

from __future__ import annotations

import math
from typing import Any

import pytest
from torch import nn

from lightning_altmin import AltMin, AltMinObjective, CoactivationMemory, LayerwiseWeights, LocalGradient
from tests.weights.problems import batch, mlp

BAD: list[tuple[dict[str, Any], str]] = [
    ({"form": "other"}, "form must be 'innovation' or 'solve', got 'other'"),
    ({"solver": "bcd"}, "solver='bcd' belongs to form='solve', got form='innovation'"),
    ({"form": "solve", "solver": "qr"}, "solver must be 'cholesky' or 'bcd', got 'qr'"),
    ({"lambda_w": 0.1}, "lambda_w=0.1 belongs to form='solve', got form='innovation'"),
    ({"form": "solve", "lambda_w": 0.1}, "lambda_w=0.1 belongs to solver='bcd'"),
    ({"form": "solve", "solver": "bcd", "ridge": 0.1}, "ridge belongs to solver='cholesky'"),
    ({"form": "solve", "step": 0.1}, "step=0.1 belongs to form='innovation', got form='solve'"),
    ({"form": "solve", "ridge": -1.0}, "ridge must lie in"),
    ({"ridge": 0.0}, r"ridge must lie in \[0.1, 10\], got 0.0"),
    ({"step": 0.0}, r"step must lie in \(0, 1\], got 0.0"),
    ({"step": float("nan")}, "step must lie in"),
    ({"forgetting": 0.0}, r"forgetting must lie in \(0, 1\], got 0.0"),
    ({"every": 0}, "every must be an integer >= 1, got 0"),
    ({"limit": 0.0}, "limit must be a positive number, or math.inf for no bound, got 0.0"),
    ({"positions": "sum"}, "positions must be 'root' or 'mean', got 'sum'"),
    ({"rank": -1}, "rank must be an integer >= 0, got -1"),
    ({"rank": 2.5}, "rank must be an integer >= 0, got 2.5"),
    ({"form": "solve", "rank": 5}, "rank=5 belongs to form='innovation', got form='solve'"),
    ({"form": "solve", "limit": 0.2}, "limit=0.2 belongs to form='innovation', got form='solve'"),
    ({"form": "solve", "positions": "mean"}, "positions='mean' belongs to form='innovation', got form='solve'"),
    ({"window": 2}, "window=2 belongs to form='solve', got form='innovation'"),
    ({"form": "solve", "window": 0}, "window must be an integer >= 1, got 0"),
    ({"storage": "single"}, "storage='single' belongs to form='solve', got form='innovation'"),
    ({"form": "solve", "storage": "half"}, "storage must be 'full', 'triangle' or 'single', got 'half'"),
    ({"form": "solve", "storage": "single", "window": 2}, "storage='single' keeps one sum, and window=2 one per task"),
    (
        {"form": "solve", "storage": "single", "ridge": 1e-5},
        "ridge=1e-05 lets that rounding through; give a ridge >= 1e-4",
    ),
    ({"inputs": "both"}, "inputs must be 'moved' or 'forward', got 'both'"),
]


@pytest.mark.parametrize(("settings", "message"), BAD, ids=[str(s) for s, _ in BAD])
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    """Catches a setting out of its range, or of the other form, that would be silently ignored."""
    with pytest.raises(ValueError, match=message):
        CoactivationMemory(**settings)


def test_the_whole_of_the_contract_can_be_given() -> None:
    """Catches a setting of both forms that one of them refuses, and neutral values taken for settings."""
    both: dict[str, Any] = {"solver": "cholesky", "ridge": 0.5, "forgetting": 0.9, "every": 3, "lambda_w": 0.0}
    CoactivationMemory(form="innovation", step=0.5, limit=math.inf, rank=4, positions="mean", **both)
    CoactivationMemory(form="solve", window=2, **both)
    CoactivationMemory(form="solve", storage="triangle", **both)
    CoactivationMemory(form="solve", solver="bcd", lambda_w=0.1, forgetting=0.9, every=3)


def test_layers_it_cannot_serve_are_refused() -> None:
    """Catches a grouped convolution solved as if it had one matrix, and blocks that least squares cannot see into."""
    grouped = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(ValueError, match=r"stage '0' has groups=2; .*LayerwiseWeights"):
        AltMin(grouped, nn.CrossEntropyLoss(), weights=CoactivationMemory())
    embedded = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    with pytest.raises(ValueError, match="stage '0' has Embedding"):
        AltMin(embedded, nn.CrossEntropyLoss(), weights=CoactivationMemory())
    AltMin(
        embedded,
        nn.CrossEntropyLoss(),
        weights=LayerwiseWeights({"0": LocalGradient(), "default": CoactivationMemory()}),
    )  # the way out that the message names


def test_other_misuse_is_refused() -> None:
    """Catches compilation of a solver with a memory, a memory shared by two models, and an l1 term that is dropped."""
    with pytest.raises(ValueError, match="cannot hold what CoactivationMemory keeps"):
        AltMin(mlp(), nn.CrossEntropyLoss(), weights=CoactivationMemory(), compile=True)
    shared = CoactivationMemory()
    AltMin(mlp(), nn.CrossEntropyLoss(), weights=shared)
    with pytest.raises(ValueError, match="belongs to another model"):
        AltMin(mlp(), nn.CrossEntropyLoss(), weights=shared)
    core = AltMin(mlp(), nn.CrossEntropyLoss(), AltMinObjective(lambda_w=0.1), weights=CoactivationMemory())
    with pytest.raises(ValueError, match=r"lambda_w=0.1, which a memory does not follow"):
        core.step(*batch(core.network))
    with pytest.raises(ValueError, match="keeps no targets to solve for"):
        shared.solve()
