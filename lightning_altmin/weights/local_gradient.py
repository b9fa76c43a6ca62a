"""A gradient step on each stage's local problem: AM-SGD, AM-Adam and the like."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch.optim import Optimizer

from lightning_altmin.arguments import check_count
from lightning_altmin.engines import Gradients
from lightning_altmin.optim import LayerwiseOptimizer
from lightning_altmin.stage import Stage
from lightning_altmin.weights.base import Inputs, WeightProblem, WeightSolver

# The union says nothing new to a type checker. It keeps jsonargparse, which reads YAML by this annotation, from taking
# a dictionary of factories for the arguments of a bare Optimizer.
OptimizerFactory: TypeAlias = Callable[[Iterable[Any]], Optimizer | LayerwiseOptimizer]
"""Makes an optimizer from parameter groups, as ``lambda params: torch.optim.Adam(params, lr=0.002)``."""

DEFAULT = "default"
"""Key of a dictionary of factories for the stages that it does not name."""


def adam(params: Iterable[Any]) -> Optimizer:
    """The recommended optimizer: Adam at rate 0.002, fused over all layers."""
    return torch.optim.Adam(params, lr=0.002, fused=True)


class LocalGradient(WeightSolver):
    """Every stage takes gradient steps on its own problem with its own optimizer state (arXiv 1806.09077).

    Args:
        optimizer: Factory of the optimizer, called with one named parameter group per stage; or a dictionary
            from stage names (see ``CodedNetwork.explain``) to factories, with the key ``"default"`` for the rest.
        steps: Weight steps per batch, >= 1.
        inputs: ``"moved"`` (the paper) reads the codes after the code step. ``"forward"`` reads the forward codes;
            with one plain code step of rate 1 the gradients are then exactly those of backprop, so a run with that
            setting is backprop by another route and not a result of AltMin.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If a factory is not callable.
    """

    def __init__(
        self,
        optimizer: OptimizerFactory | Mapping[str, OptimizerFactory] = adam,
        steps: int = 1,
        inputs: Inputs = "moved",
    ) -> None:
        super().__init__()
        check_count("steps", steps)
        if inputs not in ("moved", "forward"):
            raise ValueError(f"inputs must be 'moved' or 'forward', got {inputs!r}")
        factories = optimizer.values() if isinstance(optimizer, Mapping) else [optimizer]
        if not factories or not all(callable(factory) for factory in factories):
            raise TypeError(f"optimizer must be a function of parameters or a dictionary of such, got {optimizer!r}")
        self.steps = steps
        self.inputs = inputs
        self._factory = optimizer

    def with_layers(self, factories: Mapping[str, OptimizerFactory]) -> LocalGradient:
        """The same solver with other optimizers for the named layers."""
        base = self._factory if isinstance(self._factory, Mapping) else {DEFAULT: self._factory}
        other = copy.copy(self)  # of a subclass, too
        other._factory = {**base, **factories}
        return other

    def optimizer(self, stages: Sequence[Stage]) -> Optimizer:
        groups = self.groups(stages)
        if not groups:
            raise ValueError("network has no trainable parameter")
        if not isinstance(self._factory, Mapping):
            return self._factory(groups)
        return self._composite(self._factory, groups, {stage.name for stage in stages})

    def groups(self, stages: Sequence[Stage]) -> list[dict[str, Any]]:
        """The parameter groups that the factories are given, one per stage with something to train."""
        return [{"params": params, "name": s.name} for s in stages if (params := trainable(s))]

    def _composite(
        self, factories: Mapping[str, OptimizerFactory], groups: list[dict[str, Any]], names: set[str]
    ) -> Optimizer:
        if unknown := set(factories) - names - {DEFAULT}:
            raise ValueError(f"optimizer names unknown stages {sorted(unknown)}; the network has {sorted(names)}")
        rest = [group for group in groups if group["name"] not in factories]
        if rest and DEFAULT not in factories:
            raise ValueError(f"optimizer gives nothing for stages {[g['name'] for g in rest]}; add them or {DEFAULT!r}")
        children = {g["name"]: factories[g["name"]]([g]) for g in groups if g["name"] in factories}
        if rest:
            children[DEFAULT] = factories[DEFAULT](rest)
        return LayerwiseOptimizer(children)

    @property
    def common_factory(self) -> OptimizerFactory | None:
        """The factory of the one optimizer of all stages, ``None`` if stages have different ones."""
        return None if isinstance(self._factory, Mapping) else self._factory

    @property
    def uses_up(self) -> bool:  # type: ignore[override]
        """A subclass with `gradients` of its own may read the problem afterwards."""
        return type(self).gradients is LocalGradient.gradients

    def gradients(self, problem: WeightProblem) -> Gradients:
        """The problem's gradients; uses it up (a subclass that reads it afterwards calls ``problem.gradients()``)."""
        return problem.last_gradients()

    def extra_repr(self) -> str:
        return f"steps={self.steps}, inputs={self.inputs!r}"


def trainable(stage: Stage) -> list[torch.nn.Parameter]:
    """Parameters of a stage that are trained, each once."""
    return [p for p in dict.fromkeys(stage.parameters()) if p.requires_grad]
