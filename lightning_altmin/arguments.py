"""Checks of what users give: each error names the argument, what is allowed and what was given."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, TypeVar

Part = TypeVar("Part")


def check_count(name: str, value: Any, least: int = 1, most: int | None = None, otherwise: str = "") -> None:
    """Raise unless ``value`` is an integer in a range; ``True`` is none.

    Args:
        name: The argument's name, for the message.
        value: What the caller gave.
        least: The smallest integer allowed.
        most: The largest one; ``None`` for no bound.
        otherwise: What else the caller allows, for the message, such as ``"None for all"``.

    Raises:
        ValueError: If it is not.
    """
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        allowed = f">= {least}" if most is None else f"from {least} to {most}"
        raise ValueError(_refusal(name, f"be an integer {allowed}", otherwise, value))


def check_number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    otherwise: str = "",
) -> None:
    """Raise unless ``value`` is a finite real number in an interval; ``True`` and tensors are none.

    Args:
        name: The argument's name, for the message.
        value: What the caller gave.
        above: What it must be larger than; give this, ``least``, or neither for no bound.
        least: The smallest number allowed.
        below: What it must be smaller than; give this, ``most``, or neither for no bound.
        most: The largest number allowed.
        otherwise: What else the caller allows, for the message, such as ``"None for no cap"``.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(value, Real) and not isinstance(value, bool):
        number: Any = value
        # No bound is an open one at infinity, so that NaN and infinity fail all the same.
        high_enough = number >= least if least is not None else number > (-math.inf if above is None else above)
        low_enough = number <= most if most is not None else number < (math.inf if below is None else below)
        if high_enough and low_enough:
            return
    raise ValueError(_refusal(name, _interval(above, least, below, most), otherwise, value))


def _interval(above: float | None, least: float | None, below: float | None, most: float | None) -> str:
    if below is None and most is None:
        if above is None and least is None:
            return "be a finite number"
        if above == 0:
            return "be a positive number"
        return f"be a number >= {least}" if above is None else f"be a number > {above}"
    low = f"[{least}" if least is not None else f"({-math.inf if above is None else above}"
    return f"lie in {low}, {f'{most}]' if most is not None else f'{below})'}"


def _refusal(name: str, rule: str, otherwise: str, value: object) -> str:
    alternative = f", or {otherwise}" if otherwise else ""
    kind = "" if isinstance(value, (int, float)) or value is None else f" of type {type(value).__name__}"
    return f"{name} must {rule}{alternative}, got {value!r}{kind}"


def given_or(default: Callable[[], Part], name: str, given: Part | None, kind: type) -> Part:
    """What was given for an argument, or what stands for ``None``.

    Args:
        default: Makes what stands for ``None``.
        name: The argument's name, for the message.
        given: What the caller gave.
        kind: The class that it must be an instance of.

    Raises:
        TypeError: If it is not.
    """
    if given is None:
        return default()
    if not isinstance(given, kind):
        raise TypeError(f"{name} must be an instance of {kind.__name__}, got {given!r}")
    return given
