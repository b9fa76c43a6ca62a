"""What an optimizer remembers of the task before."""

from __future__ import annotations

import copy
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_altmin.continual.callbacks.stream_access import refuse_layer_parallelism, stream_data
from lightning_altmin.continual.task import Task

OptimizerPolicy = Literal["keep", "state", "full"]


class ResetOptimizerState(Callback):
    """Resets optimizers at the start of every task but the first.

    Whether momenta survive a switch changes results of every method; published numbers seldom say which it was.

    Args:
        policy: ``"keep"`` changes nothing, ``"state"`` clears momenta and step counts, ``"full"`` also puts learning
            rates, the groups' other settings and schedules back to where they were at the start of the run.

    Raises:
        ValueError: If ``policy`` is none of these.
    """

    def __init__(self, policy: OptimizerPolicy = "state") -> None:
        if policy not in ("keep", "state", "full"):
            raise ValueError(f"policy must be 'keep', 'state' or 'full', got {policy!r}")
        self.policy = policy
        self._start: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is a stream."""
        if stage == "fit":
            refuse_layer_parallelism(trainer, self)
            stream_data(trainer, self)
            self._start = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the settings at the start, unless a checkpoint brought them."""
        if not self._start:
            groups = [[_settings(group) for group in optimizer.param_groups] for optimizer in trainer.optimizers]
            schedules = [copy.deepcopy(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs]
            self._start = {"groups": groups, "schedules": schedules}

    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        """Reset."""
        if task.index == 0 or self.policy == "keep":
            return
        for optimizer in trainer.optimizers:
            optimizer.state.clear()
        if self.policy == "full":
            for optimizer, groups in zip(trainer.optimizers, self._start["groups"], strict=True):
                for group, settings in zip(optimizer.param_groups, groups, strict=True):
                    group.update(copy.deepcopy(settings))
            for config, state in zip(trainer.lr_scheduler_configs, self._start["schedules"], strict=True):
                config.scheduler.load_state_dict(copy.deepcopy(state))

    def state_dict(self) -> dict[str, Any]:
        """The settings at the start of the run."""
        return {"start": copy.deepcopy(self._start)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them over."""
        self._start = copy.deepcopy(state_dict["start"])


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {k: copy.deepcopy(v) for k, v in group.items() if k not in ("params", "param_names", "name")}
