"""Data parallelism: every process trains on its own samples, and all take the same step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_altmin.engines import Gradients, SharedSamples
from lightning_altmin.parallel.agreement import Signature, refuse_differences
from lightning_altmin.parallel.lost import lost_processes_named
from lightning_altmin.parallel.synchronised_samples import SynchronisedSamples
from lightning_altmin.processes import Processes

if TYPE_CHECKING:
    from lightning_altmin.altmin import AltMin
    from lightning_altmin.step import Step


class DataParallel(Processes):
    """Averages what the processes have found, weighted by samples, in one all-reduce per weight step.

    Codes are per sample, so the phases up to the gradients need nobody else, but for synchronised BatchNorms. Then one
    flat tensor carries the gradients, the loss, the running statistics of BatchNorms, whatever the solvers have
    measured over samples, and the verdict on the batch: the result is the step that one process would take on all
    samples together, whatever their number on each process, and a batch that is bad on one of them is bad on all.

    A BatchNorm without synchronisation normalises by the samples of its own process, as under PyTorch's DDP; the
    running statistics are averaged, so that processes stay equal. With ``sync_batch_norm`` it normalises by those of
    all processes, and the step is that of one process here, too. Each BatchNorm then waits for the others once in
    encode and up to four times in the weight step; with ``CodedNetwork(batch_norm="live")`` in the code step as well.

    Under the Trainer, ``strategy="ddp"`` uses this by itself. Without it::

        core = AltMin(network, loss, processes=DataParallel())
        core.processes.broadcast(core)  # not needed where all processes start with the same weights
        for x, y in my_share_of_every_batch:
            core.step(x, y)

    Args:
        group: The processes to share with; all if not given.
        sync_batch_norm: Take the batch statistics of BatchNorms over the samples of all processes. The process group
            must be there before the model is made.
        settings: Whatever else must be the same on all processes, in words; compared before the first batch.

    Every process must step equally often, on at least one sample each time.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, sync_batch_norm: bool = False, settings: str = ""
    ) -> None:
        self._group = group
        self._settings = settings
        self._samples = SynchronisedSamples(group) if sync_batch_norm else None
        self._agreed = self._shareable = False
        self._moving: list[tuple[nn.Module, str]] = []

    @property
    def count(self) -> int:
        return dist.get_world_size(self._group)

    @property
    def samples(self) -> SharedSamples | None:
        return self._samples if self._samples is not None and self.count > 1 else None

    def begin(self, core: AltMin) -> None:
        """Before the first batch, see that all processes train the same model.

        Raises:
            RuntimeError: If processes differ in the library's version, the model or its weights.
        """
        if not self._agreed:
            refuse_differences(Signature.of(core, self._settings), self._group)
            self._agreed = True
        if self._samples is not None:
            self._samples.batch = core.batches_seen

    def sum(self, vector: Tensor) -> Tensor:
        dist.all_reduce(vector, group=self._group)
        return vector

    @torch.no_grad()
    def broadcast(self, core: AltMin) -> None:
        """Give every process the parameters and buffers of the first one."""
        source = dist.get_global_rank(self._group, 0) if self._group is not None else 0
        for tensor in (*core.parameters(), *core.buffers()):
            dist.broadcast(tensor, source, group=self._group)

    @torch.no_grad()
    def share(
        self, core: AltMin, step: Step, gradients: Gradients, bad: Tensor, first: bool
    ) -> tuple[Gradients, Tensor]:
        """As `Processes.share`.

        Raises:
            ProcessLostError: If another process has ended, or has not answered within the group's timeout.
            ValueError: If a gradient is sparse, or codes depend on the batch they come in.
        """
        if not self._shareable:
            _refuse_unshareable(core, gradients)
            self._moving = self._moved_buffers(core, step)
            self._shareable = True
        outputs = {id(p) for p in core.coded.stages[-1].parameters()}
        own = [(p, g) for p, g in gradients if id(p) not in outputs]
        last = [(p, g) for p, g in gradients if id(p) in outputs]
        running = self._running_statistics(core) if first else []
        by_codes = core.codes.measured() if first and step.measures else []
        by_weights = core.weights.measured() if first else []
        weights = core.local_loss.weight(step.output, step.y)
        samples = torch.full((), float(step.x.shape[0]), device=step.loss.device)
        with lost_processes_named(step.number):
            by_samples, by_loss, sums = self._reduced(
                [g for _, g in own] + running,
                [g for _, g in last] + [step.loss],
                [*by_codes, *by_weights, bad],
                samples,
                weights,
            )
        for buffer, mean in zip(running, by_samples[len(own) :], strict=True):
            buffer.copy_(mean)
        if first:
            if step.measures:
                core.codes.learn(sums[: len(by_codes)])
            core.weights.learn(sums[len(by_codes) : -1])
            step.loss = by_loss[-1]
        parameters = [p for p, _ in (*own, *last)]
        return list(zip(parameters, by_samples[: len(own)] + by_loss[: len(last)], strict=True)), sums[-1] > 0

    def _running_statistics(self, core: AltMin) -> list[Tensor]:
        """Those that processes have each moved by samples of their own."""
        norms = core.norms if self.samples is None else []
        running = [b for norm in norms for b in (norm.running_mean, norm.running_var) if b is not None]
        return running + [b for owner, name in self._moving if (b := owner._buffers[name]) is not None]

    def _moved_buffers(self, core: AltMin, step: Step) -> list[tuple[nn.Module, str]]:
        """The network's other buffers that the first batch has moved, on any process."""
        assert step.buffers is not None
        norms, modules = set(core.norms), set(core.network.modules())
        others = [
            (owner, name, moved)
            for owner, name, moved in step.buffers.moved()
            if owner in modules and owner not in norms
        ]
        flags = torch.stack([moved for _, _, moved in others]).int() if others else torch.zeros(0)
        if others:
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group)
        return [(owner, name) for (owner, name, _), moved in zip(others, flags.tolist(), strict=True) if moved]

    def _reduced(
        self,
        by_samples: Sequence[Tensor],
        by_loss: Sequence[Tensor],
        sums: Sequence[Tensor],
        samples: Tensor,
        weight: Tensor,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Means weighted by ``samples``, means weighted by ``weight``, and sums, all over processes.

        The weights travel with what they weigh, so that one collective is enough.
        """
        parts = [*by_samples, *by_loss, *sums, samples, weight]
        dtype = torch.promote_types(by_loss[0].dtype, torch.float32)  # in which counts are exact
        flat = torch.cat([part.reshape(-1).to(dtype) for part in parts])
        middle = sum(part.numel() for part in by_samples)
        end = middle + sum(part.numel() for part in by_loss)
        flat[:middle] *= samples
        flat[middle:end] *= weight
        dist.all_reduce(flat, group=self._group)
        flat[:middle] /= flat[-2]
        flat[middle:end] /= flat[-1]
        reduced = [
            values.view_as(part).to(dtype if part.dtype == torch.bool else part.dtype)
            for values, part in zip(torch.split(flat, [part.numel() for part in parts]), parts, strict=True)
        ]
        first, second = len(by_samples), len(by_samples) + len(by_loss)
        return reduced[:first], reduced[first:second], reduced[second:-2]


def _refuse_unshareable(core: AltMin, gradients: Gradients) -> None:
    if any(gradient.is_sparse for _, gradient in gradients):
        raise ValueError(
            "sparse gradients cannot be averaged over processes in one tensor; use Embedding(sparse=False), or one "
            "process"
        )
    if not core.objective.per_sample:
        raise ValueError(
            f"{type(core.objective).__name__} divides a sample's signal by the size of its batch, so that several "
            "processes would move codes further than one; use AltMinObjective, or one process"
        )
