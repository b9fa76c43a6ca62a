"""A check that a user can run on their own model: do the engine in use and autograd compute the same step?"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_altmin.processes import Processes
from lightning_altmin.random_state import random_state, set_random_state

if TYPE_CHECKING:
    from lightning_altmin.altmin import AltMin
    from lightning_altmin.step import Step


class EngineMismatchError(RuntimeError):
    """Two engines disagree on a step."""


@dataclass(frozen=True)
class Verification:
    """Result of `verify`.

    Attributes:
        differences: ``(stage, quantity, largest absolute difference)``, relative to the quantity's largest entry.
    """

    differences: list[tuple[str, str, float]]

    @property
    def largest(self) -> float:
        """The largest difference of all; NaN if any of them is."""
        return float(torch.tensor([difference for _, _, difference in self.differences], dtype=torch.float64).max())

    def __str__(self) -> str:
        return "\n".join(f"{stage:<16} {quantity:<28} {d:.1e}" for stage, quantity, d in self.differences)


def verify(core: AltMin, x: Tensor, y: Any, tolerance: float = 1e-10) -> Verification:
    """Compare every local derivative of one step with autograd's, in float64.

    Works on copies: model, optimizer, buffers and random state stay as they were.

    Args:
        core: The model to check.
        x: Inputs, shape ``(batch, *features)``.
        y: Targets.
        tolerance: Largest relative difference accepted, > 0.

    Returns:
        The differences, by stage and quantity.

    Raises:
        EngineMismatchError: If a difference is larger than ``tolerance``.
    """
    before = random_state()
    try:
        mine, oracle = (copy.deepcopy(core).double() for _ in range(2))
        mine._compiled = oracle._compiled = None
        mine.processes = oracle.processes = Processes()  # nobody else need be asked about this batch
        for stage in oracle.coded.stages:
            stage.use_engine("autograd")
        x = x.double() if x.is_floating_point() else x
        y = y.double() if isinstance(y, Tensor) and y.is_floating_point() else y
        differences = _compare(mine, oracle, x, y, before)
    finally:
        set_random_state(before)
    result = Verification(differences)
    if not result.largest <= tolerance:
        raise EngineMismatchError(f"engines differ by {result.largest:.1e}, more than {tolerance:.1e}:\n{result}")
    return result


def _compare(mine: AltMin, oracle: AltMin, x: Tensor, y: Any, random: dict[str, Any]) -> list[tuple[str, str, float]]:
    steps: list[Step] = []
    for core in (mine, oracle):
        set_random_state(random)  # both draw the same masks
        steps.append(core.encode(x, y))
    names = [stage.name for stage in mine.coded.stages]
    rows = [("output", "forward", _difference(steps[0].output, steps[1].output))]
    problems = zip(mine.code_problems(steps[0]), oracle.code_problems(steps[1]), strict=True)
    with torch.no_grad():
        for (ours, level), (theirs, _) in problems:
            name, gradient = names[ours.level], ours.gradient()
            rows.append((name, "code gradient, forward", _difference(gradient, theirs.gradient())))
            move = -gradient
            rows.append((name, "code gradient, moved", _difference(ours.gradient(move), theirs.gradient(move))))
            for step in steps:
                step.moves[level] = move
        for ours_w, theirs_w in zip(mine.weight_problems(steps[0]), oracle.weight_problems(steps[1]), strict=True):
            gradients, expected = dict(ours_w.gradients()), dict(theirs_w.gradients())
            for parameter, twin in zip(ours_w.stage.parameters(), theirs_w.stage.parameters(), strict=True):
                # A parameter that an engine gives no gradient for has the gradient 0.
                pair = (g.get(p, torch.zeros_like(p)) for g, p in ((gradients, parameter), (expected, twin)))
                rows.append((ours_w.stage.name, f"gradient {tuple(parameter.shape)}", _difference(*pair)))
    for (name, ours_b), (_, theirs_b) in zip(mine.network.named_buffers(), oracle.network.named_buffers(), strict=True):
        rows.append((name, "buffer", _difference(ours_b, theirs_b)))
    return rows


def _difference(ours: Tensor, theirs: Tensor) -> float:
    scale = max(1.0, float(theirs.abs().max())) if theirs.numel() else 1.0
    return float((ours - theirs).abs().max()) / scale if theirs.numel() else 0.0
