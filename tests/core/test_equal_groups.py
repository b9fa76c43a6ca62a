"""Structure: one call for layers of equal settings changes the number of calls and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from lightning_altmin.optim import LayerwiseOptimizer, equal_groups_merged

Factory = Callable[[Iterable[Any]], Optimizer]

ELEMENTWISE: dict[str, Factory] = {
    "fused Adam": lambda p: Adam(p, lr=0.02, betas=(0.7, 0.95), fused=True),
    "Adam, amsgrad": lambda p: Adam(p, lr=0.02, amsgrad=True, weight_decay=0.1),
    "AdamW": lambda p: AdamW(p, lr=0.02, weight_decay=0.3),
    "SGD, Nesterov": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "RMSprop": lambda p: RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "Adagrad": lambda p: Adagrad(p, lr=0.1, lr_decay=0.01),
}


def groups_of_layers() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"a": [(3, 2), (3,)], "b": [(4, 3), (4,)], "c": [(2, 4)]}
    return [
        {
            "name": name,
            "params": [torch.nn.Parameter(torch.randn(*s, dtype=torch.float64, generator=generator)) for s in sizes],
        }
        for name, sizes in shapes.items()
    ]


def fill_gradients(optimizer: Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator)


def parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def sizes_seen(optimizer: Optimizer) -> list[int]:
    """How many parameters each group has inside the context."""
    with equal_groups_merged(optimizer):
        return [len(group["params"]) for group in optimizer.param_groups]


@pytest.mark.parametrize("factory", ELEMENTWISE.values(), ids=ELEMENTWISE)
def test_merged_steps_are_the_plain_steps(factory: Factory) -> None:
    """Catches settings of the first group used for another, lost momentum, and a step counted twice."""
    merged, plain = factory(groups_of_layers()), factory(groups_of_layers())
    for step in range(5):
        for optimizer in (merged, plain):
            fill_gradients(optimizer, step)
        plain.step()
        with equal_groups_merged(merged):
            merged.step()
    assert sizes_seen(merged) == [5]
    for one, other in zip(parameters(merged), parameters(plain), strict=True):
        assert torch.equal(one, other)
    states = merged.state_dict(), plain.state_dict()
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for index, state in states[0]["state"].items():
        for key, value in state.items():
            expected = states[1]["state"][index][key]
            assert torch.equal(value, expected) if isinstance(value, Tensor) else value == expected


def test_a_layer_with_its_own_rate_keeps_it() -> None:
    """Catches all layers stepped at the first one's rate. SGD's step is lr * gradient, known by hand."""
    groups = groups_of_layers()
    groups[1]["lr"] = 0.5
    optimizer = SGD(groups, lr=0.1)
    fill_gradients(optimizer, 3)
    expected = [p - (0.5 if i in (2, 3) else 0.1) * p.grad for i, p in enumerate(parameters(optimizer))]
    with equal_groups_merged(optimizer):
        assert len(optimizer.param_groups) == 3
        optimizer.step()
    for parameter, value in zip(parameters(optimizer), expected, strict=True):
        torch.testing.assert_close(parameter, value, rtol=0, atol=1e-15)


def test_rates_in_tensors_are_merged_only_if_they_are_one_object() -> None:
    """Catches a comparison of values, which would wait for the device in every step."""
    shared = torch.tensor(0.1)
    assert sizes_seen(SGD(groups_of_layers(), lr=shared)) == [5]
    groups = groups_of_layers()
    groups[2]["lr"] = torch.tensor(0.1)
    assert sizes_seen(SGD(groups, lr=shared)) == [2, 2, 1]


def test_optimizers_that_know_more_than_elements_are_left_alone() -> None:
    """Catches merging for optimizers that keep state per group: subclasses may, so only exact types are merged."""

    class PerGroupNorm(SGD):
        pass

    assert sizes_seen(PerGroupNorm(groups_of_layers(), lr=0.1)) == [2, 2, 1]


def test_children_of_a_composite_are_merged_each_by_itself() -> None:
    """Catches groups of one child being stepped by another."""
    first, second = groups_of_layers(), groups_of_layers()
    composite = LayerwiseOptimizer({"x": SGD(first, lr=0.1), "y": Adam(second, lr=0.01)})
    with equal_groups_merged(composite):
        assert [len(child.param_groups) for child in composite.children.values()] == [1, 1]
    assert [len(child.param_groups) for child in composite.children.values()] == [3, 3]


def test_the_groups_come_back_after_an_error() -> None:
    """Catches names and schedules lost when a step raises."""
    optimizer = SGD(groups_of_layers(), lr=0.1)
    before = optimizer.param_groups
    with pytest.raises(RuntimeError, match="boom"), equal_groups_merged(optimizer):
        raise RuntimeError("boom")
    assert optimizer.param_groups is before
