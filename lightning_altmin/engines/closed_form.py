"""The closed-form engine: a stage as a chain of layers whose derivatives are written down, with no autograd graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from lightning_altmin.engines.base import BatchState, CouplingGradient, StageEngine, StageMap
from lightning_altmin.engines.chain import Chain, ChainCoupling
from lightning_altmin.engines.gram import GramCoupling, gram_pays
from lightning_altmin.engines.rule import Rule
from lightning_altmin.engines.shared_samples import SharedSamples


class ClosedFormEngine(StageEngine):
    """Evaluates a stage by the rules of its layers. Exact: it agrees with autograd to rounding."""

    kind: ClassVar[str] = "closed_form"
    reads_base_output: ClassVar[bool] = False

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._use([rule_for(m) for m in pooled_first(modules)])

    @torch.no_grad()
    def encode(self, x: Tensor) -> tuple[Tensor, BatchState]:
        states = []
        for rule in self._fixed:
            x, state = rule.encode(x)
            states.append(state)
        return x, states

    def share(self, samples: SharedSamples | None) -> None:
        self._use([rule.shared(samples) for rule in self._fixed])

    def suit_compiler(self) -> None:
        self._use([rule.compiled() for rule in self._fixed])

    def _use(self, rules: list[Rule]) -> None:
        self._fixed = rules
        self._live = [rule.live() for rule in rules]

    def joined(self, states: Sequence[BatchState]) -> BatchState:
        return [rule.joined(parts) for rule, parts in zip(self._fixed, zip(*states, strict=True), strict=True)]

    def fixed(self, x: Tensor, state: BatchState, move: Tensor | None = None) -> StageMap:
        return _chain(self._fixed, x, state, move)

    def repeated_coupling(
        self, base: Tensor, state: BatchState, target_move: Tensor, gradients: int, any_order: bool = False
    ) -> CouplingGradient | None:
        def coupling(first: int, base: Tensor) -> CouplingGradient | None:
            return _gram_coupling(self._fixed[first:], base, state[first:], target_move, gradients)

        def above(base: Tensor) -> CouplingGradient:
            return coupling(1, base) or ChainCoupling(self._fixed[1:], base, state[1:], target_move)

        found = self._fixed[0].coupling(base, state[0], above) if any_order and len(self._fixed) > 1 else None
        return found or coupling(0, base)

    def live(self, x: Tensor, state: BatchState, move: Tensor | None = None) -> StageMap:
        return _chain(self._live, x, state, move)


def _chain(rules: Sequence[Rule], x: Tensor, states: Sequence[Any], move: Tensor | None) -> Chain:
    chain = Chain(rules, x, states)
    return chain if move is None else chain.moved(move)


def _gram_coupling(
    rules: Sequence[Rule], base: Tensor, states: Sequence[Any], target_move: Tensor, gradients: int
) -> GramCoupling | None:
    last = rules[-1].module
    if type(last) is not nn.Linear or target_move.dim() != 2 or not gram_pays(base.shape[0], last, gradients):
        return None
    # W^T (W a - t) loses digits as W^T W a - W^T t, too many of them in 16 bits.
    if torch.is_autocast_enabled(base.device.type):
        return None
    return GramCoupling(rules[:-1], last, base, states[:-1], target_move)


def pooled_first(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """The same function with max-pooling before a directly preceding activation that never falls.

    The largest of s(x) is s of the largest x, at the same place, so nothing changes but the cost: the activation and
    its derivative then see only what the pooling leaves.
    """
    ordered = list(modules)
    for index in range(1, len(ordered)):
        never_falls = type(ordered[index - 1]) in (nn.ReLU, nn.Tanh, nn.Sigmoid)
        if type(ordered[index]) is nn.MaxPool2d and never_falls:
            ordered[index - 1 : index + 1] = ordered[index], ordered[index - 1]
    return ordered


_RULES: dict[type[nn.Module], Callable[[nn.Module], Rule]] = {}
_CONDITIONS: dict[type[nn.Module], Callable[[Any], bool]] = {}
_R = TypeVar("_R", bound=Callable[[Any], Rule])


def closed_form(*types: type[nn.Module], when: Callable[[Any], bool] | None = None) -> Callable[[_R], _R]:
    """Decorator of a `Rule`, or of a function that makes one: serve modules of exactly these types by it.

    Args:
        types: Module types. Subclasses are not included, for they may compute something else.
        when: Optional condition on the module (padding mode, options the rule does not cover).
    """

    def register(rule: _R) -> _R:
        for module_type in types:
            _RULES[module_type] = rule
            if when is not None:
                _CONDITIONS[module_type] = when
        return rule

    return register


def rule_for(module: nn.Module) -> Rule:
    """The rule of a module that has one; see `has_closed_form`."""
    return _RULES[type(module)](module)


def has_closed_form(module: nn.Module) -> bool:
    """Whether a rule covers this module as it stands: its type, its options, and nothing that may change its result.

    That is a hook, or a ``forward`` of the instance's own in the place of its type's.
    """
    if type(module) not in _RULES or runs_more_than_its_type(module):
        return False
    condition = _CONDITIONS.get(type(module))
    return condition is None or condition(module)


def runs_more_than_its_type(module: nn.Module) -> bool:
    """Whether calling the module runs something that its type does not tell: forward hooks, or a replaced forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or has_own_forward(module)


def has_own_forward(module: nn.Module) -> bool:
    """Whether ``forward`` was replaced on this instance (``module.forward = ...``)."""
    return "forward" in module.__dict__
