"""Checks of the sizes of networks, beside those of single numbers in `lightning_altmin.arguments`."""

from collections.abc import Iterable

from lightning_altmin.arguments import check_count


def check_counts(name: str, values: object) -> tuple[int, ...]:
    """Return ``values`` as a tuple, or raise unless they are integers of at least 1.

    Args:
        name: The argument's name, for the message.
        values: What the caller gave: any iterable of integers, also an empty one.

    Raises:
        TypeError: If ``values`` is no list.
        ValueError: If one of them is not an integer of at least 1.
    """
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a list of integers >= 1, such as [100, 100], got {values!r}")
    widths = tuple(values)
    for position, width in enumerate(widths):
        check_count(f"{name}[{position}]", width)
    return widths


def check_image_size(value: int, smallest: int, why: str) -> None:
    """Raise unless ``value`` is an image side that leaves at least one pixel after the network's poolings.

    Args:
        value: Height and width of the (square) input image in pixels.
        smallest: The smallest size that works.
        why: What the size is needed for, for the message.

    Raises:
        ValueError: If ``value`` is not an integer of at least ``smallest``.
    """
    check_count("image_size", value)
    if value < smallest:
        raise ValueError(f"image_size must be at least {smallest} pixels for {why}, got {value}")
