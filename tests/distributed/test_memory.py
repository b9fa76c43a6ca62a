"""Memories under ``Trainer(strategy="ddp")``: the run that one process makes with the same global batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_altmin import AltMinModule, CoactivationMemory, CurvatureCodes, LayerwiseWeights, LocalGradient
from tests.distributed.gloo import launch
from tests.distributed.problems import EVERY, NETWORKS, NORMED, OPTIMIZERS
from tests.distributed.test_ddp import State, compare, ddp, loader, parts, state, trainer, whole

pytestmark = pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no")  # on purpose
MEMORIES: dict[str, Any] = {
    "innovation": lambda: CoactivationMemory(every=3),
    "low rank": lambda: CoactivationMemory(every=2, rank=4),
    "solve": lambda: CoactivationMemory("solve", every=3, forgetting=0.9, ridge=0.1),
    "triangle": lambda: CoactivationMemory("solve", every=3, ridge=0.1, storage="triangle"),
    "mixed": lambda: LayerwiseWeights(
        {"output": CoactivationMemory("solve", every=4, window=2), "default": CoactivationMemory(every=3)}
    ),
}


def module(kind: str, memory: str) -> AltMinModule:
    return AltMinModule(EVERY[kind][0]().double(), codes=CurvatureCodes(every=2), weights=MEMORIES[memory]())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("memory", "kind"),
    [
        (memory, kind)
        for memory in MEMORIES
        for kind in sorted(EVERY)
        # Memories refuse blocks; those that solve, BatchNorms.
        if "residual" not in kind and (kind not in NORMED or memory in ("innovation", "low rank"))
    ],
)
def test_equals_one_process(memory: str, kind: str) -> None:
    """Catches statistics, directions or solutions of one process's samples, on batches of uneven shares, and processes
    that end apart.
    """
    data = whole(kind=kind)

    def share(rank: int) -> State:
        model, fit = module(kind, memory), ddp(sync_batchnorm=kind in NORMED)
        with torch.no_grad():  # DDP gives all processes the weights of the first, before anything is measured
            for parameter in model.parameters():
                parameter.add_(rank)
        fit.fit(model, loader(parts(data, rank)))
        return state(model, fit)

    model, fit = module(kind, memory), trainer(devices=1)
    fit.fit(model, loader(data))
    expected = state(model, fit)
    assert any(name.endswith((".A", ".product", ".triangles")) for name in expected)
    compare(launch(2, share), expected)


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["innovation", "low rank"])
def test_batch_norm(memory: str) -> None:
    """Catches inputs of a memory that are not the normalised ones, and scales that one process trains for itself, where
    BatchNorms are not synchronised.

    Each process has every sample of the batch, so that its mean and variance are those of the one process, which has
    all samples twice. Unbiased running variances are the exception: they know the number of samples.
    """
    data = [(torch.cat([x, x]), torch.cat([y, y])) for x, y in whole(kind="conv")[:2]]

    def share(rank: int) -> State:
        model, fit = module("normed conv", memory), ddp()
        fit.fit(model, loader([(x.chunk(2)[rank], y.chunk(2)[rank]) for x, y in data]))
        return without_variances(state(model, fit))

    model, fit = module("normed conv", memory), trainer(devices=1)
    fit.fit(model, loader(data))
    compare(launch(2, share), without_variances(state(model, fit)))


def without_variances(found: State) -> State:
    return {name: value for name, value in found.items() if "running_var" not in name}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("memory", ["low rank", "mixed"])
def test_checkpoints_resume_bit_equal(memory: str, tmp_path: Path) -> None:
    """Catches a checkpoint that holds one process's share of the statistics: an epoch has five batches, so it ends
    amid shares.
    """
    data, kept = whole(), tmp_path / "first" / "run.ckpt"

    def straight(rank: int) -> State:
        seed_everything(3, verbose=False)
        saved = ModelCheckpoint(tmp_path / "straight", save_top_k=-1)  # a save adds the shares up, in both runs
        model, fit = module("mlp", memory), ddp(enable_checkpointing=True, callbacks=[saved])
        fit.fit(model, loader(parts(data, rank)))
        return state(model, fit)

    def first(rank: int) -> None:
        seed_everything(3, verbose=False)
        saved = ModelCheckpoint(kept.parent, "run")
        ddp(max_epochs=1, enable_checkpointing=True, callbacks=[saved]).fit(
            module("mlp", memory), loader(parts(data, rank))
        )

    def resumed(rank: int) -> State:
        model, fit = module("mlp", memory), ddp()
        fit.fit(model, loader(parts(data, rank)), ckpt_path=kept, weights_only=True)
        return state(model, fit)

    expected = launch(2, straight)
    launch(2, first)
    for one, other in zip(launch(2, resumed), expected, strict=True):
        assert [name for name, value in other.items() if not torch.equal(one[name], value)] == []
    model, fit = module("mlp", memory), trainer(devices=1)  # and on one process
    fit.fit(model, loader(data), ckpt_path=kept, weights_only=True)
    compare([state(model, fit)], expected[0])


@pytest.mark.slow
def test_memories_beside_gradients() -> None:
    """Catches layers of another solver that lose the mean over processes when a memory is there."""
    data = whole()

    def make() -> AltMinModule:
        weights = LayerwiseWeights({"output": LocalGradient(OPTIMIZERS["sgd"]), "default": CoactivationMemory(every=2)})
        return AltMinModule(NETWORKS["mlp"][0]().double(), codes=CurvatureCodes(every=2), weights=weights)

    def share(rank: int) -> State:
        model, fit = make(), ddp()
        fit.fit(model, loader(parts(data, rank)))
        return state(model, fit)

    model, fit = make(), trainer(devices=1)
    fit.fit(model, loader(data))
    compare(launch(2, share), state(model, fit))
