"""Small streams whose samples can be recognised one by one, and a Trainer for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_altmin import BackpropModule
from lightning_altmin.continual import Samples, TaskStream, TaskStreamDataModule, split_classes
from tests.module.problems import trainer as quiet_trainer


def numbered(count: int, classes: int, start: int = 0) -> tuple[Tensor, Tensor]:
    """Sample ``i`` is ``(start + i, start + i, 1)``, of class ``i % classes``."""
    number = torch.arange(start, start + count, dtype=torch.float32)
    return torch.stack([number, number, torch.ones(count)], 1), torch.arange(count) % classes


def numbers(samples: Samples) -> list[int]:
    """Which samples of `numbered` these are."""
    return [int(v) for v in samples.read(torch.arange(len(samples)))[0][:, 0]]


def blobs(per_class: int = 24, classes: int = 6, features: int = 8, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Gaussian clusters, a class each, far enough apart to be learnt in a few steps."""
    g = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(classes, features, generator=torch.Generator().manual_seed(99))
    y = torch.arange(classes).repeat(per_class)
    return centres[y] + torch.randn(len(y), features, generator=g), y


def blob_stream(num_tasks: int = 3, per_class: int = 24, **settings: Any) -> TaskStream:
    """Two classes per task."""
    return split_classes(blobs(per_class), blobs(10, seed=4), num_tasks, **settings)


def small_network(seed: int = 0, classes: int = 6) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, classes))


def backprop(seed: int = 0, lr: float = 0.05, momentum: float = 0.0) -> BackpropModule:
    return BackpropModule(small_network(seed), optimizer=lambda p: torch.optim.SGD(p, lr=lr, momentum=momentum))


def fit(module: Any, data: Any, *callbacks: Any, ckpt: Any = None, **flags: Any) -> Any:
    """Train the whole stream; returns the Trainer."""
    checkpointing = any("Checkpoint" in type(callback).__mro__[1].__name__ for callback in callbacks)
    defaults = {"limit_val_batches": None, "enable_checkpointing": checkpointing, "num_sanity_val_steps": 0}
    trainer = quiet_trainer(callbacks=list(callbacks), **(defaults | data.trainer_kwargs() | flags))
    trainer.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=True if ckpt else None)
    return trainer


def blob_data(**settings: Any) -> TaskStreamDataModule:
    return TaskStreamDataModule(blob_stream(), **({"batch_size": 16} | settings))
