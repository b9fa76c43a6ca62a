"""Small modules, data and Trainers that the tests of callbacks train with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_altmin import AltMinModule, AltMinObjective, GradientCodes, LocalGradient


class Samples(Dataset[tuple[Tensor, Tensor]]):
    """Samples of three classes in five features, float64; remembers which were asked for, in order."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(count, 5, generator=generator, dtype=torch.float64)
        self.y = torch.randint(0, 3, (count,), generator=generator)
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.asked.append(index)
        return self.x[index], self.y[index]


class RandomData(LightningDataModule):
    """Training batches shuffled by torch's global generator."""

    def __init__(self, samples: int = 48, batch_size: int = 8, shuffle: bool = True) -> None:
        super().__init__()
        self.train, self.held_out = Samples(samples), Samples(32)
        self.batch_size, self.shuffle = batch_size, shuffle

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, self.batch_size, shuffle=self.shuffle)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.held_out, 16)

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.held_out, 16)


class MemoryLogger(Logger):
    """Keeps what is logged: a list of ``(step, values)``."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def network() -> nn.Sequential:
    """BatchNorm and dropout, so that buffers and random masks have to be treated right."""
    return nn.Sequential(
        *(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.25)),
        *(nn.Linear(6, 4), nn.Tanh()),
        nn.Linear(4, 3),
    ).double()


def sgd(params: Any) -> torch.optim.Optimizer:
    """SGD with momentum."""
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def module(**settings: Any) -> AltMinModule:
    """An `AltMinModule` in float64, the same at every call unless something is set."""
    torch.manual_seed(3)
    defaults: dict[str, Any] = {
        "network": network(),
        "objective": AltMinObjective(mu=0.5),
        "codes": GradientCodes(steps=2, lr=0.3),
        "weights": LocalGradient(sgd),
    }
    return AltMinModule(**{**defaults, **settings})


def backprop_in_disguise(**settings: Any) -> AltMinModule:
    """One plain code step of rate 1 with forward inputs: by definition its gradients are backprop's."""
    codes, weights = GradientCodes(steps=1, lr=1.0), LocalGradient(sgd, inputs="forward")
    return module(**{"codes": codes, "weights": weights, **settings})


def trainer(folder: Path, callbacks: list[Callback], **settings: Any) -> Trainer:
    """A quiet Trainer that writes nothing but what is asked for, into ``folder``."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 2,
        "num_sanity_val_steps": 0,
    }
    return Trainer(default_root_dir=folder, callbacks=callbacks, **{**defaults, **settings})


class Probe(Callback):
    """Calls a function at the end of every training batch."""

    def __init__(self, look: Any) -> None:
        self._look = look

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._look(trainer, pl_module, outputs, batch)


class SaveAt(Checkpoint):
    """Saves a checkpoint after an optimizer step, where and when ``ModelCheckpoint`` does."""

    def __init__(self, step: int, path: Path) -> None:
        self._step, self._path = step, path

    def on_train_batch_end(self, trainer: Trainer, *rest: Any) -> None:
        if trainer.global_step == self._step:
            trainer.save_checkpoint(self._path)
