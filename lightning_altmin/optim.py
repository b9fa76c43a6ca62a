"""Several optimizers, one per named group of layers, as the single optimizer that a Trainer counts steps by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_altmin.stage import Stage


class _ChildrenState(MutableMapping[Tensor, Any]):
    """The children's states as one mapping, read from and written to the child that owns the parameter.

    A ``ChainMap`` would not do: looking a parameter up in an optimizer's state makes an entry there.
    """

    def __init__(self, children: Iterable[Optimizer]) -> None:
        self._children = list(children)
        self._owner = {p: child for child in self._children for group in child.param_groups for p in group["params"]}

    def __getitem__(self, parameter: Tensor) -> Any:
        return self._owner[parameter].state[parameter]

    def __setitem__(self, parameter: Tensor, state: Any) -> None:
        self._owner[parameter].state[parameter] = state

    def __delitem__(self, parameter: Tensor) -> None:
        del self._owner[parameter].state[parameter]

    def __iter__(self) -> Iterator[Tensor]:
        for child in self._children:
            yield from list(child.state)

    def __len__(self) -> int:
        return sum(len(child.state) for child in self._children)


class LayerwiseOptimizer(Optimizer):
    """A composite of named optimizers that steps them together.

    ``param_groups`` lists the children's own group dictionaries, so schedulers, learning-rate monitors and gradient
    scalers see and change what the children use. ``state_dict`` keeps the children apart by name, and loading
    refuses a checkpoint whose names differ. ``defaults`` are the settings that all children know by name, as the first
    one has them: a scheduler of momentum looks there for whether there is any.

    Args:
        children: Optimizers by name; no parameter may be in two of them.

    Raises:
        ValueError: If ``children`` is empty or two children share a parameter.
    """

    def __init__(self, children: Mapping[str, Optimizer]) -> None:
        if not children:
            raise ValueError("children must name at least one optimizer, got none")
        self.children = dict(children)
        groups = [group for child in self.children.values() for group in child.param_groups]
        parameters = [p for group in groups for p in group["params"]]
        if len(set(parameters)) != len(parameters):
            raise ValueError("children share a parameter; every parameter must belong to one optimizer")
        first, *others = (child.defaults for child in self.children.values())
        common = {name: value for name, value in first.items() if all(name in other for other in others)}
        super().__init__([{"params": parameters}], common)
        self._share_groups()

    def _share_groups(self) -> None:
        self.param_groups = [group for child in self.children.values() for group in child.param_groups]
        self.state = _ChildrenState(self.children.values())  # type: ignore[assignment]

    def __getstate__(self) -> dict[str, Any]:
        # The base class keeps groups and state only; both are the children's, and are found again through them.
        return {"defaults": self.defaults, "children": self.children}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "param_groups": []})
        self._share_groups()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step every child once.

        Args:
            closure: Evaluated once, before the children step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for child in self.children.values():
            child.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for child in self.children.values():
            child.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Used once by the base class; a layer's optimizer cannot be guessed afterwards.

        Raises:
            ValueError: Always, after construction.
        """
        if self.param_groups:
            raise ValueError(
                f"param_group: this is one optimizer for each of {sorted(self.children)}, and it cannot tell which of "
                "them is to train what is added now. Lightning's BaseFinetuning adds the layers that it unfreezes: "
                "freeze them after the optimizer was made (requires_grad_(False) in on_train_start), which then holds "
                "them already, or give LocalGradient one factory for all layers instead of a dictionary"
            )
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        return {"children": {name: child.state_dict() for name, child in self.children.items()}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load every child's state.

        Raises:
            ValueError: If the checkpoint was written for other layers.
        """
        saved = cast(Mapping[str, Any], state_dict.get("children", {}))
        if set(saved) != set(self.children):
            raise ValueError(
                f"the checkpoint holds optimizers for {sorted(saved)}, this model has {sorted(self.children)}: "
                "it was written with other per-layer settings"
            )
        for name, child in self.children.items():
            child.load_state_dict(saved[name])
        self._share_groups()  # children replaced their group dictionaries


def check_optimizer(optimizer: object, stages: Iterable[Stage]) -> None:
    """Refuse what a factory should not have returned.

    Raises:
        TypeError: If it is no optimizer.
        ValueError: If a trainable parameter of a stage is not in it, or it, or a child of it, is LBFGS.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"weights: the optimizer factory must return a torch optimizer, got {optimizer!r}")
    if any(isinstance(child, LBFGS) for child in getattr(optimizer, "children", {"": optimizer}).values()):
        raise ValueError(
            "weights: LBFGS evaluates the loss several times per step, but a weight step has its gradients given; use "
            "Adam, SGD or another first-order optimizer"
        )
    held = {p for group in optimizer.param_groups for p in group["params"]}
    missing = [s.name for s in stages if any(p.requires_grad and p not in held for p in s.parameters())]
    if missing:
        raise ValueError(
            f"weights: the optimizer holds not all parameters of stages {missing}, which would never be trained. The "
            "factory must pass on the groups that it is given; set requires_grad=False for what is to stay as it is"
        )


def clear_gradients(optimizer: Optimizer) -> None:
    """``optimizer.zero_grad()`` without its hooks and records."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


@contextmanager
def equal_groups_merged(optimizer: Optimizer) -> Iterator[None]:
    """Step ``optimizer`` inside this context: parameter groups whose settings agree are then one.

    A group per layer is what schedules, monitors and users want to see; a fused kernel wants all layers in one call.
    Only optimizers that treat every element by itself and keep nothing in a group are merged, and only where no hook of
    a step sees the groups: what it changed in the merged one would be lost.
    """
    children = list(getattr(optimizer, "children", {"": optimizer}).values())
    if any(each._optimizer_step_pre_hooks or each._optimizer_step_post_hooks for each in (optimizer, *children)):
        children = []
    before = [(child, child.param_groups) for child in children if type(child) in _ELEMENTWISE]
    for child, groups in before:
        child.param_groups = _merged(groups)
    try:
        yield
    finally:
        for child, groups in before:
            child.param_groups = groups


_ELEMENTWISE = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad)
_OWN = ("params", "param_names", "name", "initial_lr")  # of a group, without a say in how it is stepped


def _merged(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    first, *others = groups
    if not others or not all(_same_settings(first, other) for other in others):
        return groups
    return [{**first, "params": [p for group in groups for p in group["params"]]}]


def _same_settings(a: dict[str, Any], b: dict[str, Any]) -> bool:
    # Tensors (a rate that lives on a device) are compared as objects: a look at their values would stall the device.
    return all(
        a[key] is b.get(key) or (not isinstance(a[key], Tensor) and a[key] == b.get(key))
        for key in a
        if key not in _OWN
    )


def clip_per_group(optimizer: Optimizer, max_norm: float | Mapping[str, float]) -> None:
    """Scale each parameter group's gradient so that its norm is at most ``max_norm``; no device sync.

    Args:
        optimizer: Optimizer with named parameter groups, gradients in place and unscaled.
        max_norm: One bound for every group, or bounds by group name; unnamed groups are left alone.
    """
    for group in optimizer.param_groups:
        bound = max_norm.get(group.get("name", "")) if isinstance(max_norm, Mapping) else max_norm
        gradients: Iterable[Tensor] = [p.grad for p in group["params"] if p.grad is not None]
        if bound is not None and gradients:
            torch.nn.utils.clip_grad_norm_(group["params"], bound)
