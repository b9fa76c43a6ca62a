"""Oracle: the eager phases. The compiled function computes the same step, from one graph, whatever schedules do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lightning_altmin import (
    AltMin,
    AltMinObjective,
    CodedNetwork,
    CurvatureCodes,
    DiscreteCodes,
    GradientCodes,
    LeastSquaresCodes,
    LocalGradient,
)
from lightning_altmin.nn import MLP
from tests.core.comparisons import assert_bit_equal


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    """Every test compiles for itself."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def mlp() -> nn.Module:
    return MLP(6, [9, 8], 4, batch_norm=True).double()


def plain() -> nn.Module:
    return MLP(6, [9, 8], 4).double()


def sigmoid() -> nn.Module:
    return MLP(6, [9, 8], 4, activation="sigmoid").double()


def signs() -> nn.Module:
    return MLP(6, [9, 8], 4, activation="sign").double()


def conv() -> nn.Module:
    layers = [
        nn.Conv2d(1, 3, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(27, 8),
        nn.Tanh(),
        nn.Linear(8, 4),
    ]
    return nn.Sequential(*layers).double()


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def batch(module: nn.Module, count: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (count, 1, 8, 8) if isinstance(module[0], nn.Conv2d) else (count, 6)  # type: ignore[index]
    return torch.randn(shape, dtype=torch.float64), torch.randint(4, (count,))


CODES: dict[str, Any] = {
    "curvature": CurvatureCodes,
    "gradient": lambda: GradientCodes(3, 0.2, 0.9, nesterov=True),
    "least squares": LeastSquaresCodes,
    "discrete": DiscreteCodes,
}


@pytest.mark.parametrize(
    ("make", "codes"),
    [(mlp, "curvature"), (conv, "gradient"), (plain, "least squares"), (sigmoid, "least squares"), (signs, "discrete")],
    ids=["mlp", "conv", "least squares", "least squares, sigmoid", "discrete"],
)
def test_compiled_steps_are_the_eager_ones(make: Any, codes: str) -> None:
    """Catches a phase that is compiled wrongly, a buffer that is not updated, or results of another batch."""
    torch.manual_seed(0)
    module = make()
    eager = AltMin(module, nn.CrossEntropyLoss(), AltMinObjective(0.3), CODES[codes](), LocalGradient(sgd))
    twin = copy.deepcopy(module)
    compiled = AltMin(
        twin, nn.CrossEntropyLoss(), AltMinObjective(0.3), CODES[codes](), LocalGradient(sgd), compile=True
    )
    for count in (12, 12, 12) if make is conv else (12, 12, 5):  # the last batch may be smaller
        x, y = batch(module, count)
        ours, theirs = compiled.step(x, y), eager.step(x, y)
        for name in ("output", "loss", "codes_forward", "moves", "residuals"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(compiled.state_dict(), eager.state_dict(), rtol=1e-10, atol=1e-12)


def test_one_graph_and_no_recompilation_under_schedules() -> None:
    """Catches a graph break, and a constant baked in: mu, code rate and learning rate change 20 times."""
    module = mlp()
    core = AltMin(module, nn.CrossEntropyLoss(), codes=GradientCodes(2), weights=LocalGradient(sgd), compile=True)
    torch._dynamo.utils.counters.clear()
    x, y = batch(module)
    losses = [float(core.step(x, y, keep_codes=False).loss)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number in range(20):
            core.objective.mu.fill_(1.0 + number)
            core.codes.lr.fill_(0.1 + 0.01 * number)
            core.optimizer.param_groups[0]["lr"] = 0.1 / (1 + number)
            losses.append(float(core.step(x, y, keep_codes=False).loss))
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1
    assert losses[-1] < losses[0]


def test_a_changed_mu_counts() -> None:
    """Catches a graph that keeps the value of its first batch: a larger mu moves codes less."""
    module = mlp()
    core = AltMin(module, nn.CrossEntropyLoss(), codes=GradientCodes(1), compile=True)
    x, y = batch(module)
    sizes = []
    for mu in (1.0, 100.0):
        core.objective.mu.fill_(mu)
        step = core.encode(x, y)
        core.solve_codes(step)
        sizes.append(float(step.moves[-1].norm()))
    assert sizes[0] == pytest.approx(100 * sizes[1], rel=1e-6)


def test_bad_batches_are_refused_as_ever() -> None:
    """Catches a kernel that reads out of bounds, and running statistics that a refused batch has moved."""
    module = mlp()
    core = AltMin(module, nn.CrossEntropyLoss(), compile=True)
    x, y = batch(module)
    core.step(x, y)
    before = copy.deepcopy(core.state_dict())
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.3"):
        core.step(x, y + 4)
    with pytest.raises(ValueError, match="cannot take an input of shape"):
        core.step(x[:, :5], y)
    assert_bit_equal(core.state_dict(), before)


def test_copies_compile_for_themselves() -> None:
    """Catches a copy whose compiled function trains the original."""
    module = mlp()
    core = AltMin(module, nn.CrossEntropyLoss(), compile=True)
    x, y = batch(module)
    core.step(x, y)
    before = copy.deepcopy(core.state_dict())
    twin = copy.deepcopy(core)
    twin.step(x, y)
    assert any(not torch.equal(a, b) for a, b in zip(twin.parameters(), core.parameters(), strict=True))
    assert_bit_equal(core.state_dict(), before)


def test_no_compiler_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a page of compiler output where one sentence helps."""
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def missing() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    module = mlp()
    with pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler on the CPU and found none: install g"):
        AltMin(module, nn.CrossEntropyLoss(), compile=True).step(*batch(module))


def test_what_cannot_be_compiled_is_refused_at_once() -> None:
    """Catches an error at the first batch, or a silent fall back to the eager phases."""
    with pytest.raises(ValueError, match="stage '1' uses the autograd engine"):
        AltMin(CodedNetwork(mlp(), "autograd"), nn.CrossEntropyLoss(), compile=True)
    with pytest.raises(ValueError, match=r"one weight step per batch, weights\.steps is 2"):
        AltMin(mlp(), nn.CrossEntropyLoss(), weights=LocalGradient(steps=2), compile=True)


def test_a_loss_without_closed_form_is_refused() -> None:
    """Catches an unreadable trace: the loss's derivative needs autograd, which a single graph cannot hold."""
    module = mlp()
    core = AltMin(module, nn.HuberLoss(), compile=True)
    with pytest.raises(ValueError, match="cannot trace this model as one graph; use compile=False"):
        core.step(batch(module)[0], torch.randn(12, 4, dtype=torch.float64))


def test_the_check_of_a_compiled_model_is_eager() -> None:
    """Catches a verification that compiles its copies, which then cannot replay the random state."""
    module = mlp()
    core = AltMin(module, nn.CrossEntropyLoss(), compile=True)
    assert core.verify(*batch(module)).largest < 1e-10
    assert core.compiled is not None


def test_unknown_modes_and_too_many_shapes_are_named() -> None:
    """Catches an error of the compiler, pages long, at the first batch or in the middle of a run."""
    with pytest.raises(ValueError, match=r"compile must be False, True or one of .*got 'fast'"):
        AltMin(mlp(), nn.CrossEntropyLoss(), compile="fast")
    module = mlp()
    core = AltMin(module, nn.CrossEntropyLoss(), codes=GradientCodes(), compile=True)
    with torch._dynamo.config.patch(recompile_limit=1):
        core.step(*batch(module))
        with pytest.raises(RuntimeError, match="drop_last=True"):
            core.step(*batch(module, 7))
