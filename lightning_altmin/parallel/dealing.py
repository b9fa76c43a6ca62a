"""Which process owns which layers of a model; letting go of the tensors of others, and bringing them back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_altmin.stage import Stage

if TYPE_CHECKING:
    from lightning_altmin.altmin import AltMin


@dataclass
class _Place:
    """Where a tensor of the model lives, and whose it is."""

    owner: int
    module: nn.Module
    name: str

    def get(self) -> Tensor:
        parameter = self.module._parameters.get(self.name)
        buffer = self.module._buffers.get(self.name)
        found = buffer if parameter is None else parameter.data
        assert found is not None
        return found

    def set(self, tensor: Tensor) -> None:
        if (parameter := self.module._parameters.get(self.name)) is not None:
            parameter.data = tensor
        else:
            self.module._buffers[self.name] = tensor


class Dealing:
    """Deals out the layers of a model: tensors of layers that another process owns keep their shape and no memory.

    What is let go reads as NaN, buffers as zero, and whoever calls the network as a whole gets an error.

    Args:
        core: The whole model.
        owners: Rank of the owner of each stage, in order.
        group: The processes; all if not given.
    """

    def __init__(self, core: AltMin, owners: Sequence[int], group: dist.ProcessGroup | None) -> None:
        self.owners = list(owners)
        self._group = group
        self._rank = dist.get_rank(group)
        self._network = core.network
        self._places: list[_Place] = []
        self.foreign: set[nn.Module] = set()
        """Modules of layers that other processes own."""
        known: set[int] = set()
        for owner, stage in zip(owners, core.coded.stages, strict=True):
            holders = [m for whole in (*stage.modules, *core.weights.kept_for(stage)) for m in whole.modules()]
            if owner != self._rank:
                self.foreign.update(holders)
            for module in dict.fromkeys(holders):
                for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                    if tensor is not None and id(tensor) not in known:
                        known.add(id(tensor))
                        self._places.append(_Place(owner, module, name))
        if any(p.untyped_storage().nbytes() < p.numel() * p.element_size() for p in core.parameters()):
            raise ValueError(
                "layers of this model are held by other processes: they were dealt out before, and not brought back "
                "because that run failed. Make the model anew and load the last checkpoint"
            )
        self._handle: Any = None
        self._let_go()

    @contextmanager
    def whole(self, everywhere: bool = False) -> Iterator[None]:
        """Inside this context the first process, or every one, holds the whole model. All of them must enter it."""
        self.bring_back(everywhere)
        try:
            yield
        finally:
            self._let_go()

    @torch.no_grad()
    def bring_back(self, everywhere: bool = True) -> None:
        """End the deal: the first process, or every one, holds the whole model again. All of them must call it."""
        own = [(tuple(p.get().shape), p.get().dtype) for p in self._places if p.owner == self._rank]
        every: list[Any] = [own] * dist.get_world_size(self._group)
        dist.all_gather_object(every, own, group=self._group)
        coming = [iter(each) for each in every]
        for place in self._places:
            shape, dtype = next(coming[place.owner])
            here = place.owner == self._rank
            if not (here or everywhere or self._rank == 0):
                continue
            tensor = place.get() if here else torch.empty(shape, dtype=dtype, device=place.get().device)
            self._move(tensor, place.owner, everywhere)
            if not here:
                place.set(tensor)
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _move(self, tensor: Tensor, owner: int, everywhere: bool) -> None:
        if tensor.numel() == 0:
            return
        source, first = (r if self._group is None else dist.get_global_rank(self._group, r) for r in (owner, 0))
        sent = tensor.contiguous()
        if everywhere:
            dist.broadcast(sent, source, group=self._group)
        elif owner != 0 and self._rank == owner:
            dist.send(sent, first, group=self._group)
        elif owner != 0:
            dist.recv(sent, source, group=self._group)

    @torch.no_grad()
    def _let_go(self) -> None:
        for place in self._places:
            if place.owner != self._rank:
                tensor = place.get()
                is_parameter = place.name in place.module._parameters
                nothing = tensor.new_full((), float("nan") if is_parameter and tensor.is_floating_point() else 0)
                place.set(nothing.expand(tensor.shape))
        self._handle = self._network.register_forward_pre_hook(_refuse_call)


def _refuse_call(network: nn.Module, inputs: Any) -> None:
    raise RuntimeError(
        f"the layers of {type(network).__name__} are dealt out among processes, so that it cannot be called as a "
        "whole: call the AltMinModule, or LayerParallel.forward, on all processes"
    )


def dealt_out(costs: Sequence[float], processes: int) -> list[int]:
    """Rank of the owner of each stage: groups of neighbours, so that the dearest group is as cheap as it can be.

    Raises:
        ValueError: If there are fewer stages than processes.
    """
    bounds = balanced(costs, processes)
    return [rank for rank, (low, high) in enumerate(bounds) for _ in range(low, high + 1)]


def balanced(costs: Sequence[float], groups: int) -> list[tuple[int, int]]:
    """First and last index of each group of neighbours, so that the dearest group is as cheap as it can be.

    Raises:
        ValueError: If there are fewer costs than groups.
    """
    count = len(costs)
    if not 1 <= groups <= count:
        raise ValueError(f"{count} layers cannot be dealt out to {groups} processes: each needs one at least")
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    # best[k][n]: the dearest of k groups over the first n, and where the last of them begins
    best = [[(sums[n], 0) for n in range(count + 1)]]
    for k in range(1, groups):
        row = [(float("inf"), 0)] * (count + 1)
        for n in range(k + 1, count + 1):
            row[n] = min((max(best[-1][m][0], sums[n] - sums[m]), m) for m in range(k, n))
        best.append(row)
    cuts = [count]
    for row in reversed(best):
        cuts.append(row[cuts[-1]][1])
    return [(low, high - 1) for low, high in pairwise(reversed(cuts))]


def stage_costs(core: AltMin, x: Tensor | None = None) -> list[float]:
    """Relative cost of each stage: a forward pass, a weight gradient, and above the first a code step.

    Where the weight step reads moved codes, their change is passed through the layer once more.

    Args:
        core: The model.
        x: A few inputs; with them operations are counted, which convolutions need. Otherwise parameters are.
    """
    stages = core.coded.stages
    passes = [2.0] + [4.0 if core.weights.inputs_of(stage) == "moved" else 3.0 for stage in stages[1:]]
    if x is None:
        work: Callable[[Stage], float] = lambda stage: float(sum(p.numel() for p in stage.parameters()))  # noqa: E731
        return [times * work(stage) for times, stage in zip(passes, stages, strict=True)]
    found = []
    with torch.no_grad(), core.coded.evaluating():
        for stage, times in zip(stages, passes, strict=True):
            with FlopCounterMode(display=False) as counter:
                x, _ = stage.encode(x)
            found.append(times * max(float(counter.get_total_flops()), 1.0))
    return found
