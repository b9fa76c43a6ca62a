"""``Trainer(sync_batchnorm=True)``: an AltMin core synchronises its BatchNorms itself; its modules stay in place."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import LayerSync, TorchSyncBatchNorm
from torch import nn

from lightning_altmin.altmin import AltMin


class CoreLayerSync(LayerSync):
    """Lightning's exchange of BatchNorms for synchronised ones, which passes over modules with an `AltMin` core.

    The closed forms know the modules that are there, and torch's SyncBatchNorm runs on GPUs only.

    Args:
        others: What to do with other modules, which the same Trainer may train as well.
    """

    def __init__(self, others: LayerSync) -> None:
        self._others = others

    def apply(self, model: nn.Module) -> nn.Module:
        return model if _has_core(model) else self._others.apply(model)

    def revert(self, model: nn.Module) -> nn.Module:
        return model if _has_core(model) else self._others.revert(model)


def synchronises_batch_norm(trainer: Trainer) -> bool:
    """Whether BatchNorms are to take their batch statistics over the samples of all processes."""
    return getattr(trainer.strategy, "_layer_sync", None) is not None


def keep_modules(trainer: Trainer) -> None:
    """Keep a Trainer's strategy from exchanging the BatchNorms of a module with a core; before it has begun to.

    Raises:
        MisconfigurationException: If layers are to be synchronised in a way that is not Lightning's own.
    """
    strategy: Any = trainer.strategy
    if not synchronises_batch_norm(trainer) or isinstance(strategy._layer_sync, CoreLayerSync):
        return
    if type(strategy._layer_sync) is not TorchSyncBatchNorm:
        raise MisconfigurationException(
            f"plugin {type(strategy._layer_sync).__name__} would put other modules in the place of those that the "
            "layers' closed forms know; use Trainer(sync_batchnorm=True), which synchronises BatchNorms"
        )
    strategy._layer_sync = CoreLayerSync(strategy._layer_sync)


def _has_core(model: nn.Module) -> bool:
    return isinstance(getattr(model, "core", None), AltMin)
