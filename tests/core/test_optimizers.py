"""Structure: one optimizer towards the outside, named groups, composites that save, load, copy and schedule rightly."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from lightning_altmin import AltMin, LocalGradient
from lightning_altmin.optim import LayerwiseOptimizer, clip_per_group
from tests.core.written_out import batch, network


def core_for(module: nn.Module, factory: Any) -> AltMin:
    return AltMin(module, nn.CrossEntropyLoss(), weights=LocalGradient(factory))


def names(optimizer: Optimizer) -> list[str]:
    return [group["name"] for group in optimizer.param_groups]


MIXED: dict[str, Any] = {
    "0": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "4": lambda p: Adam(p, lr=0.01),
    "default": lambda p: Adam(p, lr=0.02, betas=(0.5, 0.9)),
}


def test_a_factory_is_called_once_with_a_named_group_per_stage() -> None:
    """Catches an optimizer per batch (its state would be lost), a group without a name, and frozen parameters in it."""
    module = network(5, 7, 6, 4)
    module[2].bias.requires_grad_(False)
    calls: list[Any] = []

    def factory(params: Iterable[Any]) -> Optimizer:
        calls.append(list(params))
        return Adam(calls[-1], lr=0.01)

    core = core_for(module, factory)
    calls.clear()  # the constructor may try it out
    x, y = batch(module)
    for _ in range(3):
        core.step(x, y)
    assert len(calls) == 1
    assert [group["name"] for group in calls[0]] == ["0", "2", "4"]
    grouped = [[id(p) for p in group["params"]] for group in core.optimizer.param_groups]
    assert grouped == [[id(p) for p in module[i].parameters() if p.requires_grad] for i in (0, 2, 4)]
    assert int(core.optimizer.state[module[0].weight]["step"]) == 3


def test_a_stage_without_trainable_parameters_has_no_group() -> None:
    """Catches an empty group for a frozen layer; and a network frozen as a whole being 'trained'."""
    module = network(5, 7, 6, 4)
    module[2].requires_grad_(False)
    assert names(core_for(module, lambda p: SGD(p, lr=0.1)).optimizer) == ["0", "4"]
    module.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        core_for(module, lambda p: SGD(p, lr=0.1))


def test_factories_by_name_train_each_layer_as_alone() -> None:
    """Catches a layer stepped by another layer's optimizer, or by none: each is held against its optimizer alone."""
    module = network(5, 7, 6, 4)
    x, y = batch(module)
    alone = {}
    for index, name in (("0", "0"), ("2", "default"), ("4", "4")):
        twin = copy.deepcopy(module)
        core = core_for(twin, MIXED[name])
        for _ in range(1):
            core.step(x, y)
        alone[index] = [p.detach() for p in twin[int(index)].parameters()]
    core = core_for(module, MIXED)
    assert isinstance(core.optimizer, LayerwiseOptimizer)
    assert list(core.optimizer.children) == ["0", "4", "default"]
    core.step(x, y)
    for index, expected in alone.items():
        for ours, theirs in zip(module[int(index)].parameters(), expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("factories", "message"),
    [
        ({"1": MIXED["0"], "default": MIXED["0"]}, r"unknown stages \['1'\].*\['0', '2', '4'\]"),
        ({"0": MIXED["0"]}, r"nothing for stages \['2', '4'\].*'default'"),
    ],
)
def test_names_that_do_not_fit_are_refused_at_once(factories: Any, message: str) -> None:
    """Catches a typing error in a per-layer setting that shows at the first batch, or never."""
    with pytest.raises(ValueError, match=message):
        core_for(network(5, 7, 6, 4), factories)


@pytest.mark.parametrize("wrong", [None, {}, {"0": None}, Adam([torch.zeros(1, requires_grad=True)])])
def test_what_makes_no_optimizer_is_refused(wrong: Any) -> None:
    """Catches an optimizer passed for its factory."""
    with pytest.raises(TypeError, match="optimizer must be"):
        LocalGradient(wrong)


def test_state_survives_a_round_trip() -> None:
    """Catches state lost, mixed up between layers, or shared with the source: both runs must go on bit-equal."""
    module = network(5, 7, 6, 4)
    x, y = batch(module)
    core = core_for(module, MIXED)
    for _ in range(3):
        core.step(x, y)
    twin = core_for(copy.deepcopy(module), MIXED)
    twin.load_state_dict(core.state_dict())
    twin.optimizer.load_state_dict(copy.deepcopy(core.optimizer.state_dict()))
    for _ in range(3):
        core.step(x, y)
        twin.step(x, y)
    for ours, theirs in zip(module.parameters(), twin.network.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert len(twin.optimizer.state) == 6
    assert names(twin.optimizer) == ["0", "4", "2"]


def test_a_checkpoint_of_other_layers_is_refused() -> None:
    """Catches a state dict of other per-layer settings, or of a single optimizer, loaded as far as it fits."""
    core = core_for(network(5, 7, 6, 4), MIXED)
    others = core_for(network(5, 7, 6, 4), {"0": MIXED["0"], "default": MIXED["4"]})
    for source in (others.optimizer, core_for(network(5, 7, 6, 4), MIXED["4"]).optimizer):
        with pytest.raises(ValueError, match="other per-layer settings"):
            core.optimizer.load_state_dict(source.state_dict())


def test_the_state_of_a_composite_is_its_childrens() -> None:
    """Catches state read from, or written to, the wrong child: a look at it must not leave entries behind."""
    module = network(5, 7, 6, 4)
    core = core_for(module, MIXED)
    core.step(*batch(module))
    optimizer = core.optimizer
    state = dict(optimizer.state.items())
    assert set(state) == set(module.parameters())
    assert set(state[module[0].weight]) == {"momentum_buffer"}
    assert set(state[module[4].weight]) == {"step", "exp_avg", "exp_avg_sq"}
    for parameter, values in state.items():  # as Lightning does when it moves state to a device
        optimizer.state[parameter] = {k: v.clone() for k, v in values.items()}
    assert len(optimizer.children["0"].state) == 2
    assert [len(c["state"]) for c in optimizer.state_dict()["children"].values()] == [2, 2, 2]
    del optimizer.state[module[0].bias]
    assert len(optimizer.state) == 5


def test_schedulers_reach_every_child() -> None:
    """Catches a scheduler that changes copies of the groups, before or after a checkpoint was loaded."""
    core = core_for(network(5, 7, 6, 4), MIXED)
    optimizer = core.optimizer
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for child in optimizer.children.values() for group in child.param_groups] == [0.05, 0.005, 0.01]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    scheduler.step()
    assert [group["lr"] for child in optimizer.children.values() for group in child.param_groups] == [
        0.025,
        0.0025,
        0.005,
    ]
    assert all(a is b for a, b in zip(optimizer.param_groups, _groups(optimizer), strict=True))


def _groups(optimizer: LayerwiseOptimizer) -> list[dict[str, Any]]:
    return [group for child in optimizer.children.values() for group in child.param_groups]


def test_a_closure_is_evaluated_once() -> None:
    """Catches a closure run per child (it would draw several batches) or without gradients enabled."""
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    optimizer = LayerwiseOptimizer({str(i): SGD([p], lr=0.5) for i, p in enumerate(parameters)})
    calls: list[int] = []

    def closure() -> float:
        calls.append(1)
        optimizer.zero_grad()
        loss = sum((p.square().sum() for p in parameters), torch.zeros(()))
        loss.backward()
        return float(loss.detach())

    with torch.no_grad():
        assert optimizer.step(closure) == 5.0
    assert calls == [1]
    assert all(torch.equal(p.detach(), torch.zeros_like(p)) for p in parameters)


@pytest.mark.parametrize("schedule", ["OneCycleLR", "CyclicLR"])
def test_schedules_of_momentum_find_it_in_the_children(schedule: str) -> None:
    """Catches per-layer optimizers that seem to have no momentum: the schedule starts every group at the momentum it
    was told to, whichever child the group belongs to; where a child has none, it is refused as torch refuses it.
    """
    p, q = (nn.Parameter(torch.ones(1)) for _ in range(2))
    make: Any = getattr(torch.optim.lr_scheduler, schedule)
    bounds = {"max_lr": 1.0, "max_momentum": 0.7, "base_momentum": 0.5}
    bounds |= {"total_steps": 9} if schedule == "OneCycleLR" else {"base_lr": 0.1}
    adams = LayerwiseOptimizer({"a": Adam([p], lr=0.1), "b": Adam([q], lr=0.2, betas=(0.5, 0.9))})
    make(adams, **bounds)
    assert [group["betas"][0] for group in adams.param_groups] == [0.7, 0.7]
    moved = LayerwiseOptimizer({"a": SGD([p], lr=0.1, momentum=0.9), "b": SGD([q], lr=0.2, momentum=0.1)})
    make(moved, **bounds)
    assert [group["momentum"] for group in moved.param_groups] == [0.7, 0.7]
    with pytest.raises(ValueError, match="must support momentum"):
        make(LayerwiseOptimizer({"a": SGD([p], lr=0.1, momentum=0.9), "b": Adam([q], lr=0.2)}), **bounds)


def test_children_are_checked() -> None:
    """Catches a parameter stepped twice, an empty composite, and a group whose optimizer nobody knows."""
    p, q = (nn.Parameter(torch.ones(1)) for _ in range(2))
    with pytest.raises(ValueError, match="share a parameter"):
        LayerwiseOptimizer({"a": SGD([p], lr=1.0), "b": SGD([p, q], lr=1.0)})
    with pytest.raises(ValueError, match="at least one optimizer"):
        LayerwiseOptimizer({})
    with pytest.raises(ValueError, match=r"each of \['a'\], and it cannot tell"):
        LayerwiseOptimizer({"a": SGD([p], lr=1.0)}).add_param_group({"params": [q]})


def gradients(*values: list[float]) -> list[nn.Parameter]:
    parameters = []
    for value in values:
        parameter = nn.Parameter(torch.zeros(len(value)))
        parameter.grad = torch.tensor(value)
        parameters.append(parameter)
    return parameters


def test_clipping_is_per_group() -> None:
    """Catches one norm over all layers: a layer's gradient is scaled by its own norm, here 5, 13 and 1."""
    a, b, c, d = gradients([3.0, 0.0], [4.0], [5.0, 12.0], [0.6, 0.8])
    groups = [{"params": [a, b], "name": "x"}, {"params": [c], "name": "y"}, {"params": [d], "name": "z"}]
    clip_per_group(SGD(groups, lr=1.0), 2.0)
    expected = [[1.2, 0.0], [1.6], [10 / 13, 24 / 13], [0.6, 0.8]]
    for parameter, value in zip((a, b, c, d), expected, strict=True):
        torch.testing.assert_close(parameter.grad, torch.tensor(value))


def test_clipping_by_name_leaves_other_groups_alone() -> None:
    """Catches a bound applied to a layer that has none, and a group without gradients being an error."""
    a, b = gradients([3.0, 4.0], [3.0, 4.0])
    none = nn.Parameter(torch.zeros(1))
    groups = [{"params": [a], "name": "x"}, {"params": [b], "name": "y"}, {"params": [none], "name": "z"}]
    clip_per_group(SGD(groups, lr=1.0), {"y": 1.0, "z": 1.0})
    assert isinstance(a.grad, Tensor)
    assert a.grad.tolist() == [3.0, 4.0]
    torch.testing.assert_close(b.grad, torch.tensor([0.6, 0.8]))


def test_layers_of_their_own_keep_the_solvers_class() -> None:
    """Catches a subclass of LocalGradient that turns into a plain one when a module names layers' optimizers."""

    class Reversed(LocalGradient):
        def gradients(self, problem: Any) -> Any:
            return [(p, -g) for p, g in super().gradients(problem)]

    solver = Reversed(lambda p: SGD(p, lr=0.1))
    other = solver.with_layers({"0": lambda p: SGD(p, lr=0.5)})
    assert type(other) is Reversed
    module = network(5, 7, 6, 4)
    assert [g["lr"] for g in other.optimizer(AltMin(module, nn.CrossEntropyLoss()).coded.stages).param_groups] == [
        0.5, 0.1, 0.1,
    ]  # fmt: skip
    assert isinstance(solver.optimizer(AltMin(module, nn.CrossEntropyLoss()).coded.stages), SGD)  # and is as it was


@pytest.mark.parametrize("composite", [False, True])
def test_lbfgs_is_refused(composite: bool) -> None:
    """Catches an optimizer that would call a closure which does not exist, alone or as one layer's."""

    def lbfgs(params: Iterable[Any]) -> Optimizer:
        return torch.optim.LBFGS([p for group in params for p in group["params"]])

    factory: Any = {"0": lbfgs, "default": SGD} if composite else lbfgs
    with pytest.raises(ValueError, match="weights: LBFGS evaluates the loss several times"):
        core_for(network(5, 7, 6, 4), factory)
