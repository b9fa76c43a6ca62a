"""Property: a bad batch changes nothing, on the CPU at once and on an accelerator without waiting for the device.

The accelerator's guard runs here on the CPU: it only never looks at a value.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import ASGD, SGD, Adam, AdamW, NAdam, RMSprop, Rprop

from lightning_altmin import AltMin, LocalGradient, altmin
from lightning_altmin.engines import Gradients
from lightning_altmin.guard import Buffers, DeferredGuard, Guard, ImmediateGuard, NonFiniteError, guard_for, is_bad
from lightning_altmin.losses import local_loss
from tests.core.comparisons import assert_bit_equal

OPTIMIZERS: dict[str, Any] = {
    "adam fused": lambda p: Adam(p, lr=0.01, fused=True),
    "adam": lambda p: Adam(p, lr=0.01),
    "adamw foreach": lambda p: AdamW(p, lr=0.01, foreach=True),
    "sgd": lambda p: SGD(p, lr=0.1),
    "sgd momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "sgd dampening": lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
    "sgd fused momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, fused=True),
    "nadam": lambda p: NAdam(p, lr=0.01),
    "rmsprop": lambda p: RMSprop(p, lr=0.01, momentum=0.5),
    "rprop": lambda p: Rprop(p, lr=0.01),
    "asgd": lambda p: ASGD(p, lr=0.01),
    "composite fused": {
        "0": lambda p: Adam(p, lr=0.01, fused=True),
        "default": lambda p: SGD(p, lr=0.1, fused=True, momentum=0.9),
    },
    "composite": {"0": lambda p: Adam(p, lr=0.01), "default": lambda p: SGD(p, lr=0.1, momentum=0.9)},
    "composite mixed": {"0": lambda p: Adam(p, lr=0.01, fused=True), "default": lambda p: SGD(p, lr=0.1)},
}


@pytest.fixture(params=[ImmediateGuard, DeferredGuard])
def guard_type(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[Guard]:
    """The guard that every new core gets, whatever its device."""
    monkeypatch.setattr(altmin, "guard_for", lambda device, policy: request.param(policy))
    return request.param


def judged(guard: Guard, batch: int, gradients: Gradients) -> Gradients:
    """The gradients that the guard admits."""
    return guard.admit(batch, 0, gradients, is_bad(gradients, [torch.tensor(0.5)]), Buffers([]))


def make(nonfinite: Any, optimizer: Any = OPTIMIZERS["adam"], steps: int = 1) -> AltMin:
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    return AltMin(module, nn.CrossEntropyLoss(), weights=LocalGradient(optimizer, steps=steps), nonfinite=nonfinite)


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [(torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(count)]


def spoilt(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x[3, 1] = value
    return x


def snapshot(core: AltMin) -> Any:
    return copy.deepcopy((core.network.state_dict(), core.optimizer.state_dict()))


def test_the_device_decides_the_guard() -> None:
    """Catches a device sync per step on an accelerator, and late errors on the CPU."""
    assert isinstance(guard_for(torch.device("cpu"), "raise"), ImmediateGuard)
    assert isinstance(guard_for(torch.device("cuda"), "raise"), DeferredGuard)
    assert isinstance(make("skip").guard, ImmediateGuard)
    with pytest.raises(ValueError, match="nonfinite must be 'raise' or 'skip', got 'ignore'"):
        make("ignore")


def test_a_model_that_moves_takes_its_verdicts_along(guard_type: type[Guard]) -> None:
    """Catches a count that begins anew, and an error that vanishes, when Lightning puts a model back on the CPU."""
    core = make("skip")
    (x, y), *_ = batches(1)
    core.step(spoilt(x, float("nan")), y)
    core._guarded = "cuda"  # as if it had been there until now
    core.step(x, y)
    core.step(spoilt(x, float("nan")), y)
    assert core.guard.skipped == 2
    core = make("raise")
    if guard_type is DeferredGuard:  # the other one has raised already
        core.step(spoilt(x, float("nan")), y)
        core._guarded = "cuda"
        with pytest.raises(NonFiniteError, match="batch 0 "):
            core.guard  # noqa: B018
        assert core.guard.skipped == 0  # it was reported, and is no more


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e25])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_skipping_is_as_if_the_batch_had_never_come(
    name: str, first: bool, value: float, guard_type: type[Guard]
) -> None:
    """Catches any trace of a bad batch in parameters, buffers or optimizer state, by training on to the same bits.

    A bad first batch matters: it must not make the optimizer's state. 1e25 is finite, and its gradients are, because
    BatchNorm divides by its deviation; but its square is not, and the running variance would be inf for good.
    """
    good = batches(3)
    clean, core = make("skip", OPTIMIZERS[name]), make("skip", OPTIMIZERS[name])
    assert type(core.guard) is guard_type
    core.optimizer  # noqa: B018  (made before the first batch)
    if first:
        core.step(spoilt(good[0][0], value), good[0][1])
    for x, y in good:
        clean.step(x, y)
        core.step(x, y)
        if not first:
            before = snapshot(core)
            core.step(spoilt(x, value), y)
            assert_bit_equal(snapshot(core), before)
    assert_bit_equal(snapshot(core), snapshot(clean))
    assert core.guard.skipped == (1 if first else 3)
    core.guard.check()  # nothing to report under "skip"
    assert all(bool(v.isfinite().all()) for v in core.network.state_dict().values())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_raising_changes_nothing_and_names_the_first_bad_batch(name: str, guard_type: type[Guard]) -> None:
    """Catches an error that comes after damage or names a later batch, and steps that go on after a bad batch."""
    good = batches(3)
    core = make("raise", OPTIMIZERS[name])
    for x, y in good[:2]:
        core.step(x, y)
    core.guard.check()
    before = snapshot(core)
    with pytest.raises(NonFiniteError, match="batch 2 "):  # noqa: PT012  (where it is raised depends on the guard)
        core.step(spoilt(good[0][0], float("nan")), good[0][1])
        assert guard_type is DeferredGuard
        core.step(*good[2])  # a no-op until the error
        core.step(spoilt(good[1][0], float("inf")), good[1][1])
        core.guard.check()
    assert_bit_equal(snapshot(core), before)
    core.guard.check()  # reported once
    core.step(*good[2])  # whoever catches the error may go on
    core.guard.check()
    with pytest.raises(AssertionError):
        assert_bit_equal(snapshot(core), before)


def test_a_run_that_begins_anew_after_the_error_trains(guard_type: type[Guard]) -> None:
    """Catches a verdict on batch 0 that the next batch 0 inherits: nothing would be trained, and nothing reported."""
    core = make("raise", lambda p: SGD(p, lr=0.1))
    x, y = batches(1)[0]
    with pytest.raises(NonFiniteError, match="batch 0 "):  # noqa: PT012
        core.step(spoilt(x, float("nan")), y)
        core.guard.check()
    core.batches_seen = 0  # as the Trainer's next fit does
    before = snapshot(core)
    core.step(x, y)
    core.guard.check()
    with pytest.raises(AssertionError):
        assert_bit_equal(snapshot(core), before)


def test_batches_of_one_number_are_told_apart(guard_type: type[Guard]) -> None:
    """Catches a run whose first batch is taken for that of the run before, as every run counts from 0: a bad one is
    not counted, and a good one is left out.
    """
    core = make("skip", lambda p: SGD(p, lr=0.1))
    x, y = batches(1)[0]
    for _ in range(3):
        core.batches_seen = 0
        core.step(spoilt(x, float("nan")), y)
    assert core.guard.skipped == 3
    core.batches_seen = 0
    before = snapshot(core)
    core.step(x, y)
    assert core.guard.skipped == 3
    with pytest.raises(AssertionError):
        assert_bit_equal(snapshot(core), before)


def test_a_diverging_update_is_caught_before_it_spreads(guard_type: type[Guard]) -> None:
    """Catches weights driven to inf by a huge rate: the batch that would do so is refused, weights stay finite."""
    core = make("raise", lambda p: SGD(p, lr=1e30))
    x, y = batches(1)[0]
    states = []
    with pytest.raises(NonFiniteError):  # noqa: PT012
        for _ in range(6):
            states.append(snapshot(core))
            core.step(x, y)
            core.guard.check()
    assert len(states) < 6
    assert_bit_equal(snapshot(core), states[-1])
    assert all(bool(v.isfinite().all()) for v in core.network.state_dict().values())


@pytest.mark.parametrize("steps", [1, 3])
def test_a_bad_batch_counts_once(steps: int, guard_type: type[Guard]) -> None:
    """Catches a batch with several weight steps counted at each of them."""
    core = make("skip", steps=steps)
    x, y = batches(1)[0]
    for _ in range(2):
        core.step(x, y)
        core.step(spoilt(x, float("nan")), y)
    assert core.guard.skipped == 2


def test_labels_out_of_range_that_nobody_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches labels on an accelerator, which are not looked at in encode: they must count as a bad batch.

    Nor may a kernel read out of bounds by them, so it is given readable ones.
    """
    loss: Any = local_loss(nn.CrossEntropyLoss(ignore_index=-5))
    output, labels = torch.randn(5, 3), torch.tensor([0, 2, -5, -1, 3])
    assert loss.readable(output, labels).tolist() == [0, 2, -5, -5, -5]
    monkeypatch.setattr(altmin, "guard_for", lambda device, policy: DeferredGuard(policy))
    core = make("skip")
    x, y = batches(1)[0]
    core.step(x, y)
    before = snapshot(core)
    monkeypatch.setattr(core, "_evidence", lambda step: [step.loss, torch.tensor(False)])
    core.step(x, y)
    assert_bit_equal(snapshot(core), before)
    assert core.guard.skipped == 1


def test_label_evidence() -> None:
    """Catches labels at the edges judged wrongly: 0 and C - 1 fit, -1 and C do not, ignored ones always do."""
    from lightning_altmin.losses import CrossEntropy, local_loss

    out = torch.zeros(2, 3)
    loss = local_loss(nn.CrossEntropyLoss(ignore_index=-5))
    assert isinstance(loss, CrossEntropy)
    verdicts = [bool(loss.labels_fit(out, torch.tensor([0, label]))) for label in (0, 2, -5, -1, 3)]
    assert verdicts == [True, True, True, False, False]


def test_guards_look_at_every_gradient(guard_type: type[Guard]) -> None:
    """Catches an inf that cancels, hides behind finite gradients, or sits in half precision."""
    inf = float("inf")
    parameter = nn.Parameter(torch.zeros(4))

    def admitted(*gradient: Tensor) -> bool:
        guard = guard_type("skip")
        judged(guard, 0, [(parameter, g) for g in gradient])
        return guard.skipped == 0

    assert admitted(torch.ones(4), torch.full((4,), 1e18))
    assert admitted(torch.full((4,), 6e4, dtype=torch.float16))
    assert admitted(torch.full((4,), 1e30, dtype=torch.float64))
    assert admitted(torch.zeros(0), torch.ones(2, 3).t())
    assert not admitted(torch.ones(4), torch.tensor([inf, -inf, 0, 0]))
    assert not admitted(torch.tensor([[0.0, float("nan")]]), torch.ones(4))
    assert not admitted(torch.tensor([inf, 0], dtype=torch.float16))
    assert not admitted(torch.full((4,), -1e30))


def test_nothing_waits_for_the_device() -> None:
    """Catches a sync per step: after the first, the deferred guard never turns a tensor into a number."""

    class Unread(Tensor):
        """A tensor that refuses to be looked at."""

        def __bool__(self) -> bool:
            raise AssertionError("looked at")

        __int__ = __float__ = item = tolist = __bool__  # type: ignore[assignment]

    linear = nn.Linear(2, 2)
    for optimizer in (Adam(linear.parameters(), fused=True), Adam(linear.parameters()), SGD(linear.parameters())):
        guard = DeferredGuard("raise")
        for number in range(3):
            gradients = [(p, torch.ones_like(p)) for p in linear.parameters()]
            if number > 0:
                gradients = [(p, g.as_subclass(Unread)) for p, g in gradients]
            for p, g in judged(guard, number, gradients):
                p.grad = g.as_subclass(Tensor)
            with guard.protect(optimizer):
                optimizer.step()
            linear.zero_grad()
        assert isinstance(guard._bad, Unread)


def test_gradients_are_zeroed_in_their_own_memory() -> None:
    """Catches a copy of all gradients at a step's peak, and one that spares nobody: a weight that is its gradient."""
    weight, bias = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3))
    bad = torch.full((2, 3), float("nan"))
    gradients: Gradients = [(weight, bad), (weight, weight.detach()), (bias, torch.ones(1).expand(3))]
    admitted = judged(DeferredGuard("skip"), 0, gradients)
    assert admitted[0][1] is bad
    assert all(not g.any() for _, g in admitted)
    assert bool((weight == 1).all())
    assert bool((gradients[2][1] == 1).all())


def test_state_made_late_begins_clean(guard_type: type[Guard]) -> None:
    """Catches a layer unfrozen during training whose first batch is bad: its optimizer state begins with the next."""
    results = []
    for bad_first in (False, True):
        core = make("skip", OPTIMIZERS["adam"])
        core.optimizer  # noqa: B018  (made with all parameters)
        core.network[3].requires_grad_(False)
        x, y = batches(1)[0]
        core.step(x, y)
        core.network[3].requires_grad_(True)
        if bad_first:
            core.step(spoilt(x, float("nan")), y)
        core.step(x, y)
        results.append(snapshot(core))
    assert_bit_equal(results[0], results[1])


def test_a_step_that_nobody_judged_is_left_alone(guard_type: type[Guard]) -> None:
    """Catches a guard that undoes steps before the first batch."""
    linear = nn.Linear(2, 2)
    optimizer = SGD(linear.parameters(), lr=1.0)
    for parameter in linear.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = linear.weight.detach().clone()
    with guard_type("raise").protect(optimizer):
        optimizer.step()
    torch.testing.assert_close(linear.weight.detach(), before - 1.0)


def test_sparse_gradients_are_judged(guard_type: type[Guard]) -> None:
    """Catches sparse gradients of an embedding being refused, or passed unseen."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(6, 3, sparse=True), nn.Flatten(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    core = AltMin(module, nn.CrossEntropyLoss(), weights=LocalGradient(lambda p: SGD(p, lr=0.1)), nonfinite="skip")
    x, y = torch.tensor([[0, 1], [2, 1], [4, 4]]), torch.tensor([0, 1, 1])
    before = copy.deepcopy(module.state_dict())
    core.step(x, y)
    changed = (module[0].weight != before["0.weight"]).any(1)
    assert changed.tolist() == [True, True, True, False, True, False]
    with torch.no_grad():
        module[0].weight[5] = float("nan")
    before = copy.deepcopy({k: v for k, v in module.state_dict().items() if k != "0.weight"})
    core.step(torch.tensor([[0, 5], [2, 1], [4, 4]]), y)
    assert core.guard.skipped == 1
    assert_bit_equal({k: v for k, v in module.state_dict().items() if k != "0.weight"}, before)
