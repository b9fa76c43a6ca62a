"""Callbacks that act at boundaries: early stopping, checkpoints, optimizer state, penalties."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import nn
from torch.nn import functional

from lightning_altmin import AltMinModule, BackpropModule
from lightning_altmin.continual import (
    ContinualEvaluation,
    MemoryPolicy,
    OnlineEWC,
    OnlineTaskStreamDataModule,
    Replay,
    ReservoirBuffer,
    ResetOptimizerState,
    SynapticIntelligence,
    TaskCheckpoint,
    TaskEarlyStopping,
    TaskLearningRates,
    TaskStreamDataModule,
)
from lightning_altmin.weights import CoactivationMemory, LayerwiseWeights, LocalGradient
from tests.continual.problems import backprop, blob_data, blob_stream, fit, small_network
from tests.continual.recording import Record, SaveAt, state_of
from tests.module.interruption import assert_equal
from tests.module.problems import weights

# -------------------------------------------------------------------- early stopping


class Scripted(BackpropModule):
    """Logs given values instead of its validation loss, one per epoch of the run."""

    def __init__(self, values: list[float]) -> None:
        super().__init__(small_network(), optimizer=lambda p: torch.optim.SGD(p, lr=0.01))
        self.values = values

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("watched", self.values[self.trainer.fit_loop.epoch_progress.current.processed])


def epochs_of_tasks(record: Record) -> list[int]:
    """Epochs per task, of three batches of (24 - 3) * 2 samples."""
    counts = [0, 0, 0]
    for _, labels in record.batches:
        counts[labels[0] // 2] += 1
    return [count // 3 for count in counts]


def validated_data() -> TaskStreamDataModule:
    return TaskStreamDataModule(blob_stream(val_split=6), batch_size=16, epochs_per_task=5)


# Task 0 improves twice and then not for two epochs; task 1 never improves; task 2 improves in every epoch.
SCRIPT = [3.0, 2.0, 2.0, 2.5, 9.0, 9.0, 9.0, 5.0, 4.0, 3.0, 2.0, 1.0]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_task_that_stops_improving_ends_and_the_stream_goes_on(sign: int) -> None:
    """Catches the run ending instead of the task, a best value kept from the task before, and counts off by one."""
    record = Record()
    stopping = TaskEarlyStopping("watched", "min" if sign == 1 else "max", patience=2)
    trainer = fit(Scripted([sign * value for value in SCRIPT]), validated_data(), record, stopping)
    assert epochs_of_tasks(record) == [4, 3, 5]
    assert stopping.stopped == {0: 3, 1: 2}
    assert trainer.current_epoch == 12  # of 15: the run ended with the stream
    assert [event[:2] for event in record.events] == [(hook, task) for task in range(3) for hook in ("start", "end")]


def test_small_improvements_do_not_count() -> None:
    """Catches min_delta being left out."""
    record = Record()
    values = [1.0, 0.95, 0.9] * 3
    fit(Scripted(values), validated_data(), record, TaskEarlyStopping("watched", patience=2, min_delta=0.2))
    assert epochs_of_tasks(record) == [3, 3, 3]


@pytest.mark.parametrize("call", [1, 2, 4, 5, 7, 8, 10])
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_epoch_end"])
def test_early_stopping_resumes(hook: str, call: int, tmp_path: Path) -> None:
    """Catches a position, best value or patience that a resumed run has lost: its tasks would have other lengths."""
    call, path, ends = call if "epoch" in hook else 3 * call - 1, tmp_path / "saved.ckpt", []
    for ckpt in (None, path):
        record, stopping = Record(), TaskEarlyStopping("watched", patience=2)
        saver = SaveAt(hook, call if ckpt is None else -1, path)
        trainer = fit(Scripted(SCRIPT), validated_data(), record, stopping, saver, ckpt=ckpt)
        ends.append((state_of(trainer), record.batches))
    assert_equal(ends[0][0], ends[1][0])
    assert ends[1][1] == ends[0][1][-len(ends[1][1]) :]


def test_early_stopping_errors() -> None:
    """Catches a value that is never logged being taken for no improvement, and a stream without epochs."""
    with pytest.raises(MisconfigurationException, match="no such value was logged"):
        fit(backprop(), blob_data(), TaskEarlyStopping("nothing"))
    online = OnlineTaskStreamDataModule(blob_stream(), boundaries=True)
    with pytest.raises(MisconfigurationException, match="tasks with epochs"):
        fit(backprop(), online, TaskEarlyStopping())
    for arguments in ({"mode": "up"}, {"patience": 0}, {"min_delta": -1.0}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            TaskEarlyStopping(**arguments)


# -------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("name", ["task=0.ckpt", "task=1.ckpt"])
@pytest.mark.parametrize("online", [False, True])
def test_a_stream_goes_on_from_the_end_of_any_task(name: str, online: bool, tmp_path: Path) -> None:
    """Catches a task's checkpoint written before the others' hooks: importances and matrix rows would be missing."""

    def parts() -> tuple[Any, ...]:
        stream, replay = blob_stream(), Replay(ReservoirBuffer(20), 5)
        if online:
            data: Any = OnlineTaskStreamDataModule(stream, 12, replay=replay, boundaries=True)
        else:
            data = TaskStreamDataModule(stream, 12, epochs_per_task=2, replay=replay)
        return data, TaskCheckpoint(tmp_path), ContinualEvaluation(), OnlineEWC(2.0), SynapticIntelligence(2.0)

    expected = state_of(fit(backprop(momentum=0.9), *parts()))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["task=0.ckpt", "task=1.ckpt", "task=2.ckpt"]
    got = state_of(fit(backprop(momentum=0.9), *parts(), ckpt=tmp_path / name))
    assert_equal(expected, got)


def test_the_newest_state_is_saved_every_n_batches_and_after_epochs(tmp_path: Path) -> None:
    """Catches saves at other batches, and one between an epoch's last batch and what follows from it."""
    saves = []

    class Spy(TaskCheckpoint):
        def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
            before = len(saves)
            trainer.save_checkpoint = lambda path: saves.append((trainer.global_step, path.name, "batch"))
            super().on_train_batch_end(trainer, *rest)
            assert len(saves) <= before + 1

        def on_train_epoch_end(self, trainer: Any, *rest: Any) -> None:
            trainer.save_checkpoint = lambda path: saves.append((trainer.global_step, path.name, "epoch"))
            super().on_train_epoch_end(trainer, *rest)

    fit(backprop(), blob_data(), Spy(tmp_path, every_n_batches=1, tasks=False))
    kinds = ["batch", "batch", "epoch"] * 3
    assert saves == [(step + 1, "last.ckpt", kind) for step, kind in enumerate(kinds)]
    for arguments in ({"every_n_batches": 0}, {"tasks": False}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            TaskCheckpoint(tmp_path, **arguments)


# -------------------------------------------------------------------- optimizer state


@pytest.mark.parametrize("policy", ["keep", "state", "full"])
def test_optimizer_state_at_a_switch(policy: str) -> None:
    """Catches momenta kept or cleared against the policy, and schedules that are not put back.

    The oracle is plain torch on the same batches: a new SGD per task, or one for all.
    """
    record = Record()
    module = BackpropModule(
        small_network(),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
        lr_interval="step",
    )
    seen: list[Any] = []

    class Keep(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            seen.append(batch)

    fit(module, blob_data(), record, Keep(), ResetOptimizerState(policy))  # type: ignore[arg-type]
    network = small_network()

    def begin() -> tuple[Any, Any]:
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)

    optimizer, schedule = begin()
    for number, (x, y) in enumerate(seen):
        if number in (3, 6) and policy != "keep":
            if policy == "full":
                optimizer, schedule = begin()
            optimizer.state.clear()
        optimizer.zero_grad()
        functional.cross_entropy(network(x), y).backward()
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(dict(module.network.state_dict()), dict(network.state_dict()))


def test_altmins_optimizer_is_reset_too() -> None:
    """Catches a composite optimizer whose children keep their momenta."""
    counts = []

    class Count(Callback):
        def on_train_batch_start(self, trainer: Any, *rest: Any) -> None:
            counts.append(len(trainer.optimizers[0].state))

    fit(AltMinModule(small_network()), blob_data(), ResetOptimizerState(), Count())
    assert [count == 0 for count in counts] == [True, False, False] * 3
    with pytest.raises(ValueError, match="policy"):
        ResetOptimizerState("some")  # type: ignore[arg-type]


@pytest.mark.parametrize("call", [2, 4, 7])
def test_a_full_reset_resumes(call: int, tmp_path: Path) -> None:
    """Catches settings of the start that a resumed run takes from where it was resumed."""
    ends = []
    for ckpt in (None, tmp_path / "saved.ckpt"):
        module = BackpropModule(
            small_network(),
            optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
            lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
            lr_interval="step",
        )
        saver = SaveAt("on_train_batch_end", call if ckpt is None else -1, tmp_path / "saved.ckpt")
        ends.append(state_of(fit(module, blob_data(), ResetOptimizerState("full"), saver, ckpt=ckpt)))
    assert_equal(ends[0], ends[1])


# -------------------------------------------------------------------- penalties


class SoftmaxRegression(BackpropModule):
    def __init__(self, lr: float = 0.05) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(8, 6), optimizer=lambda p: torch.optim.SGD(p, lr=lr))


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_fisher_information_of_softmax_regression(fisher: str) -> None:
    """Catches batch gradients squared instead of samples', wrong weights of labels, and sums instead of means.

    With logits W x + b: the gradient of -log p_y is (p - e_y) x^T, so the exact diagonal is mean p_c (1 - p_c) x_i^2
    and the empirical one mean (p_c - y_c)^2 x_i^2.
    """
    stream = blob_stream()
    data, ewc = TaskStreamDataModule(stream.first(1), batch_size=16), OnlineEWC(1.0, fisher=fisher, samples=None)  # type: ignore[arg-type]
    module = SoftmaxRegression()
    fit(module, data, ewc)
    x, y = stream[0].train.read(torch.arange(48))
    with torch.no_grad():
        p = functional.softmax(module.network(x), 1)
    square = p * (1 - p) if fisher == "exact" else (p - functional.one_hot(y, 6)).square()
    torch.testing.assert_close(ewc.importance["network.weight"], square.t() @ x.square() / 48)
    torch.testing.assert_close(ewc.importance["network.bias"], square.mean(0))


def test_sampled_fisher_information_is_the_exact_one_on_average() -> None:
    """Catches labels that are not drawn from the model."""
    module, total = SoftmaxRegression(), None
    data = blob_data()
    trainer = fit(module, data)
    task = data.stream[1]
    for seed in range(60):
        sampled = OnlineEWC(1.0, fisher="sample", samples=None, seed=seed).information(trainer, module, task)
        total = sampled["network.bias"] if total is None else total + sampled["network.bias"]
    exact = OnlineEWC(1.0, samples=None).information(trainer, module, task)["network.bias"]
    torch.testing.assert_close(total / 60, exact, rtol=0.25, atol=2e-3)


@pytest.mark.parametrize("altmin", [False, True])
def test_the_penalty_is_added_to_the_gradient(altmin: bool) -> None:
    """Catches penalties of another size or sign, and ones that do not reach AltMin's optimizer.

    One SGD step with and without the penalty differs by minus the rate times the penalty's gradient.
    """
    ends = []
    for strength in (0.0, 3.0):
        torch.manual_seed(0)
        optimizer = lambda p: torch.optim.SGD(p, lr=0.01)  # noqa: E731
        module: Any = (
            AltMinModule(small_network(), weights=LocalGradient(optimizer))
            if altmin
            else BackpropModule(small_network(), optimizer=optimizer)
        )
        ewc = OnlineEWC(strength)

        class Plant(Callback):
            def on_train_start(self, trainer: Any, module: Any, ewc: Any = ewc) -> None:
                g = torch.Generator().manual_seed(1)
                named = dict(module.named_parameters())
                ewc.importance = {n: torch.rand(p.shape, generator=g) for n, p in named.items()}
                ewc.anchor = {n: torch.randn(p.shape, generator=g) for n, p in named.items()}
                self.before = {n: p.detach().clone() for n, p in named.items()}

        plant = Plant()
        stop = TaskStreamDataModule(blob_stream().first(1), batch_size=48)
        fit(module, stop, plant, ewc, max_steps=1)
        ends.append(({n: p.detach().clone() for n, p in module.named_parameters()}, plant, ewc))
    plain, (penalised, plant, ewc) = ends[0][0], ends[1]
    g = torch.Generator().manual_seed(1)
    importance = {n: torch.rand(p.shape, generator=g) for n, p in plant.before.items()}
    anchor = {n: torch.randn(p.shape, generator=g) for n, p in plant.before.items()}
    for name, before in plant.before.items():
        pull = 3.0 * importance[name] * (before - anchor[name])
        torch.testing.assert_close(penalised[name] - plain[name], -0.01 * pull, rtol=1e-4, atol=1e-6)


def test_online_ewc_discounts_earlier_tasks() -> None:
    """Catches a discount of the new task, and an anchor that stays at the first task."""
    infos: list[Any] = []

    class Spy(OnlineEWC):
        def information(self, *arguments: Any) -> Any:
            infos.append(super().information(*arguments))
            return infos[-1]

    ewc, module = Spy(0.1, gamma=0.5, samples=20), SoftmaxRegression()
    fit(module, blob_data(), ewc)
    expected = 0.25 * infos[0]["network.weight"] + 0.5 * infos[1]["network.weight"] + infos[2]["network.weight"]
    torch.testing.assert_close(ewc.importance["network.weight"], expected)
    assert torch.equal(ewc.anchor["network.weight"], module.network.weight)
    assert ewc.state_bytes == 2 * 4 * (6 * 8 + 6)


def test_synaptic_intelligence_by_hand() -> None:
    """Catches a path of gradients that include the penalty, and changes of the wrong step.

    The oracle is a loop in plain torch over the same batches.
    """
    seen: list[Any] = []

    class Keep(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            seen.append(batch)

    si, module = SynapticIntelligence(0.7, damping=0.01), SoftmaxRegression()
    fit(module, blob_data(), si, Keep())
    theta = SoftmaxRegression().network.weight.detach().clone()
    bias = SoftmaxRegression().network.bias.detach().clone()
    state = {"w": [theta, None, None], "b": [bias, None, None]}  # value, importance, anchor
    for task in range(3):
        start = {k: v[0].clone() for k, v in state.items()}
        path = {k: torch.zeros_like(v[0]) for k, v in state.items()}
        for x, y in seen[3 * task : 3 * task + 3]:
            w, b = state["w"][0].clone().requires_grad_(), state["b"][0].clone().requires_grad_()
            gradients = torch.autograd.grad(functional.cross_entropy(functional.linear(x, w, b), y), (w, b))
            for key, gradient in zip("wb", gradients, strict=True):
                value, importance, anchor = state[key]
                pull = 0.0 if importance is None else 0.7 * importance * (value - anchor)
                new = value - 0.05 * (gradient + pull)
                path[key] -= gradient * (new - value)
                state[key][0] = new
        for key, (value, importance, _) in state.items():
            added = path[key].clamp_min(0) / ((value - start[key]).square() + 0.01)
            state[key][1:] = [added if importance is None else importance + added, value.clone()]
    torch.testing.assert_close(module.network.weight.detach(), state["w"][0])
    torch.testing.assert_close(si.importance["network.weight"], state["w"][1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(si.importance["network.bias"], state["b"][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("penalty", [lambda: OnlineEWC(1.0, samples=10), lambda: SynapticIntelligence(1.0)])
@pytest.mark.parametrize("call", [2, 3, 5, 6])
@pytest.mark.parametrize("altmin", [False, True])
def test_penalties_resume(penalty: Any, call: int, altmin: bool, tmp_path: Path) -> None:
    """Catches importances, anchors or a path that checkpoints leave out."""
    path, ends = tmp_path / "saved.ckpt", []
    for ckpt in (None, path):
        module = AltMinModule(small_network()) if altmin else backprop()
        saver = SaveAt("on_train_batch_end", call if ckpt is None else -1, path)
        ends.append(state_of(fit(module, blob_data(), penalty(), saver, ckpt=ckpt)))
    assert_equal(ends[0], ends[1])


def test_a_strong_penalty_holds_the_weights() -> None:
    """Catches a penalty that pushes away: with it, weights stay nearer to those of the first task than without."""
    moved = []
    for strength in (0.0, 100.0):
        module = backprop(lr=0.01)
        first: list[Any] = []

        class Keep(Callback):
            def on_task_end(self, trainer: Any, module: Any, task: Any, first: Any = first) -> None:
                first.append(weights(module))

        fit(module, blob_data(epochs_per_task=8), OnlineEWC(strength, samples=None), Keep())
        name = "network.0.weight"
        moved.append(float((first[2][name] - first[0][name]).norm()))
    assert moved[1] < 0.9 * moved[0]


def test_penalty_errors() -> None:
    """Catches settings that cannot be meant, and weight steps that a penalty would not see."""
    for kind, arguments in (
        (OnlineEWC, {"strength": -1.0}),
        (OnlineEWC, {"gamma": 1.5}),
        (OnlineEWC, {"fisher": "some"}),
        (OnlineEWC, {"samples": 0}),
        (SynapticIntelligence, {"strength": float("nan")}),
        (SynapticIntelligence, {"damping": 0.0}),
    ):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            kind(**arguments)  # type: ignore[arg-type]
    module = AltMinModule(small_network(), weights=LocalGradient(steps=2))
    with pytest.raises(MisconfigurationException, match="several weight steps"):
        fit(module, blob_data(), OnlineEWC())


# -------------------------------------------------------------------- memories


def remembering(ridge: float = 1e-3) -> AltMinModule:
    """Features trained by gradients, an output layer that is solved for."""
    output = CoactivationMemory(form="solve", every=1, ridge=ridge, inputs="forward")
    return AltMinModule(
        small_network(), weights=LayerwiseWeights({"output": output, "default": CoactivationMemory(every=2)})
    )


def test_a_memory_policy_weighs_tasks() -> None:
    """Catches a discount at the wrong boundary, of the wrong layer, or of A without B and the number of rows.

    With a factor f, the three tasks' samples count f^2, f and 1; forgetting=1 in the solve form leaves the rest alone.
    """
    module = remembering()
    names = [stage.name for stage in module.core.coded.stages]
    fit(module, blob_data(), MemoryPolicy("decay", 0.25, stages=[names[-1]]))
    state = module.core.weights.state_dict()
    [rows] = [v for k, v in state.items() if k.endswith("rows") and names[-1].replace(".", "/") in k]
    [B] = [v for k, v in state.items() if k.endswith("B")]
    weight = torch.tensor([0.0625, 0.25, 1.0], dtype=torch.float64)
    assert float(rows) == pytest.approx(48 * float(weight.sum()))
    # B's last column (the bias input, 1) counts the labels.
    torch.testing.assert_close(B[:, -1], 24 * weight.repeat_interleave(2))


def test_a_reset_memory_answers_for_the_last_task_only() -> None:
    """Catches a reset that forgets nothing, and one that comes after the task instead of before it."""
    kept = []
    for policy in ("keep", "reset"):
        evaluation, module = ContinualEvaluation(), remembering()
        for stage in module.core.coded.stages[:-1]:
            for parameter in stage.parameters():
                parameter.requires_grad_(False)
        module = AltMinModule(
            module.network, weights=CoactivationMemory(form="solve", every=1, ridge=1e-3, inputs="forward")
        )
        fit(module, blob_data(), evaluation, MemoryPolicy(policy))  # type: ignore[arg-type]
        kept.append(evaluation.matrix.compute()[2])
    assert float(kept[0].min()) > 0.5
    assert float(kept[1][:2].max()) == 0.0
    assert float(kept[1][2]) > 0.8


def test_weights_are_those_of_all_samples_at_the_end_of_a_task() -> None:
    """Catches a task's last batches left out because the next solution was not due yet.

    The oracle is ridge regression on the task's samples, in double precision.
    """
    network, seen = small_network(), []
    for parameter in network[0].parameters():
        parameter.requires_grad_(False)

    class Keep(Callback):
        def on_task_end(self, *rest: Any) -> None:
            seen.append(torch.cat([network[2].weight, network[2].bias[:, None]], 1).detach().clone())

    solver = CoactivationMemory(form="solve", every=1000, ridge=1e-2, inputs="forward")
    fit(AltMinModule(network, weights=solver), blob_data(), MemoryPolicy(), Keep())
    x, y = torch.empty(0, 8), torch.empty(0).long()
    for task, weight in zip(blob_stream(), seen, strict=True):
        own_x, own_y = task.train.read(torch.arange(48))
        x, y = torch.cat([x, own_x]), torch.cat([y, own_y])
        a = functional.pad(network[1](network[0](x)), (0, 1), value=1.0).double()
        A = a.t() @ a
        ridge = 1e-2 * A.diagonal().mean() * torch.eye(13, dtype=torch.float64)
        expected = torch.linalg.solve(A + ridge, a.t() @ functional.one_hot(y, 6).double()).t()
        torch.testing.assert_close(weight, expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("call", [2, 3, 5])
def test_memories_resume(call: int, tmp_path: Path) -> None:
    """Catches statistics that are lost, or discounted twice, by a run that is resumed."""
    path, ends = tmp_path / "saved.ckpt", []
    for ckpt in (None, path):
        saver = SaveAt("on_train_batch_end", call if ckpt is None else -1, path)
        trainer = fit(remembering(), blob_data(), MemoryPolicy("decay"), ContinualEvaluation(), saver, ckpt=ckpt)
        ends.append(state_of(trainer))
    assert_equal(ends[0], ends[1])


def test_memory_policy_errors() -> None:
    """Catches a policy without anything to treat."""
    with pytest.raises(MisconfigurationException, match="needs a weight solver with a memory"):
        fit(AltMinModule(small_network()), blob_data(), MemoryPolicy())
    with pytest.raises(MisconfigurationException, match="needs a module with an AltMin core"):
        fit(backprop(), blob_data(), MemoryPolicy())
    with pytest.raises(ValueError, match="unknown layers"):
        fit(remembering(), blob_data(), MemoryPolicy(stages=["nowhere"]))
    for arguments in ({"policy": "some"}, {"policy": "decay", "factor": 1.0}):
        with pytest.raises(ValueError, match=list(arguments)[-1]):
            MemoryPolicy(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("factor", [0.0, 0.5])
def test_learning_rates_fall_from_task_to_task(factor: float) -> None:
    """Catches the first task's rate being lowered, other layers' rates, and layers that move although frozen."""
    rates, ends = [], []

    class Keep(Callback):
        def on_task_end(self, trainer: Any, module: Any, task: Any) -> None:
            rates.append({group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups})
            ends.append(weights(module.network))

    module = AltMinModule(small_network(), weights=LocalGradient(lambda p: torch.optim.Adam(p, lr=0.01)))
    hidden, output = (stage.name for stage in module.core.coded.stages)
    fit(module, blob_data(), TaskLearningRates(factor, [hidden]), Keep())
    assert [rate[hidden] for rate in rates] == pytest.approx([0.01, 0.01 * factor, 0.01 * factor**2])
    assert [rate[output] for rate in rates] == [0.01] * 3
    assert torch.equal(ends[0]["0.weight"], ends[2]["0.weight"]) == (factor == 0)
    assert not torch.equal(ends[0]["2.weight"], ends[2]["2.weight"])
    with pytest.raises(ValueError, match="factor"):
        TaskLearningRates(1.5)
    with pytest.raises(MisconfigurationException, match="unknown parameter groups"):
        fit(AltMinModule(small_network()), blob_data(), TaskLearningRates(stages=["nowhere"]))
