"""Layer parallelism: every process owns some neighbouring layers and nothing of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_altmin.altmin import AltMin
from lightning_altmin.codes import CodeProblem
from lightning_altmin.engines import BatchState, Gradients
from lightning_altmin.guard import Buffers, is_bad
from lightning_altmin.losses import LossAt
from lightning_altmin.network import Stage
from lightning_altmin.optim import clear_gradients, equal_groups_merged
from lightning_altmin.strategies.agreement import Signature, refuse_differences
from lightning_altmin.strategies.border import Border
from lightning_altmin.weights import WeightProblem


@dataclass
class _MicroBatch:
    """What a process knows of some samples: the inputs and outputs of its stages, and the moves of these codes.

    ``inputs[i]`` is the code below its i-th stage and ``outputs[i]`` the one above.
    """

    y: Any
    samples: int
    loss: LossAt = field(init=False)
    """At the output of this process's last stage."""
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    states: list[BatchState] = field(default_factory=list)
    moves: list[Tensor | None] = field(default_factory=list)
    """Of the code below the first stage, between the first and the second, and so on up to that above the last one."""
    signals: list[Tensor | None] = field(default_factory=list)


class LayerParallel:
    """Trains a model whose stages are dealt out among processes; the result is that of one process.

    Each process keeps the parameters, gradients and optimizer state of its own stages only. Forward codes go up and
    moves of codes go down across the borders, point to point and asynchronously; the weight steps of all stages run at
    the same time. A batch is cut into ``micro_batches``: while a process works on one, its neighbours work on others.
    That is exact, because the codes of a sample do not depend on the batch it comes in. One small all-reduce per batch
    carries the verdict, the loss and the measured curvatures, so that a bad batch changes nothing anywhere.

    Args:
        core: The whole model, made alike on all processes; parameters of other processes' stages are emptied in it.
        micro_batches: Parts that a batch is cut into, >= 1. More parts wait less, and are less efficient each.
        costs: Relative cost of each stage, to balance the processes by; the number of parameters if not given.
        group: The processes, in the order of the layers; all if not given.

    Every process must be given the same batches.

    Raises:
        ValueError: If there are fewer stages than processes, a BatchNorm is in training mode, or a setting is not
            supported: several weight steps per batch, ``compile``, an objective that is not per sample.
        RuntimeError: If processes differ in the model or the library's version.
    """

    def __init__(
        self,
        core: AltMin,
        micro_batches: int = 4,
        costs: Sequence[float] | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        if not isinstance(micro_batches, int) or micro_batches < 1:
            raise ValueError(f"micro_batches must be an integer >= 1, got {micro_batches}")
        self._group = group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        _refuse_unsupported(core, self.world)
        refuse_differences(Signature.of(core), group)
        self.core = core
        self.micro_batches = micro_batches
        bounds = balanced(_costs(core.coded.stages) if costs is None else costs, self.world)
        self.first, self.last = bounds[self.rank]
        self.stages: list[Stage] = core.coded.stages[self.first : self.last + 1]
        self._owners = [rank for rank, (low, high) in enumerate(bounds) for _ in range(low, high + 1)]
        for owner, stage in zip(self._owners, core.coded.stages, strict=True):
            if owner != self.rank:
                for parameter in stage.parameters():
                    parameter.data = parameter.data.new_empty(0)
        self.optimizer: Optimizer = core.weights.optimizer(self.stages)
        self._below = Border(self.rank - 1, group) if self.rank > 0 else None
        self._above = Border(self.rank + 1, group) if self.rank < self.world - 1 else None

    # ---------------------------------------------------------------- training

    @torch.no_grad()
    def step(self, x: Tensor, y: Any) -> Tensor:
        """Train on one mini-batch, the same on all processes.

        Args:
            x: Inputs, shape ``(batch, *features)``.
            y: Targets, first dimension ``batch``.

        Returns:
            The loss before the step, on all processes.

        Raises:
            NonFiniteError: If the batch is bad and the model's policy is ``"raise"``; nothing is changed.
        """
        core, number = self.core, self.core.batches_seen
        core.batches_seen += 1
        measures = core.codes.measures(number)
        buffers = Buffers([m for m in core.codes.modules() if m._buffers])
        parts = [self._encode(*part) for part in _cut(x, y, self.micro_batches)]
        weights = [core.local_loss.weight(p.outputs[-1], p.y) if self._above is None else x.new_ones(()) for p in parts]
        gradients: list[Gradients] = []
        for part, weight in zip(parts, weights, strict=True):
            self._solve(part, measures)
            gradients.append(self._gradients(part, x.shape[0], weight / sum(weights)))
        total = [(same[0][0], _sum([g for _, g in same])) for same in zip(*gradients, strict=True)]
        loss = x.new_zeros(())
        if self._above is None:
            means = [part.loss.mean() for part in parts]
            loss = _sum([_share(m, w / sum(weights)) for m, w in zip(means, weights, strict=True)])
        loss, bad = self._agree(loss, is_bad(total, [loss]), measures)
        for border in (self._below, self._above):
            if border is not None:
                border.flush()
        admitted = core.guard.admit(number, total, bad, buffers)
        for parameter, gradient in admitted:
            parameter.grad = gradient
        with core.guard.protect(self.optimizer), equal_groups_merged(self.optimizer):
            self.optimizer.step()
        clear_gradients(self.optimizer)
        return loss

    def _encode(self, x: Tensor, y: Any) -> _MicroBatch:
        part = _MicroBatch(y, x.shape[0])
        code = x if self._below is None else self._below.receive(x.device)
        for stage in self.stages:
            part.inputs.append(code)
            code, state = stage.encode(code)
            part.outputs.append(code)
            part.states.append(state)
        loss = self.core.local_loss
        if self._above is None:
            loss.check(code, y)
            part.loss = loss.at(code, y)
        else:
            part.loss = LossAt(loss, code, y)  # asked for nothing here, as ``code`` is not the network's output
            self._above.send(code)
        return part

    def _solve(self, part: _MicroBatch, measures: bool) -> None:
        """Move the codes below this process's stages, from the top down."""
        own = len(self.stages)
        part.moves, part.signals = [None] * (own + 1), [None] * (own + 1)
        if self._above is not None:
            part.moves[own] = self._above.receive(part.outputs[-1].device)
            share = self._above.receive(part.outputs[-1].device)
            part.signals[own] = share.squeeze() if share.numel() else None  # a scalar promotes no type
        for index in range(own - 1, -1, -1):
            if self.first + index == 0:
                continue  # below the lowest stage is the input, which stays
            problem = CodeProblem(
                objective=self.core.objective,
                above=self.stages[index],
                state=part.states[index],
                forward=part.inputs[index],
                forward_output=part.outputs[index],
                target_move=part.moves[index + 1],
                loss=part.loss,
                level=self.first + index - 1,
                measures=measures,
                signal=part.signals[index + 1],
            )
            part.moves[index] = self.core.codes.solve(problem)
            above = part.signals[index + 1]
            part.signals[index] = above if problem.rate is None else problem.rate * (1.0 if above is None else above)
        if self._below is not None and (move := part.moves[0]) is not None:
            self._below.send(move)
            signal = part.signals[0]
            self._below.send(move.new_empty(0) if signal is None else signal.reshape(1))

    def _gradients(self, part: _MicroBatch, samples: int, loss_share: Tensor) -> Gradients:
        """This part's share of each own stage's local gradient."""
        gradients: Gradients = []
        weights = self.core.weights
        for index, stage in enumerate(self.stages):
            forward = part.inputs[index]
            move = part.moves[index] if weights.inputs_of(stage) == "moved" else None
            problem = WeightProblem(
                objective=self.core.objective,
                stage=stage,
                state=part.states[index],
                forward_input=forward,
                forward_output=part.outputs[index],
                move=part.moves[index + 1],
                input_move=move,
                loss=part.loss,
                signal=part.signals[index + 1],
            )
            own = weights.gradients(problem)
            if stage.is_output:
                gradients += [(p, _share(g, loss_share)) for p, g in own]
            else:
                gradients += [(p, g.mul_(part.samples / samples)) for p, g in own]
        return gradients

    def _agree(self, loss: Tensor, bad: Tensor, measures: bool) -> tuple[Tensor, Tensor]:
        """Loss and verdict on all processes; what they have measured of their own codes is learned by all."""
        sums = list(self.core.codes.measured()) if measures else []
        flat = torch.cat([part.reshape(-1).double() for part in (*sums, loss, bad)])
        dist.all_reduce(flat, group=self._group)
        *reduced, loss_sum, verdict = flat.split([*(part.numel() for part in sums), 1, 1])  # type: ignore[no-untyped-call]
        if measures:
            self.core.codes.learn([r.view_as(s) for r, s in zip(reduced, sums, strict=True)])
        return loss_sum.squeeze().to(loss.dtype), verdict.squeeze() > 0

    # ---------------------------------------------------------------- the whole model

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """The network's output in the modules' current mode, on all processes."""
        part = self._encode_only(x)
        shape: list[Any] = [part.shape]
        top = self.world - 1
        source = top if self._group is None else dist.get_global_rank(self._group, top)
        dist.broadcast_object_list(shape, src=source, group=self._group)
        output = part if self._above is None else part.new_empty(shape[0])
        dist.broadcast(output, source, group=self._group)
        return output

    def _encode_only(self, x: Tensor) -> Tensor:
        code = x if self._below is None else self._below.receive(x.device)
        for stage in self.stages:
            code, _ = stage.encode(code)
        if self._above is not None:
            self._above.send(code)
            self._above.flush()
        return code

    @torch.no_grad()
    def gathered(self) -> dict[str, Tensor]:
        """The whole network's parameters by name, on all processes: what ``network.load_state_dict`` takes anywhere."""
        owners = {id(p): r for r, s in zip(self._owners, self.core.coded.stages, strict=True) for p in s.parameters()}
        found = {}
        for name, parameter in self.core.network.named_parameters():
            rank = owners[id(parameter)]
            source = rank if self._group is None else dist.get_global_rank(self._group, rank)
            shape: list[Any] = [parameter.shape]
            dist.broadcast_object_list(shape, src=source, group=self._group)
            whole = parameter.detach().clone() if rank == self.rank else parameter.new_empty(shape[0])
            dist.broadcast(whole, source, group=self._group)
            found[name] = whole
        return found


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


def _costs(stages: Sequence[Stage]) -> list[float]:
    return [float(sum(p.numel() for p in stage.parameters())) for stage in stages]


def _cut(x: Tensor, y: Any, parts: int) -> list[tuple[Tensor, Any]]:
    return list(zip(x.chunk(parts), y.chunk(parts), strict=True))


def _share(mean: Tensor, share: Tensor) -> Tensor:
    """``share * mean``, and zero where all labels of a part are ignored, which makes their mean 0/0."""
    return torch.where(share == 0, torch.zeros_like(mean), mean * share)


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor if total is tensors[0] else total.add_(tensor)
    return total


def _refuse_unsupported(core: AltMin, world: int) -> None:
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in core.network.modules()):
        raise ValueError(
            "LayerParallel cuts a batch into parts, and a BatchNorm in training mode would normalise each part by "
            "itself: use LayerNorm or GroupNorm, put the BatchNorm into eval mode, or use DataParallel"
        )
    if not core.coded.one_code_per_stage:
        raise ValueError("LayerParallel needs a code per layer, and a recurrent layer has one per time step")
    if core.weights.steps > 1:
        raise ValueError(f"LayerParallel takes one weight step per batch, weights.steps is {core.weights.steps}")
    if core._compiled is not None:
        raise ValueError("LayerParallel runs the phases of a batch on several processes: use compile=False")
    if not core.objective.per_sample:
        raise ValueError(f"{type(core.objective).__name__} depends on the size of a batch, which LayerParallel cuts up")
    if world > len(core.coded.stages):
        raise ValueError(f"{len(core.coded.stages)} layers cannot be dealt out to {world} processes")
