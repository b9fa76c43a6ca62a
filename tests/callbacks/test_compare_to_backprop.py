"""CompareToBackprop: exact where the mathematics says so, and without a trace in the run it watches."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_altmin import BackpropModule, GradientCodes, LocalGradient
from lightning_altmin.callbacks import CodeMonitor, CompareToBackprop
from lightning_altmin.engines import Gradients
from lightning_altmin.weights import WeightProblem
from tests.callbacks.training import (
    MemoryLogger,
    Probe,
    RandomData,
    SaveAt,
    backprop_in_disguise,
    module,
    network,
    sgd,
    trainer,
)

LAYERS = ["0", "4", "6"]


def quantities(history: list[dict[str, float]], name: str) -> list[float]:
    """One quantity of every layer at every measured batch."""
    return [row[f"backprop/{layer}/{name}"] for row in history for layer in LAYERS]


@pytest.mark.parametrize("clip", [None, 1e6])
def test_forward_inputs_and_rate_one_are_backprop(tmp_path: Path, clip: float | None) -> None:
    """Would catch a comparison at other weights, masks or batch statistics than the batch's own.

    With forward inputs and one plain code step of rate 1 the two gradients are equal, at every batch of a run.
    """
    compare = CompareToBackprop(every_n_steps=1)
    model = backprop_in_disguise(gradient_clip_norm=clip)
    trainer(tmp_path, [compare]).fit(model, datamodule=RandomData())
    assert len(compare.history) == 12
    assert quantities(compare.history, "angle") == pytest.approx([0.0] * 36, abs=1e-10)
    assert quantities(compare.history, "cosine") == pytest.approx([1.0] * 36, abs=1e-12)
    assert quantities(compare.history, "relative_size") == pytest.approx([1.0] * 36, abs=1e-12)


class Turned(LocalGradient):
    """Twice backprop's gradient, the wrong way round."""

    def gradients(self, problem: WeightProblem) -> Gradients:
        return [(p, -2 * g) for p, g in super().gradients(problem)]


def test_angle_and_size_of_a_known_difference(tmp_path: Path) -> None:
    """Would catch a size the wrong way up, or an angle in radians or without its sign."""
    compare = CompareToBackprop(every_n_steps=1)
    model = module(codes=GradientCodes(1, 1.0), weights=Turned(sgd, inputs="forward"))
    trainer(tmp_path, [compare], max_steps=1).fit(model, datamodule=RandomData())
    assert quantities(compare.history, "angle") == pytest.approx([180.0] * 3, abs=1e-10)
    assert quantities(compare.history, "cosine") == pytest.approx([-1.0] * 3, abs=1e-12)
    assert quantities(compare.history, "relative_size") == pytest.approx([2.0] * 3, abs=1e-12)


def test_the_output_layer_alone_is_backprop_at_moved_top_code_off(tmp_path: Path) -> None:
    """Would catch a comparison that always says 0: with moved inputs the gradients of the paper differ."""
    compare = CompareToBackprop(every_n_steps=1)
    trainer(tmp_path, [compare], max_steps=3).fit(module(), datamodule=RandomData())
    assert min(quantities(compare.history, "angle")) > 0.1


def trace(folder: Path, callbacks: list[Any]) -> tuple[dict[str, Tensor], list[Any]]:
    """Everything a run leaves behind, and the random numbers that come after each of its batches."""
    draws: list[Any] = []

    def draw(t: Any, m: Any, o: Any, b: Any) -> None:
        state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        draws.append((float(torch.rand(())), float(np.random.rand()), random.random()))
        torch.set_rng_state(state[0])

    random.seed(0)
    np.random.seed(0)
    model = module()
    run = trainer(folder, [*callbacks, Probe(draw)])
    run.fit(model, datamodule=RandomData())
    momenta = {f"m{i}": s["momentum_buffer"] for i, s in enumerate(run.optimizers[0].state.values())}
    return {**model.state_dict(), **momenta}, draws


@pytest.mark.parametrize("callback", [CompareToBackprop, CodeMonitor])
def test_training_is_bit_equal_with_and_without(tmp_path: Path, callback: Any) -> None:
    """Would catch a monitor that moves a running statistic, a gradient, a random state or a weight."""
    expected, expected_draws = trace(tmp_path, [])
    watched, draws = trace(tmp_path, [callback(every_n_steps=2)])
    assert draws == expected_draws
    assert expected.keys() == watched.keys()
    assert all(torch.equal(expected[name], watched[name]) for name in expected)


def test_gradients_are_left_alone(tmp_path: Path) -> None:
    """Would catch a backward pass into the real parameters."""
    seen: list[bool] = []

    class Look(CompareToBackprop):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            before = [None if p.grad is None else p.grad.clone() for p in pl_module.parameters()]
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
            after = [p.grad for p in pl_module.parameters()]
            seen.append(all(torch.equal(a, b) for a, b in zip(before, after, strict=True)))

    trainer(tmp_path, [Look(1)], max_epochs=1).fit(module(), datamodule=RandomData())
    assert seen == [True] * 6


# Lightning's advice for loaders that cannot resume inside an epoch; the order of batches does not matter here.
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_exact_after_a_resume_inside_an_epoch(tmp_path: Path) -> None:
    """Would catch masks drawn from the random state before the module puts back that of the checkpoint."""
    save = SaveAt(3, tmp_path / "third.ckpt")
    run = trainer(tmp_path, [save], enable_checkpointing=True)
    run.fit(backprop_in_disguise(), datamodule=RandomData(shuffle=False))
    compare = CompareToBackprop(every_n_steps=1)
    trainer(tmp_path, [compare]).fit(
        backprop_in_disguise(), datamodule=RandomData(shuffle=False), ckpt_path=tmp_path / "third.ckpt"
    )
    assert compare.history
    assert quantities(compare.history, "angle") == pytest.approx([0.0] * 3 * len(compare.history), abs=1e-10)


def test_logged_and_drawn(tmp_path: Path) -> None:
    """Would catch a comparison that no logger or figure shows."""
    logger, compare = MemoryLogger(), CompareToBackprop(every_n_steps=5)
    trainer(tmp_path, [compare], logger=logger).fit(module(), datamodule=RandomData())
    logged = [{"step": step, **values} for step, values in logger.rows if "backprop/0/angle" in values]
    assert logged == compare.history
    assert [row["step"] for row in logged] == [4, 9]
    pytest.importorskip("matplotlib")
    assert {axes.get_ylabel() for axes in compare.plot().axes} == {"angle", "cosine", "relative size"}


def test_refusals(tmp_path: Path) -> None:
    """Would catch a comparison of unlike things: other modules, or one batch against the mean of several."""
    with pytest.raises(MisconfigurationException, match="CompareToBackprop needs an AltMinModule"):
        trainer(tmp_path, [CompareToBackprop()]).fit(BackpropModule(network()), datamodule=RandomData())
    with pytest.raises(MisconfigurationException, match="accumulate_batches"):
        trainer(tmp_path, [CompareToBackprop()]).fit(module(accumulate_batches=2), datamodule=RandomData())
