"""Processes that share a batch take the step that one process takes on the whole batch: the plain core, no Trainer.

The oracle is always the same model on one process; float64 leaves no room for a wrong factor.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_altmin import (
    AltMin,
    AltMinObjective,
    CodedNetwork,
    CurvatureCodes,
    DiscreteCodes,
    GradientCodes,
    LocalGradient,
    ProximalWeights,
)
from lightning_altmin.guard import NonFiniteError
from lightning_altmin.nn import MLP, Sign
from lightning_altmin.parallel import DataParallel
from lightning_altmin.processes import Processes
from tests.distributed.gloo import ProcessError, join_gloo, launch
from tests.distributed.problems import CLASSES, NETWORKS, OPTIMIZERS, TOLERANCE, batches, mlp, part

STEPS = 7  # of CurvatureCodes(every=2): batches that measure and batches that do not
State = dict[str, Tensor]


def train(core: AltMin, data: list[tuple[Tensor, Tensor]]) -> State:
    """Parameters, buffers, optimizer state and the last loss, flattened by name."""
    for batch in data:
        loss = core.step(*batch).loss
    state = {name: value for name, value in core.state_dict().items() if isinstance(value, Tensor)}
    for index, values in enumerate(core.optimizer.state.values()):
        state |= {f"optimizer.{index}.{name}": v for name, v in values.items() if isinstance(v, Tensor)}
    return state | {"loss": loss}


def compare(found: list[State], expected: State, tolerance: float) -> None:
    for state in found:
        assert state.keys() == expected.keys()
        for name, value in state.items():
            difference = (value - expected[name]).abs().max() / (1 + expected[name].abs().max())
            assert difference <= tolerance, f"{name} differs from one process by {difference:.2e}"
            assert torch.equal(value, found[0][name]), f"{name} differs between processes"


def model(kind: str, dtype: torch.dtype, processes: Processes | None = None, **settings: Any) -> AltMin:
    network = NETWORKS[kind][0]().to(dtype)
    defaults: dict[str, Any] = {"loss": nn.CrossEntropyLoss(), "codes": CurvatureCodes(every=2)}
    return AltMin(network, processes=processes, **(defaults | settings))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("sizes", [(4, 4), (6, 1), (1, 3, 2, 1)], ids=str)
def test_equals_one_process_in_double_precision(kind: str, optimizer: str, sizes: tuple[int, ...]) -> None:
    """Catches a mean of means, a curvature or a signal of one process's own samples, a step that is not shared."""
    data = batches(NETWORKS[kind][1], sum(sizes), STEPS, torch.float64)
    weights = LocalGradient(OPTIMIZERS[optimizer])

    def share(rank: int) -> State:
        core = model(kind, torch.float64, DataParallel(), weights=weights)
        return train(core, [part(batch, sizes, rank) for batch in data])

    expected = train(model(kind, torch.float64, weights=weights), data)
    compare(launch(len(sizes), join_gloo(share)), expected, TOLERANCE[kind])
    curvature = expected["codes.curvature"]
    assert bool((curvature > 1.0).any()), "the measurement would not be seen"


@pytest.mark.parametrize("kind", NETWORKS)
def test_equals_one_process_in_single_precision(kind: str) -> None:
    """Catches what only shows in single precision: a flat tensor of another type, a count that is rounded."""
    data = batches(NETWORKS[kind][1], 8, STEPS, torch.float32)
    weights = LocalGradient(OPTIMIZERS["sgd"])

    def share(rank: int) -> State:
        core = model(kind, torch.float32, DataParallel(), weights=weights)
        return train(core, [part(batch, (5, 3), rank) for batch in data])

    found = launch(2, join_gloo(share))
    assert {v.dtype for name, v in found[0].items() if name.endswith("weight")} == {torch.float32}
    expected = train(model(kind, torch.float32, weights=weights), data)
    # Small moves pass through a residual block by a difference, which has half the digits.
    compare([_weights(state) for state in found], _weights(expected), 1e-4 if kind == "residual" else 1e-6)
    # Curvatures are ratios of sums of squares, whose last digits depend on the order of the samples.
    compare(found, expected, 1e-4 if kind == "residual" else 1e-5)


def _weights(state: State) -> State:
    return {name: value for name, value in state.items() if not name.startswith("codes.")}


class SmoothL1Coupling(AltMinObjective):
    """An objective of a user's own, of a sample each."""

    def code_coupling_gradient(self, residual: Tensor) -> Tensor:
        return residual.clamp(-1, 1)

    def weight_coupling_gradient(self, residual: Tensor, signal: Tensor | None = None) -> Tensor:
        return super().weight_coupling_gradient(self.code_coupling_gradient(residual), signal)


WEIGHTED = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
SETTINGS: dict[str, dict[str, Any]] = {
    "class weights": {"loss": nn.CrossEntropyLoss(weight=WEIGHTED)},
    "label smoothing": {"loss": nn.CrossEntropyLoss(weight=WEIGHTED, label_smoothing=0.1)},
    "ignored labels": {"loss": nn.CrossEntropyLoss(ignore_index=0)},
    "a function": {"loss": lambda output, y: nn.functional.multi_margin_loss(output, y)},
    "l1 terms": {"objective": AltMinObjective(mu=2.0, lambda_c=0.01, lambda_w=0.01)},
    "another coupling": {"objective": SmoothL1Coupling()},
    "several code steps": {"codes": CurvatureCodes(steps=3, every=2)},
    "gradient codes": {"codes": GradientCodes(steps=2, momentum=0.5)},
    "discrete codes": {
        "network": MLP(6, [8, 7], 3, activation=Sign).double(),
        "codes": DiscreteCodes(flips=4),
        "objective": AltMinObjective(mu=0.01),
    },
    "proximal weights": {"weights": ProximalWeights(), "objective": AltMinObjective(lambda_w=0.01)},
    "several weight steps": {"weights": LocalGradient(OPTIMIZERS["adam"], steps=3)},
    "an optimizer per layer": {"weights": LocalGradient({"0": OPTIMIZERS["sgd"], "default": OPTIMIZERS["adam"]})},
    "another engine": {"network": CodedNetwork(mlp().double(), engine="autograd")},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_equal_one_process(name: str) -> None:
    """Catches a loss whose mean is not over samples, and every setting whose share of a batch is not its part."""
    data = batches((6,), 9, STEPS, torch.float64)

    def fresh(processes: Processes | None = None) -> AltMin:
        settings = copy.deepcopy(SETTINGS[name])
        network = settings.pop("network", None)
        if network is None:
            return model("mlp", torch.float64, processes, **settings)
        settings = {"codes": CurvatureCodes(every=2)} | settings
        return AltMin(network, nn.CrossEntropyLoss(), processes=processes, **settings)

    def share(rank: int) -> State:
        return train(fresh(DataParallel()), [part(batch, (6, 3), rank) for batch in data])

    compare(launch(2, join_gloo(share)), train(fresh(), data), 1e-12)


def test_one_collective_per_step() -> None:
    """Catches a gradient or a statistic that is sent by itself, and a barrier: each costs a round trip per batch."""
    data = batches((6,), 8, STEPS, torch.float32)

    def share(rank: int) -> tuple[list[int], int]:
        sent: list[int] = []
        names = ("all_reduce", "broadcast", "barrier", "all_gather", "reduce", "all_gather_object")
        originals = {name: getattr(dist, name) for name in names}

        def counted(name: str) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                sent.append(args[0].numel() if args and isinstance(args[0], Tensor) else 0)
                return originals[name](*args, **kwargs)

            return call

        core = model("mlp", torch.float32, DataParallel())
        core.step(*part(data[0], (4, 4), rank))  # which also asks whether all processes train the same model
        for name in names:
            setattr(dist, name, counted(name))
        for batch in data[1:]:
            core.step(*part(batch, (4, 4), rank))
        for name in names:
            setattr(dist, name, originals[name])
        return sent, sum(p.numel() for p in core.parameters())

    for sent, parameters in launch(2, join_gloo(share)):
        assert len(sent) == STEPS - 1
        # loss, verdict, two weights; numerator and denominator of two curvatures where they are measured
        assert set(sent) == {parameters + 4, parameters + 4 + 4}


@pytest.mark.parametrize("policy", ["raise", "skip"])
@pytest.mark.parametrize("at", [1, 3])
def test_a_bad_batch_on_one_process_is_bad_on_all(policy: Any, at: int) -> None:
    """Catches a process that goes on alone, or weights that a NaN has reached."""
    data = batches((1, 6, 6), 8, 5, torch.float64)
    good = [batch for number, batch in enumerate(data) if number != at]
    spoiled = [(x.clone(), y) for x, y in data]
    spoiled[at][0][6, 0, 2, 2] = float("nan")  # of the second process

    def share(rank: int) -> Any:
        # measures in the first five batches, so in the bad one too
        core = model("conv", torch.float64, DataParallel(), nonfinite=policy, codes=CurvatureCodes())
        parts = [part(batch, (4, 4), rank) for batch in spoiled]
        if policy == "skip":
            return train(core, parts), core.guard.skipped
        before = train(core, parts[:at])
        with pytest.raises(NonFiniteError, match=f"batch {at} "):
            core.step(*parts[at])
        state = {name: value for name, value in core.state_dict().items() if name in before}
        return all(torch.equal(value, before[name]) for name, value in state.items() if "extra" not in name)

    found = launch(2, join_gloo(share))
    if policy == "raise":
        assert found == [True, True]
        return
    core = model("conv", torch.float64, codes=CurvatureCodes())
    expected = train(core, good)
    for state, skipped in found:
        assert skipped == 1
        state.pop("_extra_state")
    expected.pop("_extra_state")
    compare([state for state, _ in found], expected, 1e-12)


@pytest.mark.parametrize("synchronised", [False, True])
def test_running_statistics(synchronised: bool) -> None:
    """Catches processes whose BatchNorms drift apart. Oracle: means of the parts' moments, or the whole batch's own."""
    data = batches((6,), 8, 3, torch.float64)

    def share(rank: int) -> State:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES)).double()
        processes = DataParallel(sync_batch_norm=synchronised)
        core = AltMin(network, nn.CrossEntropyLoss(), processes=processes)
        first = network[0](part(data[0], (5, 3), rank)[0]).detach()
        core.step(*part(data[0], (5, 3), rank))
        return {"running": network[1].running_mean, "variance": network[1].running_var, "codes": first}

    found = launch(2, join_gloo(share))
    codes = [state["codes"] for state in found]
    averaged = (5 * codes[0].var(0) + 3 * codes[1].var(0)) / 8
    variance = 0.9 + 0.1 * (torch.cat(codes).var(0) if synchronised else averaged)
    for state in found:
        torch.testing.assert_close(state["running"], 0.1 * torch.cat(codes).mean(0), atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(state["variance"], variance, atol=1e-12, rtol=1e-12)


def test_batch_norms_gradients_are_averaged() -> None:
    """Catches gradients through statistics of other samples. Oracle: without momentum, SGD is linear in the gradients.

    So the weights after a step of two processes are the weighted mean of those after a step on either part alone.
    """
    (batch,) = batches((6,), 8, 1, torch.float64)
    sizes = (5, 3)

    def stepped(batch: tuple[Tensor, Tensor], processes: Processes | None = None) -> State:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 7), nn.Tanh())
        network.append(nn.Linear(7, CLASSES))
        weights = LocalGradient(lambda params: torch.optim.SGD(params, lr=0.5))
        codes = GradientCodes(steps=2)
        core = AltMin(network.double(), nn.CrossEntropyLoss(), codes=codes, weights=weights, processes=processes)
        core.step(*batch)
        return {name: value.detach() for name, value in network.named_parameters()}

    found = launch(2, join_gloo(lambda rank: stepped(part(batch, sizes, rank), DataParallel())))
    one, other = (stepped(part(batch, sizes, rank)) for rank in range(2))
    expected = {name: (5 * one[name] + 3 * other[name]) / 8 for name in one}
    compare(found, expected, 1e-12)


DIFFERENCES: dict[str, tuple[Any, str]] = {
    "weights": (lambda rank: _reseeded(rank), "start with different weights: call processes.broadcast"),
    "model": (lambda rank: nn.Sequential(nn.Linear(6, 8 + rank), nn.ReLU(), nn.Linear(8 + rank, 3)), "differ in model"),
}


def _reseeded(rank: int) -> nn.Module:
    torch.manual_seed(rank)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, CLASSES))


@pytest.mark.parametrize("name", DIFFERENCES)
def test_processes_that_differ_are_refused(name: str) -> None:
    """Catches an average of unlike models, and a process that waits for a message that never comes."""
    make, message = DIFFERENCES[name]
    data = batches((6,), 8, 1, torch.float32)

    def share(rank: int) -> bool:
        core = AltMin(make(rank), nn.CrossEntropyLoss(), processes=DataParallel())
        with pytest.raises(RuntimeError, match=message):
            core.step(*part(data[0], (4, 4), rank))
        return True

    assert launch(2, join_gloo(share)) == [True, True]


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches processes of two installations that would exchange what the other does not understand."""
    import lightning_altmin.parallel.agreement as agreement

    data = batches((6,), 8, 1, torch.float32)

    def share(rank: int) -> bool:
        if rank == 1:
            monkeypatch.setattr(agreement, "__version__", "0.0.0")
        with pytest.raises(RuntimeError, match=r"processes 0 and 1 differ in lightning_altmin: .*'0\.0\.0'"):
            model("mlp", torch.float32, DataParallel()).step(*part(data[0], (4, 4), rank))
        return True

    assert launch(2, join_gloo(share)) == [True, True]


def test_broadcast_makes_processes_equal() -> None:
    """Catches a broadcast that leaves a tensor out."""
    data = batches((6,), 8, 3, torch.float64)

    def share(rank: int) -> State:
        processes = DataParallel()
        core = AltMin(_reseeded(rank).double(), nn.CrossEntropyLoss(), processes=processes)
        processes.broadcast(core)
        return train(core, [part(batch, (4, 4), rank) for batch in data])

    compare(launch(2, join_gloo(share)), train(AltMin(_reseeded(0).double(), nn.CrossEntropyLoss()), data), 1e-12)


def test_codes_that_depend_on_the_batch_are_refused() -> None:
    """Catches an objective that divides by the size of a process's own part."""
    data = batches((6,), 8, 1, torch.float32)

    def share(rank: int) -> bool:
        core = model("mlp", torch.float32, DataParallel(), objective=AltMinObjective.reference(), codes=GradientCodes())
        with pytest.raises(ValueError, match="ReferenceObjective divides a sample's signal"):
            core.step(*part(data[0], (4, 4), rank))
        return True

    assert launch(2, join_gloo(share)) == [True, True]


class Sums(LocalGradient):
    """A weight solver that keeps sums over samples."""

    def gradients(self, problem: Any) -> Any:
        if problem.stage.name == "0":
            self.own = problem.input.T @ problem.input
        return super().gradients(problem)

    def measured(self) -> list[Tensor]:
        return [self.own]

    def learn(self, sums: Any) -> None:
        (self.total,) = sums


def test_a_weight_solvers_sums_are_summed() -> None:
    """Catches sums that are averaged, or that reach another owner than the one they came from."""
    (batch,) = batches((6,), 8, 1, torch.float64)

    def share(rank: int) -> tuple[Tensor, Tensor]:
        core = model("mlp", torch.float64, DataParallel(), weights=Sums())
        core.step(*part(batch, (5, 3), rank))
        return core.weights.total, core.codes.curvature

    alone = model("mlp", torch.float64)
    alone.step(*batch)
    for total, curvature in launch(2, join_gloo(share)):
        torch.testing.assert_close(total, batch[0].T @ batch[0], atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(curvature, alone.codes.curvature, atol=1e-12, rtol=1e-12)


def test_a_failing_process_is_reported_by_the_harness() -> None:
    """Catches a harness that would let a failed assertion in a process pass."""

    def fail(rank: int) -> None:
        assert rank == 0, "as it should"

    with pytest.raises(ProcessError, match="as it should"):
        launch(2, fail)
