"""A check that a user can run on their own model: do the engine in use and autograd compute the same step?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_altmin.processes import Processes
from lightning_altmin.random_state import random_state, set_random_state
from lightning_altmin.stage import Stage

if TYPE_CHECKING:
    from lightning_altmin.altmin import AltMin

_EPS = torch.finfo(torch.float64).eps
_SHARE = _EPS**0.25
"""A quantity smaller than this share of its stage's largest is compared with that share: its rounding may be theirs."""


class EngineMismatchError(RuntimeError):
    """Two engines disagree on a step."""


@dataclass(frozen=True)
class Verification:
    """Result of `verify`.

    Attributes:
        differences: ``(stage, quantity, largest absolute difference)``, relative to the quantity's largest entry. A
            quantity that is rounding error, or more of it than its size tells, is compared with what it is the rounding
            of; see `verify`.
    """

    differences: list[tuple[str, str, float]]

    @property
    def largest(self) -> float:
        """The largest difference of all; NaN if any of them is."""
        return float(torch.tensor([difference for _, _, difference in self.differences], dtype=torch.float64).max())

    def __str__(self) -> str:
        return "\n".join(f"{stage:<16} {quantity:<28} {d:.1e}" for stage, quantity, d in self.differences)


@dataclass(frozen=True)
class _Quantity:
    """Something that is computed in two ways.

    ``group`` tells quantities apart that are not of one kind: a stage's gradients, a module's buffers.
    """

    stage: str
    name: str
    group: str
    value: Tensor


_Quantities = Callable[["AltMin", Tensor, Any], Iterator[_Quantity]]


def verify(core: AltMin, x: Tensor, y: Any, tolerance: float = 1e-10) -> Verification:
    """Compare every local derivative of one step with autograd's, in float64.

    And the gradients of a whole step that frees its codes on the way (``keep_codes=False``, as in the Trainer) with
    those of one that keeps them. Works on copies: model, optimizer, buffers and random state stay as they were.

    Differences are relative to the quantity's largest entry. Some quantities are rounding error alone, such as the
    gradient of a bias before a BatchNorm, and some have fewer digits than float64, such as what a deep stage's small
    move changes. How many is found by two more runs of autograd, from inputs and parameters one rounding larger and
    smaller: a quantity that they change by r is compared with r / eps if it is smaller, the size whose rounding r is.

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
        result = Verification(_differences(core, x, y, before))
    finally:
        set_random_state(before)
    if not result.largest <= tolerance:
        raise EngineMismatchError(f"engines differ by {result.largest:.1e}, more than {tolerance:.1e}:\n{result}")
    return result


def _differences(core: AltMin, x: Tensor, y: Any, random: dict[str, Any]) -> list[tuple[str, str, float]]:
    moves: dict[int, Tensor] = {}  # the first run's, for all

    def run(quantities: _Quantities, engine: str | None = None, factor: float = 1.0) -> list[_Quantity]:
        twin = _double(core, factor)
        if engine is not None:
            for stage in twin.coded.stages:
                stage.use_engine(engine)
        set_random_state(random)  # all draw the same masks
        inputs = x
        if x.is_floating_point():  # a whole number is exact, or a mark
            inputs = torch.where(x == x.round(), x.double(), x.double() * factor)
        targets = y.double() if isinstance(y, Tensor) and y.is_floating_point() else y
        return list(quantities(twin, inputs, targets))

    derivatives, kept = partial(_derivatives, moves=moves), partial(_step_gradients, keep_codes=True)
    near = 1 + _EPS, 1 - _EPS
    ours, theirs = run(derivatives), run(derivatives, "autograd")
    compared = _compared(ours, theirs, [run(derivatives, "autograd", factor) for factor in near])
    ours, theirs = run(partial(_step_gradients, keep_codes=False)), run(kept)
    return compared + _compared(ours, theirs, [run(kept, factor=factor) for factor in near])


def _compared(
    ours: list[_Quantity], theirs: list[_Quantity], rounded: list[list[_Quantity]]
) -> list[tuple[str, str, float]]:
    largest: dict[str, float] = {}
    for quantity in theirs:
        largest[quantity.group] = max(largest.get(quantity.group, 0.0), _size(quantity.value))
    return [
        (b.stage, b.name, _difference(a.value, b.value, [r.value for r in others], largest[b.group]))
        for a, b, *others in zip(ours, theirs, *rounded, strict=True)
    ]


def _double(core: AltMin, factor: float) -> AltMin:
    """A copy in float64 that is not compiled, its parameters multiplied.

    By one factor for all: sums that cancel exactly go on doing so, and no unit leaves a kink that it lies on.
    """
    twin = copy.deepcopy(core).double()
    twin.compiled = None
    twin.processes = Processes()  # nobody else need be asked about this batch
    with torch.no_grad():
        for parameter in twin.network.parameters():
            parameter.mul_(factor)
    return twin


def _derivatives(core: AltMin, x: Tensor, y: Any, moves: dict[int, Tensor]) -> Iterator[_Quantity]:
    """What an engine computes; moves of codes are taken from ``moves``, or kept there by the first run."""
    step = core.encode(x, y)
    names = [stage.name for stage in core.coded.stages]
    yield _Quantity("output", "forward", "output", step.output)
    with torch.no_grad():
        for problem, level in core.code_problems(step):
            name, gradient = names[problem.level], problem.gradient()
            yield _Quantity(name, "code gradient, forward", f"code {level} forward", gradient)
            step.moves[level] = move = moves.setdefault(level, -gradient)
            yield _Quantity(name, "code gradient, moved", f"code {level} moved", problem.gradient(move))
        for weights in core.weight_problems(step):
            yield from _weight_gradients(weights.stage, dict(weights.gradients()), "")
    for name, buffer in core.network.named_buffers():
        group = f"buffers {name.rpartition('.')[0]}" if buffer.is_floating_point() else f"buffer {name}"
        yield _Quantity(name, "buffer", group, buffer)


@torch.no_grad()
def _step_gradients(core: AltMin, x: Tensor, y: Any, keep_codes: bool) -> Iterator[_Quantity]:
    """The gradients of a whole step, by the model's own solvers; where codes are freed, they come in another order."""
    step = core.encode(x, y, keep_codes)
    core.solve_codes(step)
    gradients, _ = core.differentiate(step) if step.solved is None else step.solved
    for stage in core.coded.stages:
        yield from _weight_gradients(stage, dict(gradients), ", codes freed")


def _weight_gradients(stage: Stage, gradients: dict[nn.Parameter, Tensor], how: str) -> Iterator[_Quantity]:
    for parameter in stage.parameters():
        # A parameter that an engine gives no gradient for has the gradient 0.
        gradient = gradients.get(parameter, torch.zeros_like(parameter))
        yield _Quantity(stage.name, f"gradient {tuple(parameter.shape)}{how}", f"weights {stage.name}", gradient)


def _difference(ours: Tensor, theirs: Tensor, rounded: list[Tensor], largest: float) -> float:
    """Largest difference, relative to the largest entry of ``theirs`` or what it is the rounding of.

    Args:
        ours: What is checked.
        theirs: What it is to be.
        rounded: The same from inputs and parameters that differ by their rounding.
        largest: Largest entry of all quantities that it belongs to.
    """
    difference, size = _size(ours.double() - theirs.double()), _size(theirs)
    rounding = max(_size(other.double() - theirs.double()) for other in rounded) / _EPS
    # A unit that crosses a kink by such a rounding would excuse any difference: no more than what all are beside 1.
    scale = max(size, min(rounding, max(1.0, largest)), _SHARE * largest)
    if difference == 0 or not theirs.numel():
        return 0.0
    return difference / scale if scale > 0 else float("inf")


def _size(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0
