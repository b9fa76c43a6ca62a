"""Penalties on moving weights: written out by hand, and resumed to the bit."""

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
    OnlineEWC,
    SynapticIntelligence,
    TaskStreamDataModule,
)
from lightning_altmin.weights import CoactivationMemory, LayerwiseWeights, LocalGradient
from tests.continual.problems import backprop, blob_data, blob_stream, fit, small_network
from tests.continual.recording import SaveAt, state_of
from tests.module.interruption import assert_equal
from tests.module.problems import trainer, weights


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
        fit(module, stop, plant, ewc)
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


@pytest.mark.parametrize("kind", [OnlineEWC, SynapticIntelligence])
def test_what_a_checkpoint_brought_is_put_beside_the_weights(kind: Any) -> None:
    """Catches importances, anchors or a path that stay on the CPU, where Lightning loads them, below other weights."""
    module, callback = backprop(), kind()
    saved = callback.state_dict()
    assert saved  # of tensors by parameter name
    of_parameters = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    callback.load_state_dict({key: dict(of_parameters) for key in saved})
    callback.on_train_start(trainer(), module.to("meta"))
    for tensors in callback.state_dict().values():
        assert {tensor.device.type for tensor in tensors.values()} == {"meta"}


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
    """Catches settings that cannot be meant, weight steps that a penalty would not see, and solved weights, where what
    it adds to is no gradient.
    """
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
    output = LayerwiseWeights({"output": CoactivationMemory("solve"), "default": LocalGradient()})
    for solver, name in ((CoactivationMemory("solve"), "CoactivationMemory"), (output, "LayerwiseWeights")):
        with pytest.raises(MisconfigurationException, match=f"OnlineEWC adds to gradients, but {name} solves"):
            fit(AltMinModule(small_network(), weights=solver), blob_data(), OnlineEWC())
