"""Orthogonal weights modification: moments and projections written out by hand, and what they are for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.nn import functional

from lightning_altmin import AltMinModule, BackpropModule
from lightning_altmin.continual import OrthogonalWeights, TaskStream, TaskStreamDataModule, from_datasets
from lightning_altmin.weights import CoactivationMemory, LayerwiseWeights, LocalGradient
from tests.continual.problems import backprop, blob_data, blob_stream, fit, small_network
from tests.continual.recording import SaveAt, state_of
from tests.module.interruption import assert_equal


def sgd(lr: float = 0.05, momentum: float = 0.0) -> Any:
    return lambda p: torch.optim.SGD(p, lr=lr, momentum=momentum)


def joined(layer: Any) -> Tensor:
    """Weights and bias as one matrix."""
    return torch.cat([layer.weight.detach(), layer.bias.detach().unsqueeze(1)], 1).double()


def module_of(network: nn.Module, altmin: bool, lr: float = 0.05) -> Any:
    if altmin:
        return AltMinModule(network, weights=LocalGradient(sgd(lr), inputs="forward"))
    return BackpropModule(network, optimizer=sgd(lr))


def with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], 1)


def test_moments_are_sums_of_means_over_tasks() -> None:
    """Catches sums over samples, moments of another layer's inputs, a bias left out, and tasks that replace others.

    The network does not move (rate 0), so the inputs of its second layer are known for all tasks.
    """
    network, stream, callback = small_network(), blob_stream(), OrthogonalWeights(samples=None)
    fit(BackpropModule(network, optimizer=sgd(0.0)), TaskStreamDataModule(stream, batch_size=16), callback)
    first, second = torch.zeros(9, 9, dtype=torch.float64), torch.zeros(13, 13, dtype=torch.float64)
    for task in stream:
        x, _ = task.train.read(torch.arange(len(task.train)))
        with torch.no_grad():
            x, hidden = x.double(), network[0](x).relu().double()
        first += with_ones(x).t() @ with_ones(x) / len(x)
        second += with_ones(hidden).t() @ with_ones(hidden) / len(x)
    torch.testing.assert_close(callback.moments["network.0"], first)
    torch.testing.assert_close(callback.moments["network.2"], second)
    assert callback.tasks == 3
    assert callback.state_bytes == 8 * (9 * 9 + 13 * 13)


def test_moments_of_a_convolution_are_over_patches() -> None:
    """Catches patches that are not those the convolution sees; the oracle slides a window by hand."""
    torch.manual_seed(0)
    x, y = torch.randn(6, 2, 5, 5), torch.arange(6) % 2
    network = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    callback = OrthogonalWeights(samples=None, layers=["network.0"])
    data = TaskStreamDataModule(from_datasets([(x, y)], [(x, y)]), batch_size=6)
    fit(BackpropModule(network, optimizer=sgd(0.0)), data, callback)
    patches = [x[:, :, i : i + 3, j : j + 3].flatten(1).double() for i in (0, 2) for j in (0, 2)]
    expected = sum(p.t() @ p for p in patches) / (6 * 4)
    assert list(callback.moments) == ["network.0"]
    torch.testing.assert_close(callback.moments["network.0"], expected)


@pytest.mark.parametrize("altmin", [False, True])
def test_a_step_is_the_projected_gradient(altmin: bool) -> None:
    """Catches a projection from the wrong side, of another strength, and one that misses AltMin's optimizer.

    The output layer of a small network, with G its gradient and A the planted moments of two tasks: a step of SGD is
    -lr G rho (A + rho I)^-1, rho = ridge mean(diag A) / 2, the bias being the last column.
    """
    g = torch.Generator().manual_seed(1)
    root = torch.randn(13, 13, generator=g, dtype=torch.float64)
    moments = root @ root.t()
    network, stream = small_network(), blob_stream().first(1)
    x, y = stream[0].train.read(torch.arange(48))
    with torch.no_grad():
        rows = with_ones(network[0](x).relu()).double()
    start = joined(network[2])
    name = "core.network.2" if altmin else "network.2"
    callback = OrthogonalWeights(ridge=0.4, layers=[name])

    class Plant(Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            callback.moments, callback.tasks = {name: moments}, 2

    data = TaskStreamDataModule(stream, batch_size=48)
    fit(module_of(network, altmin), data, Plant(), callback)
    gradient = ((rows @ start.t()).softmax(1) - functional.one_hot(y, 6)).t() @ rows / 48
    rho = 0.4 * moments.diagonal().mean() / 2
    projection = rho * torch.linalg.inv(moments + rho * torch.eye(13, dtype=torch.float64))
    torch.testing.assert_close(joined(network[2]) - start, -0.05 * gradient @ projection, rtol=1e-3, atol=1e-6)


def half_seen_stream() -> TaskStream:
    """Inputs of the first task have only their first four features, those of the second all eight."""
    (x1, y1), (x2, y2) = (blob_stream()[k].train.read(torch.arange(48)) for k in (0, 1))
    x1 = x1.clone()
    x1[:, 4:] = 0
    parts = [(x1, y1), (x2, y2)]
    return from_datasets(parts, parts, num_classes=6)


@pytest.mark.parametrize("altmin", [False, True])
def test_answers_to_earlier_inputs_stay_while_new_ones_are_learnt(altmin: bool) -> None:
    """Catches protections that leak, at any depth, and ones that stop all learning.

    Inputs of the first task span less than the space, at both layers (at most 4 + 1 of 9 directions, and less than 48
    samples' worth of 61): with hardly any ridge the network's outputs for them must stay, to the ridge, while the loss
    on the second task falls. Without protection they move a hundred times as much.
    """
    moved, losses = [], []
    stream = half_seen_stream()
    x1, _ = stream[0].train.read(torch.arange(48))
    x2, y2 = stream[1].train.read(torch.arange(48))
    for protected in (True, False):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(8, 60), nn.ReLU(), nn.Linear(60, 6))
        seen: list[tuple[Tensor, Tensor]] = []

        class Keep(Callback):
            def on_task_end(
                self, trainer: Any, module: Any, task: Any, seen: Any = seen, network: Any = network
            ) -> None:
                with torch.no_grad():
                    seen.append((network(x1), functional.cross_entropy(network(x2), y2)))

        callbacks = [OrthogonalWeights(ridge=1e-6, samples=None)] if protected else []
        data = TaskStreamDataModule(stream, batch_size=16, epochs_per_task=5)
        fit(module_of(network, altmin), data, *callbacks, Keep())
        moved.append(float((seen[1][0] - seen[0][0]).abs().max()))
        losses.append([float(loss) for _, loss in seen])
    assert moved[0] < 0.01 * moved[1]
    assert losses[0][1] < 0.7 * losses[0][0]


@pytest.mark.parametrize("call", [2, 3, 5, 6])
@pytest.mark.parametrize("altmin", [False, True])
def test_orthogonal_weights_resume(call: int, altmin: bool, tmp_path: Path) -> None:
    """Catches moments, or their number of tasks, that checkpoints leave out."""
    path, ends = tmp_path / "saved.ckpt", []
    for ckpt in (None, path):
        module = module_of(small_network(), altmin)
        saver = SaveAt("on_train_batch_end", call if ckpt is None else -1, path)
        ends.append(state_of(fit(module, blob_data(), OrthogonalWeights(samples=10), saver, ckpt=ckpt)))
    assert_equal(ends[0], ends[1])


def test_orthogonal_weights_errors() -> None:
    """Catches settings that cannot be meant, and steps that would not be along the projected gradient."""
    for arguments in ({"ridge": 0.0}, {"ridge": float("nan")}, {"samples": 0}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            OrthogonalWeights(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"layers names \['network.1'\]"):
        fit(backprop(), blob_data(), OrthogonalWeights(layers=["network.0", "network.1"]))
    frozen = small_network().requires_grad_(False)
    frozen.append(nn.BatchNorm1d(6))
    with pytest.raises(ValueError, match="finds no trained"):
        fit(BackpropModule(frozen, optimizer=sgd()), blob_data(), OrthogonalWeights())
    with pytest.raises(MisconfigurationException, match=r"needs torch.optim.SGD .* got Adam"):
        fit(AltMinModule(small_network()), blob_data(), OrthogonalWeights())
    output = CoactivationMemory(form="solve", inputs="forward")
    weights = LayerwiseWeights({"output": output, "default": LocalGradient(sgd())})
    with pytest.raises(MisconfigurationException, match="got LimitedDescent"):
        fit(AltMinModule(small_network(), weights=weights), blob_data(), OrthogonalWeights())
    with pytest.raises(MisconfigurationException, match="several weight steps"):
        fit(AltMinModule(small_network(), weights=LocalGradient(sgd(), steps=2)), blob_data(), OrthogonalWeights())


def test_hidden_layers_are_protected_below_a_memory() -> None:
    """Catches a combination that is refused: the output layer is solved for, those below are protected."""
    output = CoactivationMemory(form="solve", inputs="forward")
    weights = LayerwiseWeights({"output": output, "default": LocalGradient(sgd())})
    callback = OrthogonalWeights(layers=["core.network.0"])
    fit(AltMinModule(small_network(), weights=weights), blob_data(), callback)
    assert list(callback.moments) == ["core.network.0"]


class _WithAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.attention, self.last = nn.Linear(8, 4), nn.MultiheadAttention(4, 1), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        out: Tensor = self.last(self.attention(h, h, h)[0])
        return out


def test_layers_that_are_never_called_are_an_error() -> None:
    """Catches a layer whose weights attention reads without calling it: of no inputs, the projection is zero, and the
    layer would be frozen from the second task on.
    """
    module = BackpropModule(_WithAttention(), optimizer=sgd())
    with pytest.raises(ValueError, match=r"no input of the layers \['network.attention.out_proj'\].*layers=\[...\]"):
        fit(module, blob_data(), OrthogonalWeights())
    named = OrthogonalWeights(layers=["network.first", "network.last"])
    fit(BackpropModule(_WithAttention(), optimizer=sgd()), blob_data(), named)
    assert list(named.moments) == ["network.first", "network.last"]
