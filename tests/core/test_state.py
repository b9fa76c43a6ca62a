"""Property: keeping codes, copying, saving and loading make no difference to what is learnt."""

from __future__ import annotations

import copy
import io
import random
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_altmin import AltMin, AltMinObjective, CodedNetwork, GradientCodes, LocalGradient
from lightning_altmin.random_state import random_state, set_random_state
from tests.core.written_out import batch, network

CODES: dict[str, Any] = {
    "one": lambda: GradientCodes(),
    "momentum": lambda: GradientCodes(steps=3, lr=0.5, momentum=0.9, nesterov=True),
}
WEIGHTS: dict[str, Any] = {
    "moved": lambda: LocalGradient(lambda p: torch.optim.Adam(p, lr=0.01)),
    "forward": lambda: LocalGradient(lambda p: torch.optim.Adam(p, lr=0.01), inputs="forward"),
    "inner": lambda: LocalGradient(lambda p: torch.optim.Adam(p, lr=0.01), steps=3),
    "inner forward": lambda: LocalGradient(lambda p: torch.optim.SGD(p, lr=0.1), steps=2, inputs="forward"),
    "composite": lambda: LocalGradient(
        {"0": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "default": lambda p: torch.optim.Adam(p, lr=0.01)}
    ),
}


def deep(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(5, 4)).double()


@pytest.mark.parametrize("engine", ["auto", "autograd"])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("codes", CODES)
def test_freeing_codes_changes_no_weight(codes: str, weights: str, engine: str) -> None:
    """Catches a forward code overwritten while something still needs it."""
    results = []
    for keep in (True, False):
        module = deep(0.3)
        core = AltMin(
            CodedNetwork(module, engine), nn.CrossEntropyLoss(), AltMinObjective(lambda_c=0.01), CODES[codes](),
            WEIGHTS[weights](),
        )  # fmt: skip
        torch.manual_seed(1)
        for _ in range(3):
            x, y = batch(module)
            result = core.step(x, y, keep_codes=keep)
        results.append(module.state_dict())
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    assert result.residuals == []


@pytest.mark.parametrize("pool", [{"kernel_size": 2}, {"kernel_size": 3, "stride": 2}], ids=["tiles", "overlapping"])
@pytest.mark.parametrize("engine", ["auto", "autograd"])
def test_a_freed_code_is_pooled_where_it_moved_to(engine: str, pool: dict[str, int]) -> None:
    """Catches encode's maxima taken for those of the moved code, which lies in the same memory: the output layer would
    be trained at its forward input.
    """
    results = []
    for keep in (True, False):
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(**pool), nn.Flatten(), nn.LazyLinear(4)]
        network = nn.Sequential(*layers).double()
        network(torch.zeros(1, 1, 8, 8, dtype=torch.float64))
        torch.manual_seed(1)
        nn.init.normal_(network[4].weight, std=0.3)
        weights = LocalGradient(lambda p: torch.optim.SGD(p, lr=0.1))
        core = AltMin(
            CodedNetwork(network, engine), nn.CrossEntropyLoss(), codes=GradientCodes(steps=2, lr=0.5), weights=weights
        )
        for _ in range(2):
            core.step(torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.randint(4, (6,)), keep_codes=keep)
        results.append(network.state_dict())
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)


def test_freed_codes_are_really_freed() -> None:
    """Catches keep_codes=False that saves nothing: when a stage's weights are done, nobody keeps the code above."""
    alive: list[list[bool]] = []

    class Watched(LocalGradient):
        def gradients(self, problem: Any) -> Any:
            alive.append([reference() is not None for reference in kept])
            return super().gradients(problem)

    module = network(5, 7, 6, 6, 4)
    core = AltMin(module, nn.CrossEntropyLoss(), codes=GradientCodes(), weights=Watched())
    step = core.encode(*batch(module), keep_codes=False)
    kept = [weakref.ref(code) for code in step.codes_forward]
    core.solve_codes(step)
    # From the output stage down. A stage reads the codes on both its sides; the one above those is gone.
    assert alive == [[True, True, True], [True, True, True], [True, True, False], [True, False, False]]
    assert [reference() for reference in kept] == [None, None, None]
    assert core.fill_gradients(step)
    assert step.codes_forward == step.moves == step.codes == []


def test_kept_codes_are_as_the_code_step_left_them() -> None:
    """Catches a weight step that overwrites what the result is to show."""
    module = network(5, 7, 6, 6, 4)
    core = AltMin(module, nn.CrossEntropyLoss(), codes=GradientCodes(), weights=WEIGHTS["moved"]())
    step = core.encode(*batch(module))
    core.solve_codes(step)
    before = [code.clone() for code in (*step.codes_forward, *step.moves)]
    core.fill_gradients(step)
    assert all(torch.equal(a, b) for a, b in zip(before, (*step.codes_forward, *step.moves), strict=True))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_deep_copy_goes_on_alone(weights: str) -> None:
    """Catches a copy that trains the original's parameters, or loses optimizer state: both must go on bit-equal."""
    core = AltMin(deep(), nn.CrossEntropyLoss(torch.rand(4).double()), weights=WEIGHTS[weights]())
    batches = [batch(core.network) for _ in range(4)]
    core.step(*batches[0])
    twin = copy.deepcopy(core)
    kept = copy.deepcopy(core.network.state_dict())
    for x, y in batches[1:]:
        twin.step(x, y)
    torch.testing.assert_close(core.network.state_dict(), kept, rtol=0, atol=0)
    for x, y in batches[1:]:
        core.step(x, y)
    torch.testing.assert_close(core.network.state_dict(), twin.network.state_dict(), rtol=0, atol=0)
    assert {id(p) for p in core.parameters()}.isdisjoint(id(p) for p in twin.parameters())


def test_the_state_dict_holds_everything_once_and_loads_safely() -> None:
    """Catches mu or a code rate that a schedule changed being lost, weights saved twice, and unsafe pickles."""
    core = AltMin(deep(), nn.CrossEntropyLoss(), AltMinObjective(0.2), GradientCodes(2, 0.3), WEIGHTS["moved"]())
    core.objective.mu.fill_(0.7)
    core.codes.lr.fill_(0.1)
    core.step(*batch(core.network))
    state = core.state_dict()
    expected = {f"network.{name}" for name in core.network.state_dict()} | {"objective.mu", "codes.lr", "_extra_state"}
    assert set(state) == expected
    file = io.BytesIO()
    torch.save({"core": state, "optimizer": core.optimizer.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    twin = AltMin(deep(), nn.CrossEntropyLoss(), AltMinObjective(0.2), GradientCodes(2, 0.3), WEIGHTS["moved"]())
    twin.load_state_dict(loaded["core"])
    twin.optimizer.load_state_dict(loaded["optimizer"])
    x, y = batch(core.network)
    core.step(x, y)
    twin.step(x, y)
    torch.testing.assert_close(core.state_dict(), twin.state_dict(), rtol=0, atol=0)
    assert float(twin.objective.mu) == 0.7


def test_mu_changed_in_place_is_used_from_then_on() -> None:
    """Catches a copy of mu kept somewhere: after a change the step must be that of a model made with the new mu."""
    x, y = batch(deep())
    results = []
    for make, change in ((0.2, 1.5), (1.5, None)):
        core = AltMin(deep(), nn.CrossEntropyLoss(), AltMinObjective(make), GradientCodes(2, 0.3), WEIGHTS["moved"]())
        if change is not None:
            core.objective.mu.fill_(change)
        core.step(x, y)
        results.append(core.network.state_dict())
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_precision_follows_the_model() -> None:
    """Catches constants of the objective (kept in float64) that raise the precision of codes or gradients."""
    core = AltMin(network(5, 7, 6, 4).float(), nn.CrossEntropyLoss(), AltMinObjective(0.2, 0.01, 0.01))
    x, y = batch(core.network)
    result = core.step(x.float(), y)
    assert {c.dtype for c in (*result.codes, *result.codes_forward, result.output, result.loss)} == {torch.float32}
    assert {p.dtype for p in core.network.parameters()} == {torch.float32}


def test_every_generator_is_saved_and_restored() -> None:
    """Catches a generator left out of exact resume, and a state that a safe checkpoint cannot hold."""

    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), float(torch.rand(()))]

    draw()
    file = io.BytesIO()
    torch.save(random_state(), file)
    first = draw()
    assert draw() != first
    file.seek(0)
    set_random_state(torch.load(file, weights_only=True))
    assert draw() == first
