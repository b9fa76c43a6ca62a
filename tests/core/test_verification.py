"""verify(): a user's proof that the engines agree on their model; it must find a planted bug and leave no trace."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_altmin import AltMin, AltMinObjective, CodedNetwork, CurvatureCodes
from lightning_altmin.engines.conv import ConvRule
from lightning_altmin.engines.dropout import DropoutRule
from lightning_altmin.engines.linear import LinearRule
from lightning_altmin.engines.normalization import FixedBatchNormRule, LiveBatchNormRule
from lightning_altmin.nn import MLP, LeNet5
from lightning_altmin.step import Step
from lightning_altmin.verification import EngineMismatchError, Verification
from tests.core.comparisons import assert_bit_equal


def model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(),
        nn.Linear(48, 8), nn.Tanh(), nn.Linear(8, 4),
    )  # fmt: skip


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 1, 6, 6), torch.randint(4, (5,))


@pytest.mark.parametrize("name", ["small", "lenet", "regression", "l1"])
def test_a_sound_model_passes(name: str) -> None:
    """Catches a check that fails sound models: float32 networks are compared in float64."""
    x, y = data()
    if name == "lenet":
        core, x = AltMin(LeNet5(), nn.CrossEntropyLoss()), torch.randn(5, 1, 28, 28)
    elif name == "regression":
        core, y = AltMin(model(), nn.MSELoss()), torch.randn(5, 4)
    else:
        core = AltMin(model(), nn.CrossEntropyLoss(), AltMinObjective(lambda_c=0.01, lambda_w=0.02))
    result = core.verify(x, y)
    assert 0 <= result.largest <= 1e-12
    stages = {stage for stage, _, _ in result.differences}
    assert {s.name for s in core.coded.stages} <= stages
    trained = [quantity for _, quantity, _ in result.differences if quantity.startswith("gradient")]
    freed = [quantity for quantity in trained if quantity.endswith("codes freed")]
    assert len(freed) == len(trained) - len(freed) == len(list(core.network.parameters()))
    assert "output" in str(result)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_wrong_order_of_freeing_is_found(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a check of kept codes alone: a stage trained at its forward input where codes are freed on the way."""
    passing = AltMin.passing_gradients

    def forward_input(core: AltMin, step: Step, level: int) -> Any:
        if level == at + 1:
            step.moves[at] = torch.zeros_like(step.moves[at])
        return passing(core, step, level)

    core = AltMin(model(), nn.CrossEntropyLoss(), codes=CurvatureCodes(share=0.5))
    core.verify(*data())
    monkeypatch.setattr(AltMin, "passing_gradients", forward_input)
    with pytest.raises(EngineMismatchError, match="codes freed"):
        core.verify(*data())


def test_nothing_is_left_behind() -> None:
    """Catches parameters, buffers, modes, gradients, optimizer state, precision or random state touched."""
    core = AltMin(model(), nn.CrossEntropyLoss())
    x, y = data()
    core.step(x, y)
    core.network[3].eval()
    before = copy.deepcopy((core.state_dict(), core.optimizer.state_dict()))
    modes = [m.training for m in core.modules()]
    kept = x.clone()
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    core.verify(x, y)
    assert_bit_equal((core.state_dict(), core.optimizer.state_dict()), before)
    assert [m.training for m in core.modules()] == modes
    assert all(p.grad is None for p in core.parameters())
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert random.getstate() == python_state
    assert torch.equal(x, kept)
    assert core.batches_seen == 1
    with pytest.raises(ValueError, match="labels"):
        core.verify(x, y + 10)
    assert torch.equal(torch.get_rng_state(), torch_state)


def flipped(method: Any) -> Any:
    return lambda self, *args: -method(self, *args)


def only_weight(method: Any) -> Any:
    return lambda self, *args: method(self, *args)[:1]


def not_a_number(method: Any) -> Any:
    return lambda self, *args: method(self, *args) * float("nan")


PLANTED = {
    "sign of W^T": (LinearRule, "input_gradient", flipped),
    "NaN": (LinearRule, "input_gradient", not_a_number),
    "a bias forgotten": (LinearRule, "parameter_gradients", only_weight),
    "a filter's bias forgotten": (ConvRule, "parameter_gradients", only_weight),
    "normalisation of the code step": (
        FixedBatchNormRule, "_affine", lambda method: lambda self, state: (state.inverse_deviation, -state.mean),
    ),
    "normalisation of the weight step": (LiveBatchNormRule, "input_gradient", flipped),
    "mask of the code step": (DropoutRule, "input_gradient", lambda method: lambda self, grad, at: grad),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a check that passes wrong engines: each of these mistakes must raise."""
    rule, method, plant = PLANTED[name]
    core, (x, y) = AltMin(model(), nn.CrossEntropyLoss()), data()
    with torch.no_grad():
        core.network[3].weight.uniform_(0.5, 2.0)
    core.verify(x, y)
    monkeypatch.setattr(rule, method, plant(getattr(rule, method)))
    with pytest.raises(EngineMismatchError, match=r"engines differ by"):
        core.verify(x, y)


def test_a_planted_bug_below_a_vanishing_signal_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches differences taken absolutely, or beside what other stages have: sixteen sigmoids leave the first layer
    gradients below 1e-10, and their wrong sign is the relative error 2. Before, autograd and the rules agree.
    """
    core = AltMin(MLP(20, [30] * 16, 5, activation="sigmoid"), nn.CrossEntropyLoss())
    x, y = torch.randn(32, 20), torch.randint(5, (32,))
    assert core.verify(x, y).largest <= 1e-12
    first = core.coded.stages[0]
    right = LinearRule.parameter_gradients

    def wrong(self: LinearRule, *args: Any) -> Any:
        gradients = right(self, *args)
        if self.module.in_features != 20:
            return gradients
        assert all(float(gradient.abs().max()) < 1e-10 for _, gradient in gradients)
        return [(parameter, -gradient) for parameter, gradient in gradients]

    monkeypatch.setattr(LinearRule, "parameter_gradients", wrong)
    differences = core.verify(x, y, tolerance=3.0).differences
    wrong_ones = [(stage, d) for stage, _, d in differences if d > 1e-12]
    assert [stage for stage, _ in wrong_ones] == [first.name] * 2  # weight and bias
    assert all(0.1 < d < 2 + 1e-9 for _, d in wrong_ones)  # roundings of sixteen layers may tell a size above its own
    with pytest.raises(EngineMismatchError, match="engines differ by"):
        core.verify(x, y)


@pytest.mark.parametrize("batch_norm", ["fixed", "live"])
@pytest.mark.parametrize("size", [1e-8, 1.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rounding_is_no_difference(dtype: torch.dtype, size: float, batch_norm: Any) -> None:
    """Catches alarms at gradients that are 0 but for rounding: biases before a BatchNorm, both parameters of a layer
    with one input before one, running means of inputs whose mean is 0; in data of any size.
    """
    network = nn.Sequential(
        nn.BatchNorm1d(20), nn.Linear(20, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 1),
        nn.BatchNorm1d(1, affine=False), nn.Tanh(), nn.Linear(1, 9), nn.BatchNorm1d(9, affine=False), nn.Sigmoid(),
        nn.Linear(9, 5),
    ).to(dtype)  # fmt: skip
    x = torch.randn(16, 20, dtype=dtype)
    x = (x - x.mean(0)) / x.std(0) * size
    core = AltMin(CodedNetwork(network, batch_norm=batch_norm), nn.MSELoss())
    assert core.verify(x, torch.randn(16, 5, dtype=dtype) * size).largest <= 1e-12


def test_nothing_is_no_difference() -> None:
    """Catches 0 / 0: parameters that are all 0 have no gradients below the output layer."""
    core, (x, y) = AltMin(model(), nn.CrossEntropyLoss()), data()
    with torch.no_grad():
        for parameter in core.network.parameters():
            parameter.zero_()
    assert 0 <= core.verify(x, y).largest <= 1e-12


def test_a_gradient_where_there_is_none_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a scale of 0 that excuses everything: below a layer of zeros all gradients are 0, and 1e-30 is wrong."""
    core = AltMin(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), nn.CrossEntropyLoss())
    with torch.no_grad():
        core.network[2].weight.zero_()
    x, y = torch.randn(5, 3), torch.randint(2, (5,))
    assert core.verify(x, y).largest <= 1e-12
    right = LinearRule.input_gradient
    monkeypatch.setattr(LinearRule, "input_gradient", lambda self, *args: right(self, *args) + 1e-30)
    with pytest.raises(EngineMismatchError, match="differ by inf"):
        core.verify(x, y)


def test_a_wrong_hold_on_statistics_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches running statistics that differ between the engines."""
    core, (x, y) = AltMin(model(), nn.CrossEntropyLoss()), data()
    encode = FixedBatchNormRule.encode

    def twice(self: Any, x: Tensor) -> Any:
        encode(self, x)
        return encode(self, x)

    monkeypatch.setattr(FixedBatchNormRule, "encode", twice)
    with pytest.raises(EngineMismatchError, match="buffer"):
        core.verify(x, y)


def test_largest_of_differences() -> None:
    """Catches a NaN that a comparison with > would overlook."""
    assert Verification([("a", "b", 0.1), ("a", "c", 0.3)]).largest == 0.3
    largest = Verification([("a", "b", 0.1), ("a", "c", float("nan")), ("a", "d", 0.2)]).largest
    assert largest != largest


def test_tolerance_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a tolerance that is not passed on: a relative error of 1e-7 passes 1e-5 and fails the default."""
    core, (x, y) = AltMin(model(), nn.CrossEntropyLoss()), data()
    right = LinearRule.input_gradient
    monkeypatch.setattr(LinearRule, "input_gradient", lambda self, *args: right(self, *args) * (1 + 1e-7))
    assert 1e-10 < core.verify(x, y, tolerance=1e-5).largest <= 1e-5
    with pytest.raises(EngineMismatchError, match=r"more than 1\.0e-10"):
        core.verify(x, y)
