"""Layer parallelism: every process owns some neighbouring layers and nothing of the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from lightning_altmin.altmin import AltMin
from lightning_altmin.arguments import check_count, check_number
from lightning_altmin.engines import Gradients
from lightning_altmin.guard import Buffers, is_bad
from lightning_altmin.losses import LossAt
from lightning_altmin.optim import clear_gradients, equal_groups_merged
from lightning_altmin.parallel.agreement import Signature, refuse_differences
from lightning_altmin.parallel.border import Border
from lightning_altmin.parallel.cutting import cut, mark_of, refuse_batch_statistics, refuse_uncuttable
from lightning_altmin.parallel.dealing import Dealing, dealt_out, stage_costs
from lightning_altmin.parallel.lost import lost_processes_named
from lightning_altmin.parallel.own_layers import OwnLayers, gathered_tensors
from lightning_altmin.stage import Stage
from lightning_altmin.step import Step


@dataclass
class PipelinedStep(Step):
    """A batch in parts: what this process knows of it. Codes of layers that others own are placeholders."""

    parts: list[Step] = field(default_factory=list, repr=False)


class LayerParallel:
    """Trains a model whose stages are dealt out among processes; the result is that of one process.

    Each process keeps the parameters, gradients, optimizer state and memories of its own stages only. Forward codes go
    up and moves of codes go down across the borders, point to point and asynchronously; the weight steps of all stages
    run at the same time. A batch is cut into ``micro_batches``: while a process works on one, its neighbours work on
    others. That is exact, because the codes of a sample do not depend on the batch it comes in. One small all-reduce
    per batch carries the verdict, the loss and the measured curvatures, so that a bad batch changes nothing anywhere.
    Nothing else holds a process back: after its own weight step it encodes the next batch while others still update.

    The phases are those of `AltMin`, and so is `step`. Under the Trainer ``strategy="altmin_layer_parallel"`` does all
    this.

    Args:
        core: The whole model, made alike on all processes; tensors of other processes' stages are let go.
        micro_batches: Parts that a batch is cut into, >= 1. More parts wait less, and are less efficient each.
        costs: Relative cost of each stage, to balance the processes by; see `stage_costs`, which counts parameters and
            is used if not given.
        group: The processes, in the order of the layers; all if not given.

    Every process must be given the same batches. Random numbers that a layer draws depend on the torch seed, the batch,
    the layer and the micro-batch, and not on the number of processes; the global generator is left as it was.

    Raises:
        ValueError: If there are fewer stages than processes, a BatchNorm is in training mode, or a setting is not
            supported: several weight steps per batch, ``compile``, an objective that is not per sample, or a second way
            to share batches.
        RuntimeError: If processes differ in the model or the library's version.
    """

    def __init__(
        self,
        core: AltMin,
        micro_batches: int = 4,
        costs: Sequence[float] | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        check_count("micro_batches", micro_batches)
        self._group = group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        stages = core.coded.stages
        if costs is not None:
            if len(costs) != len(stages):
                raise ValueError(f"costs must name one number per stage, {len(stages)} of them, got {len(costs)}")
            for index, cost in enumerate(costs):
                check_number(f"costs[{index}]", cost, least=0)
        refuse_uncuttable(core, self.world)
        refuse_differences(Signature.of(core), group)
        self.core = core
        self.micro_batches = micro_batches
        optimizer = core.make_optimizer()  # before anything is let go: it may look at the parameters
        self._deal = Dealing(core, dealt_out(stage_costs(core) if costs is None else costs, self.world), group)
        own = [index for index, owner in enumerate(self._deal.owners) if owner == self.rank]
        self.first, self.last = own[0], own[-1]
        self.stages: list[Stage] = stages[self.first : self.last + 1]
        self._own_optimizer = self._left_with_own(optimizer)
        self._buffer_owners = [module for module in core.buffer_owners if module not in self._deal.foreign]
        self._below = Border(self.rank - 1, group) if self.rank > 0 else None
        self._above = Border(self.rank + 1, group) if self.rank < self.world - 1 else None
        self._borders = [border for border in (self._below, self._above) if border is not None]

    # ---------------------------------------------------------------- training

    @torch.no_grad()
    def step(self, x: Tensor, y: Any) -> Tensor:
        """Train on one mini-batch, the same on all processes: encode, solve codes, fill gradients, optimizer step.

        Args:
            x: Inputs, shape ``(batch, *features)``.
            y: Targets, first dimension ``batch``.

        Returns:
            The loss before the step, on all processes.

        Raises:
            NonFiniteError: If the batch is bad and the model's policy is ``"raise"``; nothing is changed.
            ProcessLostError: If another process has ended, or has not answered within the group's timeout.
        """
        step = self.encode(x, y)
        with step.undone_on_error():
            self.solve_codes(step)
            clear_gradients(self.optimizer)
            self.fill_gradients(step)
            with self.core.guard.protect(self.optimizer), equal_groups_merged(self.optimizer):
                self.optimizer.step()
        clear_gradients(self.optimizer)
        return step.loss

    @torch.no_grad()
    def encode(self, x: Tensor, y: Any, keep_codes: bool = False) -> PipelinedStep:
        """Phase 1: each part's code comes from below and goes on upwards, while the neighbours encode other parts.

        Raises:
            ValueError: If codes are asked for, which are spread over processes, or the batch cannot be used.
        """
        if keep_codes:
            raise ValueError("keep_codes: each process knows the codes of its own layers only; train on one process")
        core = self.core
        refuse_batch_statistics(core)
        if not core.split_verified:
            with self._deal.whole(everywhere=True):
                core.coded.verify_split(x)
            core.split_verified = True
        if x.shape[0] == 0:
            raise ValueError(f"the batch is empty: x has shape {tuple(x.shape)}")
        number, buffers = core.batches_seen, Buffers(self._buffer_owners)
        measures = core.codes.measures(number)
        for border in self._borders:
            border.batch = number
        with buffers.restored_on_error():
            parts = [
                self._encode_part(part_x, part_y, measures, index)
                for index, (part_x, part_y) in enumerate(cut(x, y, self.micro_batches))
            ]
            step = self._joined(x, y, parts)
        step.measures, step.number, step.buffers = measures, number, buffers
        core.batches_seen += 1
        return step

    @torch.no_grad()
    def solve_codes(self, step: Step) -> None:
        """Phase 2: each part's move comes from above; the codes below one's own stages move, and the lowest goes on."""
        assert isinstance(step, PipelinedStep)
        top = self.core.coded.depth - 1
        for part in step.parts:
            if self._above is not None:
                part.moves[self.last] = self._above.receive(step.x.device)
                share = self._above.receive(step.x.device)
                part.signals[self.last] = share.squeeze() if share.numel() else None  # a scalar promotes no type
            for level in range(min(self.last - 1, top), max(self.first - 1, 0) - 1, -1):
                self.core.move_code(part, level)
            if self._below is not None:
                self._below.send(part.moves[self.first - 1])
                signal = part.signals[self.first - 1]
                self._below.send(step.x.new_empty(0) if signal is None else signal.reshape(1))
        for level in range(max(self.first - 1, 0), min(self.last, top) + 1):
            step.moves[level] = torch.cat([part.moves[level] for part in step.parts])
            step.signals[level] = step.parts[0].signals[level]
        step.parts.clear()

    @torch.no_grad()
    def fill_gradients(self, step: Step, inner: int = 0) -> bool:
        """Phase 3: gradients of one's own stages, judged by all processes together.

        Returns:
            Whether the batch was admitted, as `AltMin.fill_gradients`.
        """
        core = self.core
        gradients: Gradients = []
        for level in range(self.last, self.first - 1, -1):
            gradients += core.passing_gradients(step, level)
        gradients = core.weights.complete(gradients)
        evidence = [step.loss, *core.weights.evidence()]
        if step.y is not step.given:
            evidence += core.local_loss.evidence(step.output, step.given)
        bad = is_bad(gradients, evidence)
        bad = self._agree(step, bad)
        assert step.buffers is not None
        admitted = core.guard.admit(step.number, 0, gradients, bad, step.buffers)
        for parameter, gradient in admitted:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return bool(admitted) or not gradients

    def _encode_part(self, x: Tensor, y: Any, measures: bool, index: int) -> Step:
        core, depth = self.core, self.core.coded.depth
        code = x if self._below is None else self._below.receive(x.device)
        nothing = x.new_empty(0)
        codes, states = [nothing] * (depth + 1), [None] * (depth + 1)
        if self.first > 0:
            codes[self.first - 1] = code
        with self._seeded(index, x.device) as seed:
            for level, stage in enumerate(self.stages, self.first):
                seed(level)
                code, states[level] = stage.encode(code)
                codes[level] = code
        if self._above is not None:
            self._above.send(code)
            loss_at = LossAt(core.local_loss, code, y)  # asked for nothing: ``code`` is not the network's output
        else:
            core.local_loss.check(code, y)
            if x.device.type != "cpu":
                y = core.local_loss.readable(code, y)
            loss_at = core.local_loss.at(code, y)
        return Step(
            x,
            y,
            code if self._above is None else nothing,
            x.new_zeros(()),
            codes[:-1],
            [nothing] * depth,
            loss_at,
            code_steps=[None] * depth,
            signals=[None] * depth,
            margins=[None] * depth,
            states=states,
            keeps=False,
            measures=measures,
        )

    def _joined(self, x: Tensor, y: Any, parts: list[Step]) -> PipelinedStep:
        """The whole batch, as its weight problems see it."""
        core, depth = self.core, self.core.coded.depth
        nothing = x.new_empty(0)
        codes = [nothing] * depth
        states: list[Any] = [None] * (depth + 1)
        for level in range(max(self.first - 1, 0), min(self.last, depth - 1) + 1):
            codes[level] = torch.cat([part.codes_forward[level] for part in parts])
        for level, stage in enumerate(self.stages, self.first):
            states[level] = stage.engine.joined([part.states[level] for part in parts])
        output, loss, given = nothing, x.new_zeros(()), y
        loss_at = parts[0].loss_at
        if self._above is None:
            output = torch.cat([part.output for part in parts])
            core.local_loss.check(output, y)
            if x.device.type != "cpu":
                y = core.local_loss.readable(output, y)
            loss_at = core.local_loss.at(output, y)
            loss = loss_at.mean()
        return PipelinedStep(
            x,
            y,
            output,
            loss,
            codes,
            [nothing] * depth,
            loss_at,
            code_steps=[None] * depth,
            signals=[None] * depth,
            margins=[None] * depth,
            states=states,
            given=given,
            keeps=False,
            parts=parts,
        )

    def _agree(self, step: Step, bad: Tensor) -> Tensor:
        """The verdict of all processes; they share the loss, what they have measured, and whether the batch is one."""
        core = self.core
        by_codes = list(core.codes.measured()) if step.measures else []
        by_weights = list(core.weights.measured())
        mark = mark_of(step.x, step.given)
        parts = [*by_codes, *by_weights, step.loss, bad, mark]
        flat = torch.cat([part.reshape(-1).double() for part in parts])
        with lost_processes_named(step.number):
            dist.all_reduce(flat, group=self._group)
        for border in self._borders:
            border.flush()
        split: Any = flat.split
        sums = [value.view_as(part) for value, part in zip(split([p.numel() for p in parts]), parts, strict=True)]
        if step.x.device.type == "cpu" and not torch.isclose(sums[-1], mark * self.world, rtol=1e-6, atol=1e-6):
            raise RuntimeError(
                f"batch {step.number} is not the same on all processes: under layer parallelism every process reads "
                "the whole of every batch. Give all of them the same seed, and no DistributedSampler"
            )
        if step.measures:
            core.codes.learn(sums[: len(by_codes)])
        core.weights.learn(sums[len(by_codes) : -3])
        step.loss = sums[-3].to(step.loss.dtype)
        return sums[-2] > 0

    @contextmanager
    def _seeded(self, part: int, device: torch.device) -> Iterator[Callable[[int], object]]:
        """Inside, each layer draws from numbers of its own; afterwards the global generator is as it was.

        So the generators of all processes stay equal, whatever layers they hold, and with them the order of their data.
        """
        batch = torch.initial_seed() % 2**31 * 2**31 + self.core.batches_seen
        base = (batch * self.micro_batches + part) * len(self.core.coded.stages)
        on_cuda = device.type == "cuda"
        # Not torch.manual_seed, which takes a millisecond where CUDA is there and not used.
        generator = torch.cuda.default_generators[device.index or 0] if on_cuda else torch.default_generator
        with torch.random.fork_rng(devices=[device] if on_cuda else []):
            yield lambda level: generator.manual_seed((base + level) % 2**63)

    # ---------------------------------------------------------------- the optimizer

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer of `step`: groups of all layers, with the parameters of one's own."""
        return self._own_optimizer.optimizer

    def make_optimizer(self) -> Optimizer:
        """A new one, which from now on is `optimizer`."""
        self._own_optimizer = self._left_with_own(self.core.make_optimizer())
        return self.optimizer

    def _left_with_own(self, optimizer: Optimizer) -> OwnLayers:
        stages = zip(self._deal.owners, self.core.coded.stages, strict=True)
        return OwnLayers(optimizer, {id(p): owner for owner, s in stages for p in s.parameters()}, self._group)

    def optimizer_state(self) -> dict[str, Any]:
        """The whole optimizer's state as one process has it, on the first process; all of them must call it."""
        return self._own_optimizer.gathered()

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """Take one's own part of what `optimizer_state`, or one process, has saved."""
        self._own_optimizer.load(state)

    # ---------------------------------------------------------------- the whole model

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """The network's output in the modules' current mode, on all processes, which must all call it."""
        refuse_batch_statistics(self.core)
        outputs = []
        for index, part in enumerate(x.chunk(self.micro_batches)):
            code = part if self._below is None else self._below.receive(x.device)
            with self._seeded(index, x.device) as seed:
                for level, stage in enumerate(self.stages, self.first):
                    seed(level)
                    code, _ = stage.encode(code)
            if self._above is None:
                outputs.append(code)
            else:
                self._above.send(code)
        output = torch.cat(outputs) if outputs else x
        shape: list[Any] = [(tuple(output.shape), output.dtype)]
        top = self.world - 1
        source = top if self._group is None else dist.get_global_rank(self._group, top)
        dist.broadcast_object_list(shape, src=source, group=self._group)
        if self._above is not None:
            output = torch.empty(shape[0][0], dtype=shape[0][1], device=x.device)
            self._above.flush()
        dist.broadcast(output, source, group=self._group)
        return output

    __call__ = forward

    def whole(self) -> Any:
        """A context in which the first process holds the whole model, to save it; all of them must enter it."""
        return self._deal.whole()

    def bring_back(self) -> None:
        """End layer parallelism: every process holds the whole model again. All of them must call it."""
        self._deal.bring_back()

    @torch.no_grad()
    def gathered(self) -> dict[str, Tensor]:
        """The whole network's parameters by name, on all processes: what ``network.load_state_dict`` takes anywhere."""
        with self._deal.whole(everywhere=True):
            return {name: p.detach().clone() for name, p in self.core.network.named_parameters()}

    def pending_gradients(self) -> dict[str, Tensor]:
        """As `AltMin.pending_gradients`, on the first process, of all layers; all of them must call it."""
        return gathered_tensors(self.core.pending_gradients(), self._group)

    def restore_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """As `AltMin.restore_gradients`, of one's own layers."""
        own = {id(p) for stage in self.stages for p in stage.parameters()}
        names = [name for name, p in self.core.named_parameters() if id(p) in own]
        self.core.restore_gradients({name: gradients[name] for name in names if name in gradients})
