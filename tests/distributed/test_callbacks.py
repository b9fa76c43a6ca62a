"""Callbacks on several processes say what they say on one: the numbers of the whole batch, the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_altmin import AltMinModule, CurvatureCodes, LocalGradient
from lightning_altmin.callbacks import CodeMonitor, CompareToBackprop, CompareWithTwin, MuSchedule
from lightning_altmin.data import Sources, TensorSource
from tests.distributed.gloo import launch
from tests.distributed.problems import NORMED, OPTIMIZERS, batches
from tests.distributed.test_ddp import Drawn, ddp, loader, module, parts, state, trainer, whole

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
WATCHES = {"codes": lambda: CodeMonitor(1), "backprop": lambda: CompareToBackprop(1)}
LOSSES = {"plain": None, "class weights": torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)}


def watched(kind: str, weight: Tensor | None) -> AltMinModule:
    return module(kind, loss=nn.CrossEntropyLoss(weight=weight), weights=LocalGradient(OPTIMIZERS["sgd"]))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("name", "kind"), [("codes", "conv"), ("backprop", "conv"), ("codes", "normed conv")])
def test_watches_measure_the_whole_batch(name: str, kind: str, loss: str) -> None:
    """Catches numbers of one process's part of a batch, which a checkpoint that monitors them would not agree on."""
    data = whole(kind=kind)
    flags = {"sync_batchnorm": kind in NORMED}

    def share(rank: int) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
        watch = WATCHES[name]()
        model, fit = watched(kind, LOSSES[loss]), ddp(callbacks=[watch], **flags)
        fit.fit(model, loader(parts(data, rank)))
        return watch.history, state(model, fit)

    expected = WATCHES[name]()
    trainer(devices=1, callbacks=[expected]).fit(watched(kind, LOSSES[loss]), loader(data))
    (first, left), (second, _) = launch(2, share)
    assert first == second
    assert len(first) == len(expected.history) == 2 * len(data)
    for found, right in zip(first, expected.history, strict=True):
        assert found == pytest.approx(right, rel=1e-10, abs=1e-10)

    def without(rank: int) -> dict[str, Tensor]:
        model, fit = watched(kind, LOSSES[loss]), ddp(**flags)
        fit.fit(model, loader(parts(data, rank)))
        return state(model, fit)

    plain = launch(2, without)[0]
    assert all(torch.equal(value, left[key]) for key, value in plain.items()), "watching has changed the run"


def test_a_schedule_of_mu() -> None:
    """Catches a mu that differs between processes, or is changed more than once."""
    data = whole()

    def run(fit: Any, part: Any) -> dict[str, Tensor]:
        model = module(weights=LocalGradient(OPTIMIZERS["sgd"]))
        fit.fit(model, loader(part))
        return state(model, fit)

    schedule = {"callbacks": [MuSchedule(multiply=1.3, every="step")]}
    found = launch(2, lambda rank: run(ddp(**schedule), parts(data, rank)))
    expected = run(trainer(devices=1, **schedule), data)
    for one in found:
        torch.testing.assert_close(one, expected, rtol=1e-11, atol=1e-11)


class Splits(Drawn):
    """32 samples, so that all parts of all batches are equal, and as many to test."""

    def load_sources(self) -> Sources:
        train, test = batches((6,), 32, 2, torch.float64)
        return Sources(TensorSource(*train), test=TensorSource(*test))


def twin_of(fit: Any, seed: int, size: int, dropout: float, ckpt: Path | None = None) -> Any:
    """Results of a comparison without the seconds, and the twin's weights."""
    seed_everything(seed, verbose=False)
    masks = [nn.Dropout(dropout)] if dropout else []  # which draw, whatever the rate
    layers = [nn.Linear(6, 8), nn.ReLU(), *masks, nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3)]
    model = AltMinModule(nn.Sequential(*layers).double(), codes=CurvatureCodes(every=2))
    (compare,) = (callback for callback in fit.callbacks if isinstance(callback, CompareWithTwin))
    data = Splits(batch_size=size, eval_batch_size=size)
    seed_everything(seed, verbose=False)  # as DDP does
    fit.fit(model, datamodule=data, ckpt_path=ckpt, weights_only=True if ckpt else None)
    assert compare.twin is not None
    results = {who: {k: v for k, v in row.items() if k != "training seconds"} for who, row in compare.results.items()}
    return results, {name: value.clone() for name, value in compare.twin.network.state_dict().items()}


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def test_the_twin_is_trained_on_the_same_processes() -> None:
    """Catches a twin that sees one process's part of the data, or batches in another order."""
    found = launch(2, lambda rank: twin_of(ddp(callbacks=[CompareWithTwin(sgd)]), 5 + rank, 4, 0.0))
    results, weights = twin_of(trainer(devices=1, callbacks=[CompareWithTwin(sgd)]), 5, 8, 0.0)
    for theirs, twin in found:
        for who, row in results.items():
            assert theirs[who] == pytest.approx(row, abs=1e-12)
        torch.testing.assert_close(twin, weights, rtol=1e-12, atol=1e-12)


def test_a_resumed_run_has_the_same_twin(tmp_path: Path) -> None:
    """Catches a twin whose dropout masks on the second process are those of the first one's checkpoint."""

    def straight(rank: int) -> Any:
        saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
        callbacks: list[Callback] = [CompareWithTwin(sgd), saves]
        return twin_of(ddp(callbacks=callbacks, enable_checkpointing=True), 5 + rank, 4, 0.5)

    expected = launch(2, straight)
    kept = tmp_path / "step=3.ckpt"
    found = launch(2, lambda rank: twin_of(ddp(callbacks=[CompareWithTwin(sgd)]), 50 + rank, 4, 0.5, kept))
    for (results, twin), (right, weights) in zip(found, expected, strict=True):
        assert results == right
        assert all(torch.equal(value, weights[name]) for name, value in twin.items())


def test_spawned_processes_have_no_twin() -> None:
    """Catches a comparison that would start further processes at the end of a long run."""
    fit = trainer(devices=2, strategy="ddp_fork", callbacks=[CompareWithTwin()])
    with pytest.raises(MisconfigurationException, match="spawned ones cannot start a second run"):
        fit.callbacks[0].setup(fit, module(), "fit")


@pytest.mark.parametrize("make", [lambda: CompareToBackprop(1), CompareWithTwin], ids=["gradients", "twin"])
def test_comparisons_with_backprop_refuse_synchronised_batch_norm(make: Any) -> None:
    """Catches a comparison of two networks that normalise by different samples."""

    def share(rank: int) -> bool:
        with pytest.raises(MisconfigurationException, match="BatchNorms normalise by the samples of their own process"):
            ddp(callbacks=[make()], sync_batchnorm=True).fit(module("normed mlp"), loader(parts(whole(), rank)))
        return True

    assert launch(2, share) == [True, True]
