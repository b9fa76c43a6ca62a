"""Checks of arguments that solvers share."""

from __future__ import annotations


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise unless ``value`` is an integer of at least ``least``; ``True`` is none.

    Args:
        name: The argument's name, for the message.
        value: What the caller gave.
        least: The smallest integer allowed.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
