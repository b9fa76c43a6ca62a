"""What a memory of co-activations keeps of the tasks before."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn import Parameter

from lightning_altmin.altmin import AltMin
from lightning_altmin.arguments import check_number
from lightning_altmin.callbacks.altmin_access import core_of
from lightning_altmin.continual.callbacks.stream_access import refuse_layer_parallelism, stream_data
from lightning_altmin.continual.task import Task
from lightning_altmin.weights import CoactivationMemory, WeightSolver

Policy = Literal["keep", "decay", "reset", "window"]


class MemoryPolicy(Callback):
    """What a memory weight solver (AM-mem) does at the boundaries of tasks.

    At the start of every task but the first, statistics are discounted by the policy, or the memory is told to count
    what follows as another task and to drop those beyond its ``window``. At the end of each, memories of
    the solve form solve for their weights, whatever their ``every``, so that all samples of the task are in them; put
    this callback before those that evaluate. Layers outside ``stages`` are left alone at both, and those whose learning
    rate is 0, as `TaskLearningRates` makes it, stay what they are.

    Statistics of the output layer are all that is needed to answer for earlier tasks as long as its inputs stay what
    they were: ``"keep"`` them with frozen or slowly changing features, ``"decay"`` them where features drift, and keep
    a ``"window"`` of the last tasks where what is older no longer holds.

    Args:
        policy: ``"keep"``, ``"decay"``, ``"reset"``, or ``"window"`` for memories made with
            ``CoactivationMemory(form="solve", window=...)``.
        factor: With ``"decay"``, what the sums are multiplied by, in (0, 1).
        stages: Names of the stages whose memories it is for (see ``core.explain()``); ``None`` for all. Memories of the
            others go on as without this callback.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, policy: Policy = "keep", factor: float = 0.5, stages: list[str] | None = None) -> None:
        if policy not in get_args(Policy):
            raise ValueError(f"policy must be 'keep', 'decay', 'reset' or 'window', got {policy!r}")
        check_number("factor", factor, above=0, below=1, otherwise="policy be 'keep' for 1 or 'reset' for 0")
        self.policy = policy
        self.factor = factor
        self.stages = stages

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is a stream, and a memory to treat."""
        if stage == "fit":
            refuse_layer_parallelism(trainer, self)
            stream_data(trainer, self)
            memories = _memories(core_of(pl_module, self).weights)
            windowed = any(memory.window is not None for memory in memories)
            if windowed != (self.policy == "window"):
                raise MisconfigurationException(
                    f"policy={self.policy!r} with {'a' if windowed else 'no'} memory that has a window: "
                    "MemoryPolicy('window') and CoactivationMemory(form='solve', window=...) go together"
                )
            if unknown := set(self.stages or ()) - {stage.name for stage in core_of(pl_module, self).coded.stages}:
                raise ValueError(f"stages names unknown layers {sorted(unknown)}; see core.explain()")

    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        """Keep, discount, forget, or begin a task."""
        if task.index == 0 or self.policy == "keep":
            return
        weights: Any = core_of(pl_module, self).weights
        if self.policy == "window":
            weights.begin_task(self.stages)
        else:
            weights.discount(self.factor if self.policy == "decay" else 0.0, self.stages)

    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        """Solve for the weights."""
        core = core_of(pl_module, self)
        # A memory solves for all of its layers at once.
        kept = [(parameter, parameter.detach().clone()) for parameter in self._left_alone(trainer, core)]
        for memory in _memories(core.weights):
            if memory.form == "solve":
                memory.solve()
        with torch.no_grad():
            for parameter, before in kept:
                parameter.copy_(before)

    def _left_alone(self, trainer: Trainer, core: AltMin) -> list[Parameter]:
        outside = [s for s in core.coded.stages if self.stages is not None and s.name not in self.stages]
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        frozen = [parameter for group in groups if group["lr"] == 0 for parameter in group["params"]]
        return [parameter for stage in outside for parameter in stage.parameters()] + frozen


def _memories(weights: WeightSolver) -> list[CoactivationMemory]:
    """All memories of a solver.

    Raises:
        MisconfigurationException: If there is none.
    """
    found = [solver for solver in weights.modules() if isinstance(solver, CoactivationMemory)]
    if not found:
        raise MisconfigurationException(
            f"MemoryPolicy needs a weight solver with a memory, such as CoactivationMemory, got {weights}"
        )
    return found
