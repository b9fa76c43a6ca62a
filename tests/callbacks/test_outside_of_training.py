"""Callbacks of training in runs that train nothing. Oracle: the same run without them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from lightning.pytorch import Callback

from lightning_altmin.callbacks import CodeMonitor, CompareToBackprop, CompareWithTwin, MuSchedule
from lightning_altmin.callbacks.training_clock import TrainingClock
from lightning_altmin.continual import (
    ContinualEvaluation,
    MemoryPolicy,
    OnlineEWC,
    OrthogonalWeights,
    PrequentialAccuracy,
    ResetOptimizerState,
    SynapticIntelligence,
    TaskCheckpoint,
    TaskEarlyStopping,
    TaskLearningRates,
)
from tests.callbacks.training import RandomData, module, trainer

CALLBACKS: list[Callable[[], Callback]] = [
    lambda: CodeMonitor(1),
    lambda: CompareToBackprop(1),
    CompareWithTwin,
    lambda: MuSchedule(add=0.1),
    ContinualEvaluation,
    lambda: MemoryPolicy("reset"),
    OnlineEWC,
    OrthogonalWeights,
    PrequentialAccuracy,
    ResetOptimizerState,
    SynapticIntelligence,
    lambda: TaskCheckpoint("nothing is written here"),
    TaskEarlyStopping,
    TaskLearningRates,
]


@pytest.mark.parametrize("make", CALLBACKS, ids=lambda make: type(make()).__name__)
def test_validation_and_test_are_as_without_the_callback(make: Callable[[], Callback], tmp_path: Path) -> None:
    """Catches a callback that asks for a task stream, or for an optimizer, where nothing is trained."""
    results = []
    for callbacks in ([], [make()]):
        run, model = trainer(tmp_path, callbacks, enable_checkpointing=True), module()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        results.append((run.validate(model, RandomData(), verbose=False), run.test(model, RandomData(), verbose=False)))
        assert all(bool((value == before[name]).all()) for name, value in model.state_dict().items())
    assert results[0] == results[1]


def test_a_comparison_that_has_not_begun_leaves_nothing_to_resume(tmp_path: Path) -> None:
    """Catches a checkpoint of a run that trained nothing, from which a comparison could not begin."""
    callback = CompareWithTwin()
    trainer(tmp_path, [callback]).validate(module(), RandomData(), verbose=False)
    assert callback.state_dict() == {}
    callback.load_state_dict({})
    trainer(tmp_path, [callback], max_epochs=1).fit(module(), RandomData())
    assert callback.twin is not None


def test_the_clock_counts_between_start_and_stop_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a pause of a clock that never ran, which a later resume would take for training, and a double stop."""
    now = iter([1.0, 5.0, 11.0, 12.0, 30.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    clock = TrainingClock(module().device)
    clock.pause()
    clock.resume()  # was not paused
    clock.stop()
    assert clock.seconds == 0.0
    clock.start()  # at 1
    clock.pause()  # at 5: 4 seconds
    clock.pause()
    clock.resume()  # at 11
    clock.stop()  # at 12: 1 more
    clock.stop()
    assert clock.seconds == 5.0
