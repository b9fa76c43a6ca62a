"""Layers dealt out among processes: the steps of one process, with a part of its memory each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_altmin import (
    AltMin,
    AltMinObjective,
    CurvatureCodes,
    DiscreteCodes,
    GradientCodes,
    LineSearchCodes,
    LocalGradient,
)
from lightning_altmin.guard import NonFiniteError
from lightning_altmin.nn import Sign
from lightning_altmin.parallel import LayerParallel
from lightning_altmin.parallel.cutting import cut, mark_of, refuse_uncuttable
from lightning_altmin.parallel.dealing import Dealing, balanced
from lightning_altmin.parallel.own_layers import OwnLayers
from lightning_altmin.processes import Processes
from tests.distributed.gloo import join_gloo, launch
from tests.distributed.problems import CLASSES, NETWORKS, OPTIMIZERS, batches

STEPS = 8


def model(kind: str = "mlp", dtype: torch.dtype = torch.float64, **settings: Any) -> AltMin:
    defaults: dict[str, Any] = {"loss": nn.CrossEntropyLoss(), "codes": CurvatureCodes(every=2)}
    return AltMin(NETWORKS[kind][0]().to(dtype), **(defaults | settings))


def one_process(core: AltMin, data: list[tuple[Tensor, Tensor]]) -> tuple[dict[str, Tensor], list[float]]:
    losses = [float(core.step(*batch).loss) for batch in data]
    return dict(core.network.named_parameters()), losses


SETTINGS: dict[str, Any] = {
    "adam": lambda: {},
    "sgd": lambda: {"weights": LocalGradient(OPTIMIZERS["sgd"])},
    "gradient codes": lambda: {"codes": GradientCodes(steps=2)},
    "line search": lambda: {"codes": LineSearchCodes()},
    "several code steps": lambda: {"codes": CurvatureCodes(steps=3, every=2)},
    "l1 terms": lambda: {"objective": AltMinObjective(lambda_c=0.01, lambda_w=0.01)},
    "ignored labels": lambda: {"loss": nn.CrossEntropyLoss(ignore_index=0)},
}


@pytest.mark.parametrize(("kind", "world", "parts"), [("mlp", 2, 1), ("mlp", 2, 4), ("mlp", 3, 2), ("conv", 2, 3)])
@pytest.mark.parametrize("name", SETTINGS)
def test_equals_one_process(name: str, kind: str, world: int, parts: int) -> None:
    """Catches a move, a signal or a curvature that is lost at a border, and parts that weigh the wrong amount."""
    data = batches(NETWORKS[kind][1], 7, STEPS, torch.float64)  # 7: parts of different sizes

    def share(rank: int) -> Any:
        layers = LayerParallel(model(kind, **SETTINGS[name]()), micro_batches=parts)
        losses = [float(layers.step(*batch)) for batch in data]
        layers.core.network.eval()
        return layers.gathered(), losses, layers.forward(data[0][0])

    core = model(kind, **SETTINGS[name]())
    expected, losses = one_process(core, data)
    output = core(data[0][0])
    for found, found_losses, found_output in launch(world, join_gloo(share)):
        assert found_losses == pytest.approx(losses, abs=1e-12)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value.detach(), atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(found_output, output.detach(), atol=1e-12, rtol=1e-12)


def test_a_process_holds_its_own_layers_only() -> None:
    """Catches parameters or optimizer state of layers that another process owns."""
    data = batches((6,), 8, 2, torch.float32)

    def share(rank: int) -> tuple[int, int]:
        layers = LayerParallel(model(dtype=torch.float32))
        for batch in data:
            layers.step(*batch)
        state = [v for s in layers.optimizer.state.values() for v in s.values() if v.dim() > 0]
        held = sum(p.untyped_storage().nbytes() // 4 for p in layers.core.parameters() if p.stride() != (0,) * p.dim())
        return held, sum(v.numel() for v in state)

    found = launch(2, join_gloo(share))
    # 6x8+8 = 56 | 8x7+7 = 63 and 7x3+3 = 24; Adam keeps two moments of each
    assert found == [(56, 112), (87, 174)]


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_a_bad_batch_changes_nothing_anywhere(policy: Any) -> None:
    """Catches a process that steps although another has found the batch bad: here only the lowest layers could know."""
    data = batches((6,), 8, 3, torch.float64)
    spoiled = [(x.clone(), y) for x, y in data]
    spoiled[1][0][:, 0] = 1e200  # weights of zero hide it from all layers above; the gradient's square overflows

    def model_that_ignores_a_feature() -> AltMin:
        core = model(nonfinite=policy, weights=LocalGradient(OPTIMIZERS["sgd"]))
        core.network[0].weight.data[:, 0] = 0  # type: ignore[index, union-attr]
        return core

    def share(rank: int) -> Any:
        layers = LayerParallel(model_that_ignores_a_feature())
        if policy == "raise":
            with pytest.raises(NonFiniteError, match="batch 0 "):
                layers.step(*spoiled[1])
            return layers.gathered()
        layers.step(*spoiled[1])
        layers.step(*spoiled[0])
        assert layers.core.guard.skipped == 1
        return layers.gathered()

    core = model_that_ignores_a_feature()
    expected = dict(core.network.named_parameters())
    if policy == "skip":
        one_process(core, data[:1])
    for found in launch(2, join_gloo(share)):
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value.detach(), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    "y", [torch.tensor([0, 1, CLASSES, 0]), torch.zeros(4, dtype=torch.int32), torch.zeros(3).long()]
)
def test_targets_that_do_not_fit_are_refused_by_name(y: Tensor) -> None:
    """Catches a loss that is evaluated before its targets are looked at: a kernel's own error, or a dead device."""

    def share(rank: int) -> str:
        layers = LayerParallel(model(), micro_batches=2)
        try:
            layers.step(torch.randn(4, 6, dtype=torch.float64), y)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "nothing was raised"

    assert launch(2, join_gloo(share))[1].startswith("ValueError: y ")


def test_labels_that_were_not_looked_at_spoil_the_batch() -> None:
    """Catches labels out of range that count as ignored where, as on accelerators, `check` does not look at them."""
    data = batches((6,), 8, 1, torch.float64)

    def share(rank: int) -> tuple[bool, int]:
        layers = LayerParallel(model(nonfinite="skip"))
        step = layers.encode(*data[0])
        read, step.given = step.y, torch.full_like(step.y, CLASSES)
        step.y = read if rank == 1 else step.given  # the process with the top layer reads what `readable` returned
        layers.solve_codes(step)
        return layers.fill_gradients(step), layers.core.guard.skipped

    assert launch(2, join_gloo(share)) == [(False, 1)] * 2


def test_what_cannot_be_cut_is_refused() -> None:
    """Catches a batch statistic of a part, and processes without a layer."""

    def share(rank: int) -> bool:
        network = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))
        with pytest.raises(ValueError, match="BatchNorm in training mode"):
            LayerParallel(AltMin(network, nn.CrossEntropyLoss()))
        with pytest.raises(ValueError, match=r"weights\.steps is 2"):
            LayerParallel(model(weights=LocalGradient(steps=2)))
        with pytest.raises(ValueError, match="depends on the size of a batch"):
            LayerParallel(model(objective=AltMinObjective.reference()))
        signs = nn.Sequential(nn.Linear(6, 8), Sign(), nn.Linear(8, CLASSES))
        with pytest.raises(ValueError, match="not the margins of codes=DiscreteCodes"):
            LayerParallel(AltMin(signs, nn.CrossEntropyLoss(), codes=DiscreteCodes()))
        with pytest.raises(ValueError, match="3 layers cannot be dealt out to 4 processes"):
            LayerParallel(model())
        return True

    assert launch(4, join_gloo(share)) == [True] * 4


@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.data())
def test_groups_are_balanced(costs: list[int], data: st.DataObject) -> None:
    """Catches a cut that loads one process more than need be. Oracle: all ways to cut."""
    from itertools import combinations, pairwise

    groups = data.draw(st.integers(1, len(costs)))
    found = balanced(costs, groups)
    assert [i for low, high in found for i in range(low, high + 1)] == list(range(len(costs)))
    assert all(low <= high for low, high in found)
    assert len(found) == groups
    ways = ([0, *cut, len(costs)] for cut in combinations(range(1, len(costs)), groups - 1))
    best = min(max(sum(costs[a:b]) for a, b in pairwise(way)) for way in ways)
    assert max(sum(costs[low : high + 1]) for low, high in found) == best


@pytest.mark.parametrize(("costs", "groups"), [([1.0, 2.0], 0), ([1.0, 2.0], 3), ([], 1)])
def test_more_groups_than_layers_are_refused(costs: list[float], groups: int) -> None:
    """Catches a process without a layer, and an index error where there are more processes than layers."""
    with pytest.raises(ValueError, match=f"{len(costs)} layers cannot be dealt out to {groups} processes"):
        balanced(costs, groups)


def test_targets_that_are_no_tensor_stay_whole() -> None:
    """Catches a string or a list cut into characters or entries that are not those of the samples."""
    x, y = torch.randn(4, 3), [{"boxes": 1}, {"boxes": 2}, {"boxes": 3}, {"boxes": 4}]
    ((whole, targets),) = cut(x, y, 1)
    assert whole is x
    assert targets is y
    with pytest.raises(TypeError, match="along their first dimension, got list for a tensor: use micro_batches=1"):
        cut(x, y, 2)


def test_batches_are_told_apart_by_their_inputs_alone() -> None:
    """Catches a mark that needs a tensor of targets, or is NaN where an input is and so differs from itself.

    By hand: the sum of the inputs, and of targets that have one, over the number of inputs.
    """
    x = torch.tensor([[1.0, 2.0], [4.0, 5.0]])
    assert float(mark_of(x, ["a", "b"])) == 3.0
    assert float(mark_of(x, torch.tensor([3, 1]))) == 4.0
    assert float(mark_of(x.log() * torch.nan, None)) == 0.0


class _Sharing(Processes):
    """Somebody else who shares batches."""

    def __repr__(self) -> str:
        return "Sharing()"


def _instance_norm() -> nn.Sequential:
    norm = nn.InstanceNorm2d(2, track_running_stats=True)
    return nn.Sequential(nn.Conv2d(1, 2, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))


UNCUTTABLE: dict[str, tuple[Any, str]] = {
    "instance norm": (
        lambda: AltMin(_instance_norm(), nn.CrossEntropyLoss()),
        "running statistics of an InstanceNorm: use track_running_stats=False",
    ),
    "weight steps": (lambda: model(weights=LocalGradient(steps=2)), r"one weight step per batch, weights.steps is 2"),
    "compiled": (lambda: model(compile=True), "use compile=False"),
    "shared": (lambda: model(processes=_Sharing()), r"processes=Sharing\(\), and data and layer parallelism are not"),
    "too few layers": (lambda: model(), "3 layers cannot be dealt out to 5 processes"),
}


@pytest.mark.parametrize("name", UNCUTTABLE)
def test_what_cannot_be_cut_is_refused_before_any_process_is_asked(name: str) -> None:
    """Catches a part's running statistics, inner steps, graphs of a whole batch, and samples that are shared twice."""
    make, said = UNCUTTABLE[name]
    with pytest.raises(ValueError, match=said):
        refuse_uncuttable(make(), 5)


def test_an_instance_norm_that_keeps_nothing_can_be_cut() -> None:
    """Catches a refusal of statistics that are a sample's own, or that stay as they are in eval mode."""
    network = _instance_norm()
    network[1].eval()
    refuse_uncuttable(AltMin(network, nn.CrossEntropyLoss()), 2)
    network = _instance_norm()
    network[1] = nn.InstanceNorm2d(2)
    refuse_uncuttable(AltMin(network, nn.CrossEntropyLoss()), 2)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the first and only process of a group."""
    answers = {"get_rank": 0, "get_world_size": 1, "all_gather_object": None}
    for name, answer in answers.items():
        monkeypatch.setattr(dist, name, lambda *_, answer=answer, **__: answer)


@pytest.mark.usefixtures("alone")
def test_layers_that_were_let_go_are_not_dealt_out_again() -> None:
    """Catches NaN trained as weights after a run that failed before its layers were brought back."""
    core = model()
    Dealing(core, [0, 0, 1], None)
    with pytest.raises(ValueError, match=r"held by other processes: .* Make the model anew and load the last check"):
        Dealing(core, [0, 0, 1], None)


def _own(core: AltMin) -> OwnLayers:
    return OwnLayers(core.make_optimizer(), {id(p): 0 for p in core.parameters()}, None)


@pytest.mark.usefixtures("alone")
def test_an_optimizers_state_of_other_layers_is_refused() -> None:
    """Catches momenta loaded into other layers' parameters, or none at all, without a word."""
    plain, by_name = model(), model(weights=LocalGradient({"0": torch.optim.SGD, "default": torch.optim.SGD}))
    with pytest.raises(ValueError, match=r"holds optimizers for \[\], this model has \['0', 'default'\]: .*per-layer"):
        _own(by_name).load(plain.optimizer.state_dict())
    other = model(weights=LocalGradient({"2": torch.optim.SGD, "default": torch.optim.SGD}))
    with pytest.raises(ValueError, match=r"for \['2', 'default'\], this model has \['0', 'default'\]"):
        _own(by_name).load(other.optimizer.state_dict())
    deeper = AltMin(nn.Sequential(nn.Linear(6, 8), *plain.network[1:4], nn.Linear(7, 4)), nn.CrossEntropyLoss())
    deeper.network[4].bias.requires_grad_(False)
    with pytest.raises(ValueError, match="other parameter groups: it was written for other layers"):
        _own(plain).load(deeper.optimizer.state_dict())
    plain.step(*batches((6,), 8, 1, torch.float64)[0])
    taken = _own(plain)
    taken.load(plain.optimizer.state_dict())
    assert all(float(taken.optimizer.state[p]["step"]) == 1 for p in plain.parameters())


@pytest.mark.usefixtures("alone")
def test_a_batch_that_cannot_be_used_changes_nothing() -> None:
    """Catches codes that are promised and not there, an empty batch that counts, and a mean over no samples."""
    layers = LayerParallel(model())
    ((x, y),) = batches((6,), 8, 1, torch.float64)
    with pytest.raises(ValueError, match="keep_codes: each process knows the codes of its own layers only"):
        layers.encode(x, y, keep_codes=True)
    with pytest.raises(ValueError, match=r"the batch is empty: x has shape \(0, 6\)"):
        layers.step(x[:0], y[:0])
    assert layers.core.batches_seen == 0
    torch.testing.assert_close(layers.core.network.state_dict(), model().network.state_dict(), rtol=0, atol=0)


@pytest.mark.usefixtures("alone")
def test_labels_on_a_device_are_made_readable_in_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches labels that reach a device's kernels as they came, and evidence that nobody looks for afterwards."""
    layers = LayerParallel(model(), micro_batches=3)
    layers.core.to("meta")
    read: list[Any] = []
    readable = layers.core.local_loss.readable
    monkeypatch.setattr(layers.core.local_loss, "readable", lambda *given: read.append(readable(*given)) or read[-1])
    x, y = torch.randn(8, 6, dtype=torch.float64, device="meta"), torch.zeros(8, dtype=torch.long, device="meta")
    step = layers.encode(x, y)
    assert [len(labels) for labels in read] == [3, 3, 2, 8]
    assert all(part.y is labels for part, labels in zip(step.parts, read, strict=False))
    assert all(part.loss_at.target is labels for part, labels in zip(step.parts, read, strict=False))
    assert step.y is step.loss_at.target is read[-1]
    assert step.given is y  # by which fill_gradients sees that there is evidence to ask for
