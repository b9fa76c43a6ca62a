"""What becomes of memories and learning rates at a switch of tasks: exact against all samples seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch.nn import functional

from lightning_altmin import AltMinModule
from lightning_altmin.continual import (
    ContinualEvaluation,
    MemoryPolicy,
    TaskLearningRates,
)
from lightning_altmin.weights import CoactivationMemory, LayerwiseWeights, LocalGradient
from tests.continual.problems import backprop, blob_data, blob_stream, fit, small_network
from tests.continual.recording import SaveAt, state_of
from tests.module.interruption import assert_equal
from tests.module.problems import weights


def remembering(ridge: float = 1e-3, window: int | None = None) -> AltMinModule:
    """Features trained by gradients, an output layer that is solved for."""
    output = CoactivationMemory(form="solve", every=1, ridge=ridge, inputs="forward", window=window)
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


@pytest.mark.parametrize("window", [None, 1, 2])
def test_weights_are_those_of_all_samples_that_count(window: int | None) -> None:
    """Catches a task's last batches left out because the next solution was not due yet, and tasks that a window keeps
    too long or drops too early.

    The oracle is ridge regression on the samples of all tasks, or of the last ones, in double precision.
    """
    network, seen = small_network(), []
    for parameter in network[0].parameters():
        parameter.requires_grad_(False)

    class Keep(Callback):
        def on_task_end(self, *rest: Any) -> None:
            seen.append(torch.cat([network[2].weight, network[2].bias[:, None]], 1).detach().clone())

    solver = CoactivationMemory(form="solve", every=1000, ridge=1e-2, inputs="forward", window=window)
    policy = MemoryPolicy("keep" if window is None else "window")
    fit(AltMinModule(network, weights=solver), blob_data(), policy, Keep())
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for task, weight in zip(blob_stream(), seen, strict=True):
        pairs.append(task.train.read(torch.arange(48)))
        x, y = (torch.cat(each) for each in zip(*pairs[-(window or 99) :], strict=True))
        a = functional.pad(network[1](network[0](x)), (0, 1), value=1.0).double()
        A = a.t() @ a
        ridge = 1e-2 * A.diagonal().mean() * torch.eye(13, dtype=torch.float64)
        expected = torch.linalg.solve(A + ridge, a.t() @ functional.one_hot(y, 6).double()).t()
        torch.testing.assert_close(weight, expected.float(), rtol=1e-4, atol=1e-5)


def solved_at_task_ends_only(train_hidden: bool = True) -> AltMinModule:
    """Memories on trained layers, which nothing but the policy makes solve: the run is over long before batch 1000."""
    network = small_network()
    network[0].requires_grad_(train_hidden)
    return AltMinModule(network, weights=CoactivationMemory(form="solve", every=1000, ridge=1e-2, inputs="forward"))


class EndsOfTasks(Callback):
    """The weights at the end of each task."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_task_end(self, trainer: Any, module: Any, task: Any) -> None:
        self.weights.append(weights(module.network))


def test_only_the_stages_of_a_policy_are_solved_for() -> None:
    """Catches a policy for the output layer that sets hidden layers too.

    The hidden layer must stay as it was made, to the bit. The output layer's inputs are then those of a network whose
    hidden layer is frozen, and so is its solution.
    """
    ends = []
    for freeze in (False, True):
        module, kept = solved_at_task_ends_only(train_hidden=not freeze), EndsOfTasks()
        output = module.core.coded.stages[-1].name
        fit(module, blob_data(), MemoryPolicy(stages=None if freeze else [output]), kept)
        ends.append(kept.weights)
    for own, frozen in zip(*ends, strict=True):
        assert torch.equal(own["0.weight"], weights(small_network())["0.weight"])
        assert torch.equal(own["0.bias"], weights(small_network())["0.bias"])
        torch.testing.assert_close(own["2.weight"], frozen["2.weight"], rtol=1e-4, atol=1e-5)
        assert not torch.equal(own["2.weight"], weights(small_network())["2.weight"])


@pytest.mark.parametrize("stages", [False, True])
def test_a_frozen_layer_is_not_solved_for(stages: bool) -> None:
    """Catches layers that `TaskLearningRates` froze after the first task being set by later tasks' solutions.

    The first task's solution moves both layers; from then on only the output layer has a rate.
    """
    module, kept = solved_at_task_ends_only(), EndsOfTasks()
    names = [stage.name for stage in module.core.coded.stages]
    policy = MemoryPolicy(stages=names if stages else None)
    fit(module, blob_data(), policy, TaskLearningRates(0.0, names[:1]), kept)
    first, second, third = kept.weights
    assert not torch.equal(first["0.weight"], weights(small_network())["0.weight"])
    for later in (second, third):
        assert torch.equal(later["0.weight"], first["0.weight"])
        assert torch.equal(later["0.bias"], first["0.bias"])
    assert not torch.equal(second["2.weight"], first["2.weight"])
    assert not torch.equal(third["2.weight"], second["2.weight"])


@pytest.mark.parametrize("policy", ["decay", "window"])
@pytest.mark.parametrize("call", [2, 3, 5])
def test_memories_resume(call: int, policy: Any, tmp_path: Path) -> None:
    """Catches statistics that are lost, discounted twice or counted as two tasks by a run that is resumed."""
    path, ends = tmp_path / "saved.ckpt", []
    for ckpt in (None, path):
        saver = SaveAt("on_train_batch_end", call if ckpt is None else -1, path)
        module = remembering(window=2 if policy == "window" else None)
        trainer = fit(module, blob_data(), MemoryPolicy(policy), ContinualEvaluation(), saver, ckpt=ckpt)
        ends.append(state_of(trainer))
    assert_equal(ends[0], ends[1])


def test_memory_policy_errors() -> None:
    """Catches a policy without anything to treat."""
    with pytest.raises(MisconfigurationException, match="needs a weight solver with a memory"):
        fit(AltMinModule(small_network()), blob_data(), MemoryPolicy())
    with pytest.raises(MisconfigurationException, match="needs a module with an AltMin core"):
        fit(backprop(), blob_data(), MemoryPolicy())
    for module, policy in ((remembering(), "window"), (remembering(window=2), "keep")):
        with pytest.raises(MisconfigurationException, match="go together"):
            fit(module, blob_data(), MemoryPolicy(policy))  # type: ignore[arg-type]
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
