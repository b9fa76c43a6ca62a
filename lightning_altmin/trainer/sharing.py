"""Which processes a Trainer's strategy makes of a run, and which strategies cannot work."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)

from lightning_altmin.parallel.data_parallel import DataParallel
from lightning_altmin.processes import Processes
from lightning_altmin.trainer.layer_sync import synchronises_batch_norm

_WHOLE = "the closed forms of a layer's local problem read and write its parameters whole, outside the layer's forward"
_REASONS: dict[type[Any], str] = {
    FSDPStrategy: f"FSDP flattens parameters and shards them by backward hooks that never run here: {_WHOLE}",
    DeepSpeedStrategy: "DeepSpeed owns the backward pass and the optimizer step, and there is no backward pass here",
    ModelParallelStrategy: f"fully_shard leaves each process a slice of every parameter outside forward, but {_WHOLE}",
}
_ADVICE = "use strategy='ddp', which averages the local gradients"


def processes_of(trainer: Trainer, settings: str = "") -> Processes:
    """Who shares a batch in a run, its group being set up; all must have the same settings."""
    if isinstance(trainer.strategy, DDPStrategy) and trainer.world_size > 1:
        return DataParallel(None, synchronises_batch_norm(trainer), settings)
    return Processes()


def refuse_strategy(trainer: Trainer) -> None:
    """Refuse strategies that cannot work, before they have touched the model.

    Raises:
        MisconfigurationException: Naming the strategy, the reason and what to use.
    """
    strategy = trainer.strategy
    name = type(strategy).__name__
    for kind, reason in _REASONS.items():
        if isinstance(strategy, kind):
            raise MisconfigurationException(f"strategy {name} cannot train an AltMinModule: {reason}; {_ADVICE}")
    known = isinstance(strategy, SingleDeviceStrategy | DDPStrategy) or getattr(strategy, "deals_out_layers", False)
    if not known:
        raise MisconfigurationException(
            f"strategy {name} is not known to AltMinModule, which has to average local gradients itself; {_ADVICE}"
        )
