"""Trainer features that cannot work with alternating minimization, refused by name before training starts."""

from __future__ import annotations

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint, ModelPruning, StochasticWeightAveraging
from lightning.pytorch.tuner.lr_finder import _LRCallback

from lightning_altmin.network import CodedNetwork

_PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed")


def refuse_replaced(trainer: Trainer) -> None:
    """Refuse Trainer arguments that this module's own arguments replace; Lightning refuses them without naming those.

    Raises:
        MisconfigurationException: Naming the argument to use.
    """
    clip = trainer.gradient_clip_val
    if clip:
        raise MisconfigurationException(
            f"Trainer(gradient_clip_val={clip}) would clip all layers by one norm, but their problems are independent: "
            f"use AltMinModule(gradient_clip_norm={clip}), which clips each layer by its own"
        )
    batches = trainer.accumulate_grad_batches
    if batches != 1:
        raise MisconfigurationException(
            f"Trainer(accumulate_grad_batches={batches}) has no effect under manual optimization: use "
            f"AltMinModule(accumulate_batches={batches})"
        )


def refuse_unsupported(trainer: Trainer, coded: CodedNetwork) -> None:
    """Check what is known before the optimizer exists.

    Raises:
        MisconfigurationException: Naming the setting, why it cannot work, and what to use.
    """
    if trainer.precision not in _PRECISIONS:
        raise MisconfigurationException(
            f"precision={trainer.precision!r} is not supported: parameters and codes of 16 bits lose most updates. Use "
            f"one of {_PRECISIONS}"
        )
    by_autograd = [stage.name for stage in coded.stages if stage.engine.kind != "closed_form"]
    if trainer.precision in ("bf16-mixed", "16-mixed") and by_autograd:
        raise MisconfigurationException(
            f"precision={trainer.precision!r} needs closed forms, but stages {by_autograd} are differentiated by "
            "autograd, which would round a code's move away. Use precision='32-true'"
        )
    if trainer.strategy.root_device.type == "mps":
        raise MisconfigurationException(
            "AltMinModule keeps mu and step lengths in double precision, which Apple's MPS devices do not have; use "
            "Trainer(accelerator='cpu')"
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, LearningRateFinder | _LRCallback):
            raise MisconfigurationException(
                "the learning-rate finder steps a schedule that manual optimization never steps, so it would not "
                "sweep; compare a few rates over short runs instead"
            )
        if isinstance(callback, ModelPruning):
            raise MisconfigurationException(
                "ModelPruning replaces the parameters that the closed forms fill with gradients, so pruned layers "
                "would no longer be trained; prune the trained network with torch.nn.utils.prune instead"
            )
        if isinstance(callback, StochasticWeightAveraging):
            raise MisconfigurationException(
                "StochasticWeightAveraging would average but never anneal its rate under manual optimization; use "
                "the WeightAveraging callback"
            )
        if isinstance(callback, ModelCheckpoint) and callback._train_time_interval is not None:
            raise MisconfigurationException(
                "ModelCheckpoint(train_time_interval=...) is ignored by Lightning under manual optimization; use "
                "every_n_train_steps or every_n_epochs"
            )


def refuse_skipping_in_groups(trainer: Trainer) -> None:
    """For a module that skips bad batches and accumulates: on accelerators a verdict covers the whole group.

    Raises:
        MisconfigurationException: If the device is not the CPU.
    """
    if trainer.strategy.root_device.type != "cpu":
        raise MisconfigurationException(
            "nonfinite='skip' with accumulate_batches > 1 works on the CPU only: on an accelerator one bad batch would "
            "discard its whole group. Use nonfinite='raise' or accumulate_batches=1"
        )
