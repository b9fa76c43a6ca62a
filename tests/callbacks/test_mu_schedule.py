"""MuSchedule against its closed forms, and across a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_altmin import BackpropModule
from lightning_altmin.callbacks import MuSchedule
from tests.callbacks.training import Probe, RandomData, SaveAt, module, network, trainer

MU = 0.5  # of tests.callbacks.training.module
BATCHES = 6


def mus(folder: Path, schedule: MuSchedule, ckpt: Path | None = None, **settings: Any) -> list[float]:
    """The mu of every batch of a run."""
    seen: list[float] = []
    callbacks = [schedule, Probe(lambda t, m, o, b: seen.append(float(m.core.objective.mu)))]
    accumulate = settings.pop("accumulate_batches", 1)
    callbacks += settings.pop("more", [])
    run = trainer(folder, callbacks, limit_val_batches=0, **settings)
    run.fit(module(accumulate_batches=accumulate), datamodule=RandomData(8 * BATCHES), ckpt_path=ckpt)
    return seen


def test_defaults_keep_mu_constant(tmp_path: Path) -> None:
    """Would catch a schedule that changes mu unasked."""
    assert mus(tmp_path, MuSchedule()) == [MU] * (2 * BATCHES)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"add": 0.25}, lambda k: MU + 0.25 * k),
        ({"multiply": 2.0}, lambda k: MU * 2.0**k),
        ({"add": 0.25, "multiply": 2.0}, lambda k: 2.0**k * MU + 0.25 * 2 * (2.0**k - 1)),  # geometric series
        ({"multiply": 4.0, "maximum": 3.0}, lambda k: min(MU * 4.0**k, 3.0)),
        ({"add": 0.5, "maximum": 1.25}, lambda k: min(MU + 0.5 * k, 1.25)),
    ],
)
@pytest.mark.parametrize("every", ["epoch", "step"])
def test_closed_forms(tmp_path: Path, arguments: dict[str, float], expected: Any, every: str) -> None:
    """Would catch a wrong formula, an update at the wrong place, or one update too many or too few."""
    seen = mus(tmp_path, MuSchedule(**arguments, every=every), max_epochs=3)
    counts = [batch // BATCHES if every == "epoch" else batch for batch in range(3 * BATCHES)]
    assert seen == [expected(k) for k in counts]  # exact: all numbers are short binary fractions


def test_steps_are_optimizer_steps(tmp_path: Path) -> None:
    """Would catch counting batches where several make one step."""
    seen = mus(tmp_path, MuSchedule(add=0.25, every="step"), max_epochs=1, accumulate_batches=3)
    assert seen == [MU] * 3 + [MU + 0.25] * 3


# Lightning's advice for loaders that cannot resume inside an epoch; the order of batches does not matter here.
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("every", ["epoch", "step"])
@pytest.mark.parametrize("saved_at", [4, 6, 8, 12])
def test_resume_continues_exactly(tmp_path: Path, every: str, saved_at: int) -> None:
    """Would catch an update lost or made twice across a checkpoint, inside an epoch or at its end."""
    whole = mus(tmp_path, MuSchedule(0.1, 1.1, every=every), max_epochs=4)
    path = tmp_path / "saved.ckpt"
    mus(
        tmp_path,
        MuSchedule(0.1, 1.1, every=every),
        max_steps=saved_at,
        more=[SaveAt(saved_at, path)],
        enable_checkpointing=True,
    )
    rest = mus(tmp_path, MuSchedule(0.1, 1.1, every=every), ckpt=path, max_epochs=4)
    assert rest[-(len(whole) - saved_at) :] == whole[saved_at:]


def test_a_second_fit_goes_on_and_another_run_begins_anew(tmp_path: Path) -> None:
    """Would catch a callback object that carries its count into another run, or forgets it between two fits."""
    schedule, seen = MuSchedule(add=0.25), []
    probe = Probe(lambda t, m, o, b: seen.append(float(m.core.objective.mu)))
    for _ in range(2):
        run, model, seen = trainer(tmp_path, [schedule, probe], max_epochs=2, limit_val_batches=0), module(), []
        probe._look = lambda t, m, o, b, seen=seen: seen.append(float(m.core.objective.mu))
        run.fit(model, datamodule=RandomData())
        run.fit_loop.max_epochs = 4
        run.fit(model, datamodule=RandomData())
        assert seen[::BATCHES] == [0.5, 0.75, 1.0, 1.25]


@pytest.mark.parametrize(
    "arguments",
    [
        {"add": -0.1},
        {"add": float("nan")},
        {"multiply": 0.5},
        {"multiply": float("inf")},
        {"maximum": 0.0},
        {"maximum": "1"},
        {"every": "batch"},
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any]) -> None:
    """Would catch a setting out of range that only shows as a strange run."""
    with pytest.raises(ValueError, match=next(iter(arguments))):
        MuSchedule(**arguments)


def test_maximum_below_mu(tmp_path: Path) -> None:
    """Would catch a cap that silently lowers mu at the first update."""
    model = module()
    with pytest.raises(MisconfigurationException, match=r"maximum=0\.25 is below .*mu=0\.5"):
        trainer(tmp_path, [MuSchedule(maximum=0.25)]).fit(model, datamodule=RandomData())
    assert float(model.core.objective.mu) == MU


def test_module_without_core(tmp_path: Path) -> None:
    """Would catch an AttributeError in the middle of a run where the twin's module is given the same callbacks."""
    with pytest.raises(MisconfigurationException, match="MuSchedule needs a module with an AltMin core"):
        trainer(tmp_path, [MuSchedule(add=1.0)]).fit(BackpropModule(network()), datamodule=RandomData())


def test_mu_stays_the_same_buffer(tmp_path: Path) -> None:
    """Would catch a schedule that replaces the buffer, which compiled code and the optimizer's graph would not see."""
    model = module()
    before = model.core.objective.mu
    trainer(tmp_path, [MuSchedule(add=1.0, every="step")], max_steps=3).fit(model, datamodule=RandomData())
    assert model.core.objective.mu is before
    assert torch.equal(model.state_dict()["core.objective.mu"], torch.tensor(MU + 2, dtype=torch.float64))
