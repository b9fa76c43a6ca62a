"""Numbers of steps, batches and the like in the constructors of solvers."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_altmin import (
    CoactivationMemory,
    CurvatureCodes,
    DiscreteCodes,
    GradientCodes,
    LineSearchCodes,
    LocalGradient,
    ProximalCodes,
)

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
]


@pytest.mark.parametrize(("make", "settings", "name"), COUNTS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_true_is_no_number_of_anything(make: Any, settings: dict[str, Any], name: str) -> None:
    """Catches a switch given for a number: to Python, True is the integer 1, which all of these allow."""
    make(**settings, **{name: 1})
    for value in (True, 1.0, "1"):
        with pytest.raises(ValueError, match=f"{name} must be an integer >= [01], got {value!r}"):
            make(**settings, **{name: value})
