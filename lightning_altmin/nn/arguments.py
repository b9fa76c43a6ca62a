"""Checks of constructor arguments: each error names the argument, the value it got and what is allowed."""

from collections.abc import Iterable


def check_positive_int(name: str, value: object) -> None:
    """Raise unless ``value`` is an integer of at least 1.

    Args:
        name: The argument's name, for the message.
        value: What the caller gave.

    Raises:
        TypeError: If ``value`` is not an ``int`` (``bool`` does not count as one).
        ValueError: If ``value`` is smaller than 1.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer >= 1, got {value!r} of type {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value}")


def check_positive_ints(name: str, values: object) -> tuple[int, ...]:
    """Return ``values`` as a tuple, or raise unless they are integers of at least 1.

    Args:
        name: The argument's name, for the message.
        values: What the caller gave: any iterable of integers, also an empty one.

    Raises:
        TypeError: If ``values`` is not a list of integers.
        ValueError: If one of them is smaller than 1.
    """
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a list of integers >= 1, such as [100, 100], got {values!r}")
    widths = tuple(values)
    for position, width in enumerate(widths):
        check_positive_int(f"{name}[{position}]", width)
    return widths


def check_dropout(value: float) -> None:
    """Raise unless ``value`` is a probability that leaves something over.

    Args:
        value: The probability of dropping a unit, in [0, 1).

    Raises:
        TypeError: If ``value`` is not a number.
        ValueError: If ``value`` lies outside [0, 1).
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"dropout must be a number in [0, 1), got {value!r} of type {type(value).__name__}")
    if not 0.0 <= value < 1.0:  # written so that NaN fails
        raise ValueError(f"dropout must lie in [0, 1), got {value}; 0 means no dropout")


def check_image_size(value: object, smallest: int, why: str) -> None:
    """Raise unless ``value`` is an image side that leaves at least one pixel after the network's poolings.

    Args:
        value: Height and width of the (square) input image in pixels.
        smallest: The smallest size that works.
        why: What the size is needed for, for the message.

    Raises:
        TypeError: If ``value`` is not an ``int``.
        ValueError: If ``value`` is smaller than ``smallest``.
    """
    check_positive_int("image_size", value)
    if isinstance(value, int) and value < smallest:
        raise ValueError(f"image_size must be at least {smallest} pixels for {why}, got {value}")
