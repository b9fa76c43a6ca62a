"""Exactness: what a traced forward reads of its modules, the stages read of the same modules, at every call."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_altmin import AltMin, AltMinObjective, CodedNetwork, GradientCodes, LocalGradient
from tests.core.test_network_stages import assert_computes_the_network, parts

F64 = torch.float64


class Shifted(nn.Module):
    """Reads a buffer, what is computed from one, a parameter, and a tensor that is neither."""

    shift: Tensor
    factor: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.register_buffer("shift", torch.randn(5))
        self.register_buffer("factor", torch.rand(5), persistent=False)
        self.scale = nn.Parameter(torch.rand(5))
        self.mean = torch.rand(5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.fc1(x)) + self.shift
        hidden = torch.tanh(self.fc2(hidden * (1 + 2 * self.factor))) * self.scale
        return self.fc3(hidden - self.mean)


def wrapped() -> AltMin:
    torch.manual_seed(0)
    return AltMin(Shifted(), nn.CrossEntropyLoss())


def to_double(core: AltMin) -> None:
    core.double()


def written_to(core: AltMin) -> None:
    with torch.no_grad():
        for tensor in (*core.network.buffers(), *core.network.parameters()):
            tensor.add_(0.5)


def loaded(core: AltMin) -> None:
    core.double().load_state_dict({name: 2 * tensor for name, tensor in core.state_dict().items()})


def assigned(core: AltMin) -> None:
    core.load_state_dict({name: 3 * tensor.double() for name, tensor in core.state_dict().items()}, assign=True)
    core.double()


def reassigned(core: AltMin) -> None:
    network = core.network
    assert isinstance(network, Shifted)
    network.shift, network.factor, network.mean = torch.ones(5), torch.full((5,), 3.0), torch.full((5,), -2.0)
    network.scale = nn.Parameter(torch.full((5,), 4.0))


@pytest.mark.parametrize("change", [to_double, written_to, loaded, assigned, reassigned])
def test_stages_read_what_the_network_has_now(change: Callable[[AltMin], None]) -> None:
    """Catches a block with a reference of its own to a tensor that the network has replaced since, or computed once."""
    core = wrapped()
    change(core)
    x = torch.randn(6, 4, dtype=core.network.get_parameter("fc1.weight").dtype)
    expected = core.network(x)
    torch.testing.assert_close(core.coded.encode(x).output, expected)
    assert {id(p) for stage in core.coded.stages for p in stage.parameters()} == {
        id(p) for p in core.network.parameters()
    }
    core.step(x, torch.randint(3, (6,)))
    torch.testing.assert_close(core.coded.encode(x).output, core.network(x))


def test_a_network_that_moves_to_another_device_takes_its_stages_along() -> None:
    """Catches a block left on the CPU when Lightning moves the network, after it was wrapped."""
    core = wrapped()
    network = core.to("meta").network
    assert isinstance(network, Shifted)
    network.mean = network.mean.to("meta")  # no buffer: module.to does not move it
    held = [t for s in core.coded.stages for m in s.modules for t in (*m.parameters(), *m.buffers())]
    assert {tensor.device.type for tensor in held} == {"meta"}
    x = torch.randn(2, 4, device="meta")
    for stage in core.coded.stages:
        for module in stage.modules:
            x = module(x)
    assert x.shape == (2, 3)
    assert x.device.type == "meta"


def saved(core: AltMin) -> AltMin:
    file = io.BytesIO()
    torch.save(core, file)
    file.seek(0)
    found: AltMin = torch.load(file, weights_only=False)
    return found


@pytest.mark.parametrize("copied", [copy.deepcopy, saved], ids=["deepcopy", "torch.save"])
def test_a_copy_reads_its_own_network(copied: Callable[[AltMin], AltMin]) -> None:
    """Catches a copy whose blocks read the original's tensors, or a network that can no longer be copied or saved."""
    core = wrapped()
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    core.step(x, y)
    before = core.coded.encode(x).output
    twin = copied(core)
    torch.testing.assert_close(twin.coded.encode(x).output, before, rtol=0, atol=0)
    reassigned(twin)
    written_to(twin)
    torch.testing.assert_close(twin.coded.encode(x).output, twin.network(x))
    torch.testing.assert_close(core.coded.encode(x).output, before, rtol=0, atol=0)
    written_to(core)
    torch.testing.assert_close(core.coded.encode(x).output, core.network(x))
    torch.testing.assert_close(twin.coded.encode(x).output, twin.network(x))


def test_wrapping_adds_no_tensors_and_no_modules() -> None:
    """Catches a checkpoint with other keys, a tensor held twice, and a tensor that tracing leaves in the network."""
    torch.manual_seed(0)
    network = Shifted()
    keys, attributes = list(network.state_dict()), set(vars(network))
    core = AltMin(network, nn.CrossEntropyLoss())
    assert list(network.state_dict()) == keys
    assert set(vars(network)) == attributes
    tensors = [id(tensor) for tensor in (*core.parameters(), *core.buffers())]
    assert len(tensors) == len(set(tensors))
    assert {id(tensor) for tensor in (*network.parameters(), *network.buffers())} <= set(tensors)
    assert sum(p.numel() for p in core.parameters()) == 4 * 5 + 5 + 5 * 5 + 5 + 5 * 3 + 3 + 5


def test_a_block_that_reads_attributes_can_be_compiled() -> None:
    """Catches a block that torch.compile has to leave, and one whose graph keeps a tensor that was replaced."""
    core = wrapped()
    x = torch.randn(6, 4)

    def run(x: Tensor) -> Tensor:
        for stage in core.coded.stages:
            for module in stage.modules:
                x = module(x)
        return x

    compiled: Any = torch.compile(run, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), core.network(x))
    reassigned(core)
    torch.testing.assert_close(compiled(x), core.network(x))


class Updated(nn.Module):
    """Counts its calls in a buffer."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.layer(x)


class MakesATensor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + torch.rand(5).round())


class Decides(nn.Module):
    flag: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)
        self.register_buffer("flag", torch.tensor(True))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if self.flag else x


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (Updated, "its forward changes a buffer"),
        (MakesATensor, "its forward makes a tensor without reading its input or a buffer"),
        (Decides, "its forward cannot be traced"),
    ],
)
def test_what_a_trace_would_freeze_stays_whole(make: Callable[[], nn.Module], why: str) -> None:
    """Catches an update, a random draw or a decision that happens once, when the network is wrapped."""
    inner = make()
    coded = CodedNetwork(Around(inner))
    assert coded.stages[1].affine[0] is inner
    assert why in coded.explain()
    assert not any(name.startswith("_tensor_constant") for name in vars(inner))
    if isinstance(inner, Updated):
        assert float(inner.calls) == 0
        coded.encode(torch.randn(2, 5))
        assert float(inner.calls) == 1


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Linear(5, 5), inner, nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(torch.relu(self.stem(x))))


MEAN = torch.tensor([0.1, 0.2, 0.3, 0.4])


class FunctionalLayers(nn.Module):
    """Layers as functions of parameters, a global tensor, and parameters that make no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6))
        self.w2, self.gain = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.rand(5))
        self.w3 = nn.Parameter(torch.randn(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        doubled = 2 * self.w3
        x = torch.tanh(functional.linear(x - MEAN, self.w1, self.b1))
        x = torch.relu(functional.layer_norm(x @ self.w2, (5,), self.gain))
        return x @ doubled.t()


def test_a_function_of_a_parameter_is_a_layer() -> None:
    """Catches functional layers merged into the next stage: gradients for forward inputs are those of backprop."""
    network = FunctionalLayers().double()
    coded = CodedNetwork(network)
    assert [stage.name for stage in coded.stages] == ["w1", "w2", "w3"]
    assert [[len(list(s.parameters())), s.description] for s in coded.stages] == [
        [2, "sub-linear"],
        [2, "Tanh-matmul-layer_norm"],
        [1, "ReLU-[mul-t-matmul]"],
    ]
    assert "Kept together" not in coded.explain()
    x, y = torch.randn(7, 4, dtype=F64), torch.randint(3, (7,))
    assert_computes_the_network(coded, network, x)
    expected = torch.autograd.grad(functional.cross_entropy(network(x), y), list(network.parameters()))
    core = AltMin(
        coded, nn.CrossEntropyLoss(), AltMinObjective(mu=2.0), GradientCodes(1, 1.0), LocalGradient(inputs="forward")
    )
    step = core.encode(x, y)
    core.solve_codes(step)
    core.fill_gradients(step)
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)


class Mixed(nn.Module):
    """Modules and functions; the second layer's weight is used once more, tied, by the last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.tied = nn.Linear(4, 5), nn.Parameter(torch.randn(5, 5))
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.tanh(x @ self.tied)
        return self.last(torch.tanh(functional.linear(x, self.tied)))


def test_functions_that_share_a_parameter_are_one_stage() -> None:
    """Catches two stages with one parameter where the layers are functions."""
    network = Mixed().double()
    coded = CodedNetwork(network)
    assert parts(coded) == [
        ("stem", [], ["Linear"]),
        ("tied", ["ReLU"], ["TracedBlock"]),
        ("last", ["Tanh"], ["Linear"]),
    ]
    assert coded.explain().endswith("Kept together:\ntied: its parts share a parameter")
    assert_computes_the_network(coded, network, torch.randn(7, 4, dtype=F64))


class Halves(nn.Module):
    """A gated block: the halves of a layer's result, one of them through another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate, self.head = nn.Linear(4, 8), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.stem(x).chunk(2, 1)
        return self.head(torch.relu(first * torch.sigmoid(self.gate(second))))


def test_parts_of_one_result_are_the_reason_to_keep_their_readers_together() -> None:
    """Catches a shape named as the reason where none is read, and operations on parts left out of the description."""
    coded = CodedNetwork(Halves().double())
    assert [stage.description for stage in coded.stages] == [
        "Linear(4, 8)",
        "[chunk-gate-sigmoid-mul]",
        "ReLU-Linear(4, 3)",
    ]
    assert coded.explain().endswith("Kept together:\ngate: chunk returns several values")


class Scaled(nn.Module):
    """One layer, and a parameter that is only added to it."""

    def __init__(self) -> None:
        super().__init__()
        self.offset, self.layer = nn.Parameter(torch.zeros(4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + self.offset)


def test_one_layer_is_refused_without_a_reason_that_is_not_so() -> None:
    """Catches "a shape is read from its input" said of a network that reads none."""
    with pytest.raises(ValueError, match=r"no hidden layer, so there is no code to optimise; add one"):
        CodedNetwork(Scaled())
