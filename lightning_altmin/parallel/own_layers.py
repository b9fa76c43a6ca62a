"""An optimizer made for all layers, of which a process steps its own; its whole state, gathered and dealt out again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer


class OwnLayers:
    """Leaves an optimizer with the parameters of one process; its groups, and with them rates and names, stay all.

    Args:
        optimizer: Made for all layers; changed in place.
        owners: Rank of the owner of each parameter, by ``id``.
        group: The processes; all if not given.

    Raises:
        ValueError: If a parameter group has parameters of several processes.
    """

    def __init__(self, optimizer: Optimizer, owners: Mapping[int, int], group: dist.ProcessGroup | None) -> None:
        self.optimizer = optimizer
        self._group = group
        self._rank = dist.get_rank(group)
        self._places: dict[str, list[list[tuple[int, int]]]] = {}
        """Of each child optimizer, each group's parameters: their place among all, and here (-1 if not here)."""
        for name, child in self._children().items():
            self._places[name] = self._leave_own(child, owners)

    def _children(self) -> dict[str, Optimizer]:
        children: dict[str, Optimizer] = getattr(self.optimizer, "children", {"": self.optimizer})
        return children

    def _leave_own(self, optimizer: Optimizer, owners: Mapping[int, int]) -> list[list[tuple[int, int]]]:
        places: list[list[tuple[int, int]]] = []
        whole = here = 0
        for group in optimizer.param_groups:
            ranks = [owners[id(p)] for p in group["params"]]
            if len(set(ranks)) > 1:
                raise ValueError(
                    f"a parameter group of {type(optimizer).__name__} has parameters of layers of processes "
                    f"{sorted(set(ranks))}: the optimizer factory must pass on the groups that it is given, one per "
                    "layer"
                )
            places.append([])
            for rank in ranks:
                places[-1].append((whole, here if rank == self._rank else -1))
                whole += 1
                here += rank == self._rank
            for parameter, rank in zip(group["params"], ranks, strict=True):
                if rank != self._rank:
                    optimizer.state.pop(parameter, None)
            group["params"] = [p for p, rank in zip(group["params"], ranks, strict=True) if rank == self._rank]
        return places

    def gathered(self) -> dict[str, Any]:
        """The state dictionary of one process, on the first process; empty on others. All of them must call it."""
        children = self._children().items()
        own = {name: (self._own_state(child, name), self._own_settings(child, name)) for name, child in children}
        every: list[Any] | None = [None] * dist.get_world_size(self._group) if self._rank == 0 else None
        first = 0 if self._group is None else dist.get_global_rank(self._group, 0)
        dist.gather_object(own, every, first, group=self._group)
        if every is None:
            return {}
        whole: dict[str, Any] = {}
        for name, child in self._children().items():
            states = {place: state for each in every for place, state in each[name][0].items()}
            groups = child.state_dict()["param_groups"]
            for group, places in zip(groups, self._places[name], strict=True):
                group["params"] = [place for place, _ in places]
            for each in every:
                for index, settings in each[name][1].items():
                    groups[index].update(settings)
            whole[name] = {"state": {place: states[place] for place in sorted(states)}, "param_groups": groups}
        return {"children": whole} if hasattr(self.optimizer, "children") else whole[""]

    def _own_state(self, optimizer: Optimizer, name: str) -> dict[int, Any]:
        state = optimizer.state_dict()["state"]
        pairs = [pair for places in self._places[name] for pair in places]
        return {
            whole: {key: v.cpu() if isinstance(v, Tensor) else v for key, v in state[here].items()}
            for whole, here in pairs
            if here >= 0 and here in state
        }

    def _own_settings(self, optimizer: Optimizer, name: str) -> dict[int, dict[str, Any]]:
        """What the groups of one's own layers hold beside parameters: an optimizer may keep its state there."""
        groups = optimizer.state_dict()["param_groups"]
        return {
            index: {key: v.cpu() if isinstance(v, Tensor) else v for key, v in group.items() if key != "params"}
            for index, (group, places) in enumerate(zip(groups, self._places[name], strict=True))
            if any(here >= 0 for _, here in places)
        }

    def load(self, whole: Mapping[str, Any]) -> None:
        """Take one's own part of the state dictionary of one process.

        Raises:
            ValueError: If it was written for other layers.
        """
        composite = hasattr(self.optimizer, "children")
        saved: Mapping[str, Any] = whole.get("children", {}) if composite else {"": whole}
        if set(saved) != set(self._places):
            raise ValueError(
                f"the checkpoint holds optimizers for {sorted(saved)}, this model has {sorted(self._places)}: it was "
                "written with other per-layer settings"
            )
        own = {name: self._own_part(saved[name], places) for name, places in self._places.items()}
        self.optimizer.load_state_dict({"children": own} if composite else own[""])

    @staticmethod
    def _own_part(saved: Mapping[str, Any], places: list[list[tuple[int, int]]]) -> dict[str, Any]:
        groups = saved["param_groups"]
        if [len(group["params"]) for group in groups] != [len(group) for group in places]:
            raise ValueError("the checkpoint's optimizer has other parameter groups: it was written for other layers")
        state = {here: saved["state"][w] for group in places for w, here in group if here >= 0 and w in saved["state"]}
        own = [[here for _, here in group if here >= 0] for group in places]
        return {
            "state": state,
            "param_groups": [{**group, "params": params} for group, params in zip(groups, own, strict=True)],
        }


@torch.no_grad()
def gathered_tensors(own: dict[str, Tensor], group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """The tensors of all processes by name, on the first process; elsewhere one's own. All of them must call it."""
    every: list[Any] | None = [None] * dist.get_world_size(group) if dist.get_rank(group) == 0 else None
    first = 0 if group is None else dist.get_global_rank(group, 0)
    dist.gather_object({name: tensor.cpu() for name, tensor in own.items()}, every, first, group=group)
    return own if every is None else {name: tensor for each in every for name, tensor in each.items()}
