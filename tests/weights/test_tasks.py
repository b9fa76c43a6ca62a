"""Oracle: the ridge solution over the samples that still count, written down at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_altmin import AltMin, CoactivationMemory, LayerwiseWeights, LocalGradient
from tests.weights.problems import assert_layer, random_features, ridge_over

RIDGE = 1e-3


@pytest.mark.parametrize("factor", [0.0, 0.25])
def test_a_task_can_be_forgotten(factor: float) -> None:
    """Catches a discount of A without B: samples before the switch count as much as their factor, in the solution."""
    network = random_features()
    memory = CoactivationMemory("solve", ridge=RIDGE, every=1)
    core = AltMin(network, nn.MSELoss(), weights=memory)
    x, y = torch.randn(60, 5, dtype=torch.float64), torch.randn(60, 3, dtype=torch.float64)
    core.step(x[:30], y[:30])
    memory.discount(factor)
    core.step(x[30:], y[30:])
    a = torch.cat([network[:2](x), torch.ones(60, 1, dtype=x.dtype)], 1)
    share = torch.cat([torch.full((30, 1), factor**0.5), torch.ones(30, 1)]).double()  # least squares squares it
    assert_layer(network[2], ridge_over(a * share, y * share, RIDGE, bias=False))
    with pytest.raises(ValueError, match=r"factor must lie in \[0, 1\], got 2"):
        memory.discount(2)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.lists(st.lists(st.integers(1, 8), max_size=3), min_size=1, max_size=6))
def test_a_window_is_the_solution_of_its_tasks(window: int, tasks: list[list[int]]) -> None:
    """Catches a task dropped too early or too late, sums that leave a trace of what was dropped, and a task without
    samples that does not count as one: after every task the layer is fitted to the last ``window`` of them alone.
    """
    network = random_features()
    memory = CoactivationMemory("solve", ridge=RIDGE, every=100, window=window)
    core = AltMin(network, nn.MSELoss(), weights=memory)
    seen: list[list[tuple[Tensor, Tensor]]] = []
    for task in tasks:
        memory.begin_task()
        seen.append([])
        for size in task:
            x = torch.randn(size, 5, dtype=torch.float64) * 10 ** float(torch.randint(4, ()))  # unlike sizes
            y = torch.randn(size, 3, dtype=torch.float64)
            core.step(x, y)
            seen[-1].append((network[:2](x), y))
        if counted := [pair for one in seen[-window:] for pair in one]:
            memory.solve()
            a, c = (torch.cat(each) for each in zip(*counted, strict=True))
            assert_layer(network[2], ridge_over(a, c, RIDGE), 1e-8)
        else:
            with pytest.raises(ValueError, match="seen nothing"):
                memory.solve()


def test_a_window_forgets_within_and_across_tasks() -> None:
    """Catches tasks in the past that are no longer discounted: batch t of T counts forgetting^(T - 1 - t) all over."""
    network = random_features()
    memory = CoactivationMemory("solve", ridge=RIDGE, every=1, window=2, forgetting=0.6)
    core = AltMin(network, nn.MSELoss(), weights=memory)
    pairs: list[tuple[Tensor, Tensor]] = []
    for number in range(6):
        if number % 2 == 0:
            memory.begin_task()
        x, y = torch.randn(9, 5, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)
        core.step(x, y)
        a = torch.cat([network[:2](x), torch.ones(9, 1, dtype=x.dtype)], 1)
        pairs.append((a, y))
    shares = [0.6 ** (3 - t) for t in range(4)]
    a = torch.cat([w**0.5 * a for w, (a, _) in zip(shares, pairs[2:], strict=True)])
    c = torch.cat([w**0.5 * c for w, (_, c) in zip(shares, pairs[2:], strict=True)])
    assert_layer(network[2], ridge_over(a, c, RIDGE, bias=False))


def test_a_window_belongs_to_its_layers() -> None:
    """Catches a task begun in other layers' memories, and one that is silently begun where nothing is dropped."""
    weights = LayerwiseWeights(
        {
            "0": CoactivationMemory("solve", window=2),
            "2": CoactivationMemory("solve"),
            "default": LocalGradient(),
        }
    )
    network = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    core = AltMin(network, nn.CrossEntropyLoss(), weights=weights)
    core.step(torch.randn(20, 5), torch.randint(3, (20,)))
    weights.begin_task(["2", "4"])
    counts = {name: float(value) for name, value in core.state_dict().items() if name.endswith(".rows")}
    assert list(counts.values()) == [20, 20]
    weights.begin_task()
    rows = [float(value) for name, value in core.state_dict().items() if name.endswith((".rows", "past_rows"))]
    assert sorted(rows) == [0, 20, 20]  # of the window: now, before; of the other memory
    assert "of 2 tasks" in core.explain()
    with pytest.raises(ValueError, match="no window was given; set window="):
        weights._solvers[1].begin_task()
    with pytest.raises(ValueError, match="memories with a window, there is none"):
        LayerwiseWeights({"default": CoactivationMemory()}).begin_task()
