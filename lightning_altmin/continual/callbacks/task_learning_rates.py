"""Learning rates that fall from task to task."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_altmin.arguments import check_number
from lightning_altmin.continual.callbacks.stream_access import refuse_layer_parallelism, stream_data
from lightning_altmin.continual.task import Task


class TaskLearningRates(Callback):
    """Multiplies learning rates by a factor at the start of every task but the first.

    A memory on the output layer answers for earlier tasks as long as the features below it stay what they were: let
    them learn on the first task and less on each later one, or freeze them then (``factor=0``). Rates are the
    optimizer's own, so checkpoints hold them. Do not combine it with a schedule of the same layers.

    Args:
        factor: In [0, 1].
        stages: Names of parameter groups (of an `AltMinModule`: of stages, see ``core.explain()``) it is for; ``None``
            for all.

    Raises:
        ValueError: If ``factor`` is out of range.
    """

    def __init__(self, factor: float = 0.0, stages: Sequence[str] | None = None) -> None:
        check_number("factor", factor, least=0, most=1)
        self.factor = factor
        self.stages = None if stages is None else list(stages)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is a stream."""
        if stage == "fit":
            refuse_layer_parallelism(trainer, self)
            stream_data(trainer, self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the names."""
        names = {group.get("name") for optimizer in trainer.optimizers for group in optimizer.param_groups}
        if unknown := set(self.stages or ()) - names:
            raise MisconfigurationException(
                f"TaskLearningRates: stages names unknown parameter groups {sorted(unknown)}; the optimizer has "
                f"{sorted(str(name) for name in names)}"
            )

    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        """Lower the rates."""
        if task.index == 0:
            return
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                if self.stages is None or group.get("name") in self.stages:
                    group["lr"] *= self.factor
