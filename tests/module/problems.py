"""Small networks, data and Trainers shared by the tests of the Lightning modules."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

FEATURES, CLASSES = 6, 3


def network(dropout: float = 0.0, norm: bool = False, outputs: int = CLASSES, seed: int = 0) -> nn.Sequential:
    """A network with two hidden layers, named "0", "2" (or later, with BatchNorm or dropout between) and so on."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Linear(FEATURES, 8)]
    layers += [nn.BatchNorm1d(8)] if norm else []
    layers += [nn.Tanh()]
    layers += [nn.Dropout(dropout)] if dropout else []
    layers += [nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, outputs)]
    return nn.Sequential(*layers)


class _Residual(nn.Module):
    """A residual block with BatchNorm and dropout."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm1d(width), nn.Dropout(dropout)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.dropout(torch.relu(self.norm(self.first(x)))))


class _ResidualNet(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)
        self.blocks = nn.Sequential(_Residual(8, dropout), _Residual(8, dropout))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(torch.relu(self.blocks(self.stem(x))))
        return output


def residual(dropout: float = 0.0, seed: int = 0) -> nn.Module:
    """A network with a forward of its own, of two residual blocks."""
    torch.manual_seed(seed)
    return _ResidualNet(dropout)


def samples(count: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Inputs ``(count, FEATURES)`` and class labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, FEATURES, generator=generator)
    return x, torch.randint(CLASSES, (count,), generator=generator)


def loader(count: int = 20, batch_size: int = 4, shuffle: bool = False, seed: int = 1) -> DataLoader[Any]:
    """A torch DataLoader over `samples`."""
    return DataLoader(TensorDataset(*samples(count, seed)), batch_size=batch_size, shuffle=shuffle)


def trainer(**flags: Any) -> Trainer:
    """A quiet Trainer on one CPU process, without logger, checkpoints and validation unless asked for."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
    }
    return Trainer(**(quiet | flags))


def weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers."""
    return {name: value.clone() for name, value in module.state_dict().items()}


class Record(Logger):
    """A logger that keeps what it is given: ``(step, values)`` per call."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "record"

    @property
    def version(self) -> str:
        return ""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def values(self, name: str) -> list[tuple[int | None, float]]:
        return [(step, row[name]) for step, row in self.rows if name in row]
