"""Oracle: the same model without the accident, the interruption or the copy."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from lightning_altmin import AltMin, CoactivationMemory, altmin
from lightning_altmin.guard import DeferredGuard, ImmediateGuard, NonFiniteError
from tests.weights.problems import batch, mlp

MEMORIES: list[dict[str, Any]] = [
    {},
    {"every": 3},
    {"rank": 2},
    {"rank": 0},
    {"form": "solve"},
    {"form": "solve", "every": 1},
    {"form": "solve", "every": 1, "window": 2},
    {"form": "solve", "every": 1, "storage": "triangle"},
    {"form": "solve", "every": 1, "storage": "single"},
    {"form": "solve", "solver": "bcd", "every": 2},
]
each_memory = pytest.mark.parametrize("memory", MEMORIES, ids=[str(settings) for settings in MEMORIES])


@pytest.mark.parametrize("guard", [ImmediateGuard, DeferredGuard])
@each_memory
def test_a_bad_batch_leaves_no_trace(memory: dict[str, Any], guard: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches NaN in the statistics, which no later batch would take out again, and a batch remembered by halves; on
    accelerators as well, whose guard never looks at a verdict.
    """
    monkeypatch.setattr(altmin, "guard_for", lambda device, policy: guard(policy))
    network = mlp()
    core = AltMin(network, nn.CrossEntropyLoss(), weights=CoactivationMemory(**memory), nonfinite="skip")
    for number in range(4):
        core.step(*batch(network))
        before = {k: v.clone() for k, v in core.state_dict().items() if "extra" not in k}
        x, y = batch(network)
        x[number] = torch.nan
        core.step(x, y)
        after = {k: v for k, v in core.state_dict().items() if "extra" not in k}
        torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert core.guard.skipped == 4


def test_a_bad_batch_that_raises_leaves_no_trace() -> None:
    """Catches directions kept for a batch that never came to its end, which the next batch would take for its own."""
    core = AltMin(mlp(), nn.CrossEntropyLoss(), weights=CoactivationMemory(every=1))
    twin = copy.deepcopy(core)
    data = [batch(core.network) for _ in range(3)]
    for x, y in data:
        with pytest.raises(NonFiniteError):
            core.step(torch.full_like(x, torch.inf), y)
        core.step(x, y)
        twin.step(x, y)
    for ours, expected in zip(core.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)


@each_memory
def test_saved_and_loaded_it_goes_on_bit_for_bit(memory: dict[str, Any]) -> None:
    """Catches state outside the buffers and the optimizer's state: the inverse, the number of batches, the norm that
    bounds steps, what is measured next.
    """
    data = [batch(mlp()) for _ in range(12)]

    def core(seed: int = 2) -> AltMin:
        torch.manual_seed(seed)
        return AltMin(mlp(), nn.CrossEntropyLoss(), weights=CoactivationMemory(**memory))

    straight, interrupted = core(), core()
    for x, y in data:
        straight.step(x, y)
    for x, y in data[:5]:
        interrupted.step(x, y)
    file = io.BytesIO()
    torch.save((interrupted.state_dict(), interrupted.optimizer.state_dict()), file)
    file.seek(0)
    resumed = core(3)  # other weights: a bound on steps must not be taken from them
    state, optimizer = torch.load(file)
    resumed.load_state_dict(state)
    resumed.optimizer.load_state_dict(optimizer)
    for x, y in data[5:]:
        resumed.step(x, y)
    for name, value in straight.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0)


@each_memory
def test_copies_go_their_own_way(memory: dict[str, Any]) -> None:
    """Catches a copy (deepcopy or pickle) that still measures into, or trains, the model it was made from."""
    core = AltMin(mlp(), nn.CrossEntropyLoss(), weights=CoactivationMemory(**memory))
    core.step(*batch(core.network))
    before = copy.deepcopy(core.state_dict())
    data = [batch(core.network) for _ in range(3)]
    copies = [copy.deepcopy(core), pickle.loads(pickle.dumps(core))]
    for each in copies:
        for x, y in data:
            each.step(x, y)
    torch.testing.assert_close(core.state_dict(), before, rtol=0, atol=0)
    for x, y in data:
        core.step(x, y)
    for each in copies:
        torch.testing.assert_close(each.state_dict(), core.state_dict(), rtol=0, atol=0)


@each_memory
def test_verify_leaves_the_memory_alone(memory: dict[str, Any]) -> None:
    """Catches a check of the engines that counts its batch."""
    core = AltMin(mlp(), nn.CrossEntropyLoss(), weights=CoactivationMemory(**memory))
    core.step(*batch(core.network))
    before = copy.deepcopy(core.state_dict())
    core.verify(*batch(core.network))
    torch.testing.assert_close(core.state_dict(), before, rtol=0, atol=0)
