"""Training with and without an interruption, and everything that must be the same afterwards."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from tests.module.problems import trainer as make_trainer

State = dict[str, Any]


class SaveAt(Checkpoint):
    """Saves one checkpoint, in the ``call``-th call of a hook."""

    def __init__(self, hook: str, call: int, path: Path) -> None:
        self.saved = False
        calls = 0

        def save(trainer: Trainer, *rest: Any) -> None:
            nonlocal calls
            if trainer.sanity_checking:
                return
            calls += 1
            if calls == call:
                trainer.save_checkpoint(path)
                self.saved = True

        setattr(self, hook, save)


class DrawEachBatch(Callback):
    """Draws from every generator in every batch, as augmentations do, and remembers what it drew."""

    def __init__(self) -> None:
        self.draws: list[tuple[int, float, float, float]] = []

    def on_train_batch_start(self, trainer: Trainer, *rest: Any) -> None:
        batch = trainer.fit_loop.total_batch_idx
        self.draws.append((batch, random.random(), float(np.random.normal()), float(torch.rand(()))))


def run(
    module: LightningModule, data: dict[str, Any], callbacks: list[Callback], ckpt: Path | None, seed: int, **flags: Any
) -> tuple[State, list[tuple[int, float, float, float]]]:
    """Fit, and return the final state and the draws of every batch."""
    seed_everything(seed, verbose=False)
    draws = DrawEachBatch()
    checkpointing = any(isinstance(callback, Checkpoint) for callback in callbacks)
    defaults = {"limit_val_batches": None, "enable_checkpointing": checkpointing}
    trainer = make_trainer(callbacks=[draws, *callbacks], **(defaults | flags))
    trainer.fit(module, ckpt_path=ckpt, weights_only=True if ckpt else None, **data)
    return final_state(trainer, module), draws.draws


def final_state(trainer: Trainer, module: LightningModule) -> State:
    """Everything that exact resume promises: parameters, buffers, optimizer, schedule, counters, generators."""
    return {
        "weights": {name: value.clone() for name, value in module.state_dict().items()},
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedules": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "global_step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    """Bit-equality of nested structures."""
    assert type(a) is type(b), where
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, np.ndarray):
        assert np.array_equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{index}]")
    elif not callable(a):
        assert a == b, where


def assert_resumes(
    make_module: Callable[[], LightningModule],
    make_data: Callable[[], dict[str, Any]],
    hook: str,
    call: int,
    path: Path,
    **flags: Any,
) -> None:
    """Train without interruption, saving on the way; resume with everything new and another seed; compare."""
    saver = SaveAt(hook, call, path)
    expected, draws = run(make_module(), make_data(), [saver], None, 1, **flags)
    assert saver.saved, "the checkpoint was never saved"
    got, draws_after = run(make_module(), make_data(), [], path, 2, **flags)
    assert draws_after, "nothing was left to train"
    assert [batch for batch, *_ in draws_after] == list(range(len(draws)))[-len(draws_after) :], "other batches"
    assert draws_after == draws[-len(draws_after) :], "other random numbers"
    assert_equal(expected, got)
