"""Validation data held out of the training samples by chance."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_altmin.arguments import check_count, check_number


def check_val_split(value: int | float) -> None:
    """Raise unless ``value`` is a share of the samples, or a number of them.

    Args:
        value: A float in [0, 1), or an integer >= 0.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(value, float):
        check_number("val_split", value, least=0, below=1, otherwise="be an integer, a number of samples")
    else:
        check_count("val_split", value, 0, otherwise="a float in [0, 1), a share of the samples")


def hold_out(samples: int, val_split: int | float, generator: torch.Generator) -> tuple[Tensor, Tensor] | None:
    """Which samples train and which validate; ``None`` if ``val_split`` is 0 and all train.

    Args:
        samples: How many there are, >= 1.
        val_split: As for `check_val_split`.
        generator: What the choice is drawn from.

    Returns:
        Numbers of the training and of the validation samples, each ascending, so that both are read in stored order.

    Raises:
        ValueError: If ``val_split`` is out of range, holds out no sample or leaves none to train on.
    """
    check_val_split(val_split)
    if not val_split:
        return None
    number = val_split if isinstance(val_split, int) else round(val_split * samples)
    if number == 0:
        raise ValueError(f"val_split={val_split!r} holds out no sample of {samples}; use a larger one, or 0 for none")
    if number >= samples:
        raise ValueError(f"val_split={val_split!r} leaves no training samples: there are {samples} in all")
    order = torch.randperm(samples, generator=generator)
    return order[number:].sort().values, order[:number].sort().values
