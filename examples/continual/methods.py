"""The methods that ``benchmark.py`` compares, and the settings that ``--tune`` chooses from."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn

from lightning_altmin import AltMinModule, BackpropModule
from lightning_altmin.continual import (
    MemoryPolicy,
    OnlineEWC,
    OrthogonalWeights,
    Replay,
    ReservoirBuffer,
    ResetOptimizerState,
    SynapticIntelligence,
    TaskLearningRates,
)
from lightning_altmin.weights import CoactivationMemory, LayerwiseWeights, LocalGradient


@dataclass
class Run:
    """One method, ready to be trained."""

    module: LightningModule
    callbacks: list[Callback] = field(default_factory=list)
    replay: Replay | None = None
    joint: bool = False
    state_bytes: Callable[[], int] = lambda: 0


def backprop(network: nn.Sequential, lr: float, optimizer: Any = torch.optim.Adam) -> BackpropModule:
    return BackpropModule(network, optimizer=lambda p: optimizer(p, lr=lr))


def naive_sgd(network: nn.Sequential, lr: float = 0.03) -> Run:
    return Run(backprop(network, lr, torch.optim.SGD))


def naive_adam(network: nn.Sequential, lr: float = 1e-3) -> Run:
    return Run(backprop(network, lr))


def naive_am_adam(network: nn.Sequential, lr: float = 1e-3) -> Run:
    return Run(AltMinModule(network, weights=LocalGradient(lambda p: torch.optim.Adam(p, lr=lr))))


def ewc(network: nn.Sequential, lr: float = 1e-3, strength: float = 1e3) -> Run:
    penalty = OnlineEWC(strength, samples=200)
    return Run(backprop(network, lr), [penalty], state_bytes=lambda: penalty.state_bytes)


def si(network: nn.Sequential, lr: float = 1e-3, strength: float = 10.0) -> Run:
    penalty = SynapticIntelligence(strength)
    return Run(backprop(network, lr), [penalty], state_bytes=lambda: penalty.state_bytes)


def replay(network: nn.Sequential, lr: float = 1e-3, stored: float = 100, size: int = 1000) -> Run:
    """``stored`` samples of a buffer of ``size`` beside the 100 new ones of a batch."""
    replay = Replay(ReservoirBuffer(size), int(stored))
    return Run(backprop(network, lr), replay=replay, state_bytes=lambda: replay.buffer.state_bytes)


def joint_adam(network: nn.Sequential, lr: float = 1e-3) -> Run:
    return Run(backprop(network, lr), joint=True)


def memory(network: nn.Sequential, lr: float = 0.0, ridge: float = 1e-4, factor: float = 0.0) -> Run:
    """AM-mem on the output layer; layers below are trained by AltMin at ``lr``, which falls by ``factor`` per task."""
    output = CoactivationMemory(form="solve", ridge=ridge, every=20, inputs="forward", storage="single")
    if lr == 0:
        for layer in list(network)[:-1]:
            layer.requires_grad_(False)
        weights: Any = output
    else:
        hidden = LocalGradient(lambda p: torch.optim.Adam(p, lr=lr))
        weights = LayerwiseWeights({"output": output, "default": hidden})
    module = AltMinModule(network, weights=weights)
    callbacks: list[Callback] = [MemoryPolicy("keep")]
    if lr > 0:
        callbacks.append(TaskLearningRates(factor, [stage.name for stage in module.core.coded.stages[:-1]]))
    return Run(module, callbacks, state_bytes=lambda: buffer_bytes(output))


def as_joint(run: Run) -> Run:
    run.joint = True
    return run


def orthogonal(module: LightningModule, ridge: float) -> Run:
    """All layers learn by SGD with momentum, in directions that the inputs of earlier tasks leave free."""
    protection = OrthogonalWeights(ridge)
    # moments in double precision, and projections in single
    return Run(module, [ResetOptimizerState(), protection], state_bytes=lambda: protection.state_bytes * 3 // 2)


def sgd_momentum(lr: float) -> Any:
    return lambda p: torch.optim.SGD(p, lr=lr, momentum=0.9)


def orthogonal_am(network: nn.Sequential, lr: float = 0.03, ridge: float = 0.3) -> Run:
    return orthogonal(AltMinModule(network, weights=LocalGradient(sgd_momentum(lr))), ridge)


def innovation(network: nn.Sequential, step: float = 0.2, ridge: float = 0.1) -> Run:
    """AM-mem's innovation form in all layers; its memory counts all tasks alike and protects what they use."""
    weights = CoactivationMemory(step=step, ridge=ridge, forgetting=1.0)
    return Run(AltMinModule(network, weights=weights), state_bytes=lambda: buffer_bytes(weights))


def buffer_bytes(module: nn.Module) -> int:
    return sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())


def orthogonal_sgd(network: nn.Sequential, lr: float = 0.03, ridge: float = 0.3) -> Run:
    return orthogonal(BackpropModule(network, optimizer=sgd_momentum(lr)), ridge)


def falling(make: Callable[..., Run]) -> Callable[..., Run]:
    """The method, with all rates multiplied by ``factor`` at the start of every task but the first."""

    def made(network: nn.Sequential, factor: float = 1.0, **settings: float) -> Run:
        run = make(network, **settings)
        if factor != 1:
            run.callbacks.append(TaskLearningRates(factor))
        return run

    return made


# ---------------------------------------------------------------- settings to choose from


def grid(**values: tuple[float, ...]) -> list[dict[str, float]]:
    """Every combination."""
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


METHODS: dict[str, Callable[..., Run]] = {
    "naive SGD": falling(naive_sgd),
    "naive Adam": falling(naive_adam),
    "naive AM-Adam": falling(naive_am_adam),
    "online EWC": falling(ewc),
    "SI": falling(si),
    "replay 200": falling(functools.partial(replay, size=200)),
    "replay 1000": falling(functools.partial(replay, size=1000)),
    "replay, equal bytes": falling(replay),
    "joint Adam": joint_adam,
    "SGD, orthogonal weights": falling(orthogonal_sgd),
    "AM-SGD, orthogonal weights": falling(orthogonal_am),
    "AM-mem, frozen features": memory,
    "AM-mem, joint": lambda network, **settings: as_joint(memory(network, **settings)),
    "AM-mem, learnt features": memory,
    "AM-mem, innovation form": falling(innovation),
}

ADAM = grid(lr=(1e-3, 3e-3, 1e-2))
STORED = (100, 300)
REPLAY = grid(lr=(1e-3, 3e-3, 1e-2), stored=STORED)
ORTHOGONAL = grid(lr=(0.03, 0.1), ridge=(0.1, 0.3))
GRIDS: dict[str, list[dict[str, float]]] = {
    "naive SGD": grid(lr=(0.01, 0.03, 0.1)),
    "naive Adam": ADAM,
    "naive AM-Adam": ADAM,
    "online EWC": grid(lr=(1e-3, 3e-3), strength=(1e3, 1e5, 1e7)),
    "SI": grid(lr=(1e-3, 3e-3), strength=(1e2, 1e4, 1e6)),
    "replay 200": REPLAY,
    "replay 1000": REPLAY,
    "replay, equal bytes": REPLAY,
    "joint Adam": ADAM,
    "SGD, orthogonal weights": ORTHOGONAL,
    "AM-SGD, orthogonal weights": ORTHOGONAL,
    "AM-mem, frozen features": grid(ridge=(1e-4, 1e-3)),
    "AM-mem, joint": grid(ridge=(1e-4, 1e-3)),
    "AM-mem, innovation form": grid(step=(0.03, 0.1, 0.3), ridge=(0.1, 0.3, 1.0)),
    "AM-mem, learnt features": [
        {"lr": lr, "ridge": ridge, "factor": 0.0}
        for lr, ridge in ((1e-4, 1e-3), (3e-5, 1e-3), (3e-4, 1e-2), (1e-4, 1e-2))
    ],
}

FACTORS = (1.0, 0.8)
GRIDS_OF: dict[str, dict[str, list[dict[str, float]]]] = {
    "permuted_mnist": {
        "naive SGD": grid(lr=(0.01, 0.03, 0.1), factor=FACTORS),
        "naive Adam": grid(lr=(1e-4, 3e-4, 1e-3, 3e-3), factor=FACTORS),
        "naive AM-Adam": grid(lr=(1e-4, 3e-4, 1e-3, 3e-3), factor=FACTORS),
        "online EWC": grid(lr=(3e-4, 1e-3, 3e-3), strength=(1e1, 1e2, 1e3, 1e4), factor=FACTORS),
        "SI": grid(lr=(3e-4, 1e-3, 3e-3), strength=(1.0, 10.0, 100.0, 1000.0), factor=FACTORS),
        "replay 200": grid(lr=(3e-4, 1e-3, 3e-3), stored=STORED, factor=FACTORS),
        "replay 1000": grid(lr=(1e-3, 3e-3, 1e-2), stored=STORED, factor=FACTORS),
        "replay, equal bytes": grid(lr=(1e-3, 3e-3, 1e-2), stored=STORED, factor=FACTORS),
        "joint Adam": grid(lr=(1e-4, 3e-4, 1e-3, 3e-3)),
        "SGD, orthogonal weights": grid(lr=(0.03, 0.1, 0.2), ridge=(0.1, 0.3), factor=FACTORS),
        "AM-SGD, orthogonal weights": grid(lr=(0.03, 0.1, 0.2), ridge=(0.1, 0.3), factor=FACTORS),
        "AM-mem, innovation form": grid(step=(0.1, 0.2, 0.3), ridge=(0.1, 0.3), factor=FACTORS),
        "AM-mem, frozen features": grid(ridge=(1e-4, 1e-3)),
    },
    "split_cifar10": {
        "naive SGD": grid(lr=(0.01, 0.03, 0.1, 0.3)),
        "online EWC": grid(lr=(1e-3, 3e-3, 1e-2), strength=(1e3, 1e5, 1e7)),
        "SI": grid(lr=(1e-3, 3e-3), strength=(1e0, 1e2, 1e4, 1e6)),
        "replay 200": grid(lr=(3e-3, 1e-2, 3e-2), stored=STORED),
        "replay 1000": grid(lr=(3e-3, 1e-2, 3e-2), stored=STORED),
        "replay, equal bytes": grid(lr=(3e-3, 1e-2, 3e-2), stored=STORED),
        "joint Adam": grid(lr=(1e-3, 3e-3, 1e-2, 3e-2)),
    },
}
"""Where a suite's grid is another one."""

# ---------------------------------------------------------------- settings beyond a grid's edge

LADDERS: dict[str, tuple[float, ...]] = {
    "lr": (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0),
    "strength": (0.1, 1.0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10),
    "ridge": (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
    "step": (0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0),
    "stored": (30, 100, 300, 900),
    "factor": (0.3, 0.5, 0.65, 0.8, 0.9, 1.0),
}
"""The values that a setting may take when the search goes on from the best of a grid."""

LIMITS: dict[tuple[str, str], tuple[float, float]] = {
    ("AM-mem, innovation form", "ridge"): (0.1, 10.0),  # what the memory allows
    # in single precision smaller ones are no longer above the rounding of the sums
    **{(f"AM-mem, {kind}", "ridge"): (1e-4, 10.0) for kind in ("frozen features", "joint", "learnt features")},
    ("replay 200", "stored"): (0, 300),  # the whole buffer
}


def neighbours(method: str, settings: dict[str, float]) -> list[dict[str, float]]:
    """The settings with one of them moved to the next value of its ladder, up or down."""
    moved = []
    for name, value in settings.items():
        low, high = LIMITS.get((method, name), (0.0, float("inf")))
        below = [v for v in LADDERS[name] if low <= v < value][-1:]
        above = [v for v in LADDERS[name] if value < v <= high][:1]
        moved += [settings | {name: v} for v in below + above]
    return moved
