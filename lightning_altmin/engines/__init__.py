"""Engines: how one stage is evaluated and differentiated. `stage_engine` chooses one by what the stage is made of."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

# importing the rules registers them
from lightning_altmin.engines import (  # noqa: F401
    activations,
    conv,
    dropout,
    linear,
    normalization,
    pooling,
    staircase,
)
from lightning_altmin.engines.autograd import AutogradEngine
from lightning_altmin.engines.base import BatchState, CouplingGradient, Gradients, StageEngine, StageMap
from lightning_altmin.engines.closed_form import (
    ClosedFormEngine,
    closed_form,
    has_closed_form,
    has_own_forward,
    rule_for,
    runs_more_than_its_type,
)
from lightning_altmin.engines.rule import Rule
from lightning_altmin.engines.shared_samples import SharedSamples
from lightning_altmin.engines.summed import SummedMap

ENGINES = ("auto", "closed_form", "autograd")

__all__ = [
    "ENGINES",
    "AutogradEngine",
    "BatchState",
    "ClosedFormEngine",
    "CouplingGradient",
    "Gradients",
    "Rule",
    "SharedSamples",
    "StageEngine",
    "StageMap",
    "SummedMap",
    "closed_form",
    "has_closed_form",
    "has_own_forward",
    "rule_for",
    "runs_more_than_its_type",
    "stage_engine",
]


def stage_engine(modules: Sequence[nn.Module], engine: str = "auto") -> StageEngine:
    """Choose the engine of one stage.

    Args:
        modules: The stage's modules in the order they are applied.
        engine: ``"auto"`` (closed form where every module has one, else autograd), ``"closed_form"`` or
            ``"autograd"``.

    Raises:
        ValueError: If ``engine`` is unknown, or ``"closed_form"`` is asked for a module that has none.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {ENGINES}, got {engine!r}")
    uncovered = [m for m in modules if not has_closed_form(m)]
    if engine == "closed_form" and uncovered:
        raise ValueError(f"engine='closed_form' has no rule for {uncovered[0]}; use engine='auto'")
    if engine == "autograd" or uncovered:
        return AutogradEngine(modules)
    return ClosedFormEngine(modules)
