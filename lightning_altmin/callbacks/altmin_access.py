"""What callbacks ask of the module they watch, refused by name if it is not there."""

from __future__ import annotations

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_altmin.altmin import AltMin
from lightning_altmin.engines.batch_norm_state import batch_norms
from lightning_altmin.module import AltMinModule
from lightning_altmin.parallel import DataParallel
from lightning_altmin.strategies import LayerParallelStrategy
from lightning_altmin.trainer.layer_sync import synchronises_batch_norm
from lightning_altmin.trainer.sharing import processes_of


def core_of(module: LightningModule, callback: Callback) -> AltMin:
    """The `AltMin` core of a module.

    Raises:
        MisconfigurationException: If the module has no attribute ``core`` that is one.
    """
    core = getattr(module, "core", None)
    if not isinstance(core, AltMin):
        raise MisconfigurationException(
            f"{type(callback).__name__} needs a module with an AltMin core (AltMinModule or a subclass), got "
            f"{type(module).__name__}: remove the callback, or train with AltMinModule"
        )
    return core


def altmin_module(module: LightningModule, callback: Callback) -> AltMinModule:
    """The module itself, known to be an `AltMinModule`.

    Raises:
        MisconfigurationException: If it is not.
    """
    if not isinstance(module, AltMinModule):
        raise MisconfigurationException(
            f"{type(callback).__name__} needs an AltMinModule or a subclass of it, got {type(module).__name__}: remove "
            "the callback, or train with AltMinModule"
        )
    return module


def refuse_other_processes(trainer: Trainer, callback: Callback) -> None:
    """For a callback that works with whole networks, and knows how to add up what the parts of a batch give.

    Raises:
        MisconfigurationException: If there are several processes which share anything else than batches.
    """
    if trainer.world_size > 1 and not isinstance(processes_of(trainer), DataParallel):
        raise MisconfigurationException(
            f"{type(callback).__name__} needs the whole network on every process, which strategy "
            f"{type(trainer.strategy).__name__} does not give: remove the callback, or use strategy='ddp' or "
            "Trainer(devices=1)"
        )


def refuse_synchronised_batch_norm(trainer: Trainer, module: LightningModule, callback: Callback) -> None:
    """For a callback that runs a network as an ordinary one, whose BatchNorms see the samples of one process.

    Raises:
        MisconfigurationException: If they are to see those of several.
    """
    if trainer.world_size > 1 and synchronises_batch_norm(trainer) and batch_norms([module]):
        raise MisconfigurationException(
            f"{type(callback).__name__} compares with backprop, whose BatchNorms normalise by the samples of their own "
            "process, while Trainer(sync_batchnorm=True) lets those of AltMinModule see all samples: remove the "
            "callback, or set sync_batchnorm=False"
        )


def refuse_dealt_out(trainer: Trainer, callback: Callback) -> None:
    """For a callback that reads all layers of a network, where each process holds a part of them.

    Raises:
        MisconfigurationException: If layers are dealt out among processes.
    """
    if isinstance(trainer.strategy, LayerParallelStrategy):
        raise MisconfigurationException(
            f"{type(callback).__name__} reads all layers, which strategy 'altmin_layer_parallel' deals out among "
            "processes: remove the callback, or use one process or strategy='ddp'"
        )
