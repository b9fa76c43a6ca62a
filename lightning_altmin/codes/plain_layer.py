"""Stages that are one activation at most, elementwise and invertible, and one Linear."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lightning_altmin.codes.elementwise import is_invertible
from lightning_altmin.engines import runs_more_than_its_type
from lightning_altmin.stage import Stage

_RESHAPES = (nn.Flatten, nn.Identity)  # Identity is both: an activation that need not be inverted


def activation_of(transfer: Iterable[nn.Module]) -> nn.Module:
    """The stage's activation; the identity, if it has none."""
    found = _activations(transfer)
    return found[0] if found else nn.Identity()  # `next(..., default)`: not traced by torch 2.8


def odd_modules(stage: Stage) -> list[str]:
    """What the stage has besides, described; nothing, if it is such a stage."""
    activations, affine = _activations(stage.transfer), list(stage.affine)
    odd = [m for m in activations if not is_invertible(m)] + activations[1:]
    odd += [m for m in affine if type(m) is not nn.Linear] + affine[1:]
    more = [m for m in (*stage.transfer, *affine) if runs_more_than_its_type(m)]
    return [str(m) for m in odd] + [f"{m} with a forward or hooks of its own" for m in more]


def _activations(transfer: Iterable[nn.Module]) -> list[nn.Module]:
    return [m for m in transfer if not isinstance(m, _RESHAPES)]
