"""What callbacks ask of a run over a stream, refused by name if it is not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_altmin.altmin import AltMin
from lightning_altmin.continual.data_module import StreamDataModule, TaskStreamDataModule
from lightning_altmin.strategies.layer_parallel_strategy import LayerParallelStrategy
from lightning_altmin.trainer.progress import TrainerProgress


def stream_data(trainer: Trainer, callback: Callback) -> StreamDataModule:
    """The data module of the stream.

    Raises:
        MisconfigurationException: If the run has none.
    """
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, StreamDataModule):
        raise MisconfigurationException(
            f"{type(callback).__name__} needs a stream: trainer.fit(model, datamodule=TaskStreamDataModule(...)) or "
            f"OnlineTaskStreamDataModule, got {type(data).__name__}"
        )
    return data


def task_stream_data(trainer: Trainer, callback: Callback) -> TaskStreamDataModule:
    """The data module of a stream of tasks that have epochs.

    Raises:
        MisconfigurationException: If the run has none.
    """
    data = stream_data(trainer, callback)
    if not isinstance(data, TaskStreamDataModule):
        raise MisconfigurationException(
            f"{type(callback).__name__} needs tasks with epochs: TaskStreamDataModule, got {type(data).__name__}"
        )
    return data


def refuse_layer_parallelism(trainer: Trainer, callback: Callback) -> None:
    """For a callback that needs all layers, their gradients or their optimizer's state.

    Raises:
        MisconfigurationException: If each process holds layers of its own.
    """
    if isinstance(trainer.strategy, LayerParallelStrategy):
        raise MisconfigurationException(
            f"{type(callback).__name__} works on all layers, which strategy 'altmin_layer_parallel' deals out among "
            "processes: remove the callback, or use strategy='ddp' or one process"
        )


def refuse_several_weight_steps(pl_module: LightningModule, callback: Callback) -> None:
    """For a callback that edits the gradients of a batch.

    Raises:
        MisconfigurationException: If the module takes several weight steps per batch.
    """
    core = getattr(pl_module, "core", None)
    if isinstance(core, AltMin) and core.weights.steps > 1:
        raise MisconfigurationException(
            f"{type(callback).__name__} edits gradients once per batch, but weights.steps={core.weights.steps} takes "
            "several weight steps: use weights with steps=1"
        )


def refuse_solved_weights(pl_module: LightningModule, callback: Callback) -> None:
    """For a callback that adds to gradients.

    Raises:
        MisconfigurationException: If the module solves for weights: what stands in ``.grad`` then is no gradient.
    """
    core = getattr(pl_module, "core", None)
    if isinstance(core, AltMin) and core.weights.sets_weights:
        raise MisconfigurationException(
            f"{type(callback).__name__} adds to gradients, but {type(core.weights).__name__} solves for the weights of "
            "some layers, which follow no gradient: use LocalGradient(), or forgetting of the memory's own "
            "(MemoryPolicy)"
        )


def inputs_and_labels(pl_module: LightningModule, batch: Any) -> tuple[Tensor, Tensor]:
    """A batch's inputs and labels, through the module's own ``unpack`` if it has one."""
    unpack = getattr(pl_module, "unpack", None)
    x, y = unpack(batch) if callable(unpack) else (batch[0], batch[1])
    return x, y


@contextmanager
def evaluating(module: LightningModule) -> Iterator[None]:
    """Evaluation mode, and afterwards every submodule in the mode it was in."""
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for child, mode in modes.items():
            child.training = mode


def trained_batches(trainer: Trainer) -> int:
    """Batches trained by the whole run."""
    return TrainerProgress(trainer).trained_batches()
