"""Bad input: a clear error that names the argument, before anything is changed."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_altmin import AltMin, AltMinObjective, CodedNetwork, GradientCodes, LocalGradient
from lightning_altmin.losses import local_loss
from tests.core.comparisons import assert_bit_equal

SAMPLES, CLASSES = 6, 3


def model() -> nn.Sequential:
    """Two BatchNorms and a Dropout, so that a failed batch could leave traces."""
    return nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.2), nn.Linear(5, 5), nn.BatchNorm1d(5), nn.ReLU(),
        nn.Linear(5, CLASSES),
    )  # fmt: skip


def inputs() -> Tensor:
    return torch.randn(SAMPLES, 4)


def labels(high: int = CLASSES) -> Tensor:
    return torch.randint(high, (SAMPLES,))


def with_label(label: int) -> Tensor:
    y = labels()
    y[2] = label
    return y


def vector_loss(output: Tensor, y: Any) -> Tensor:
    return output.sum(1)


def failing_loss(output: Tensor, y: Any) -> Tensor:
    raise KeyError("the user's own")


class SameForward(nn.CrossEntropyLoss):
    pass


class OwnForward(nn.CrossEntropyLoss):
    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        return super().forward(output, y)


CE, MSE, BCE = nn.CrossEntropyLoss(), nn.MSELoss(), nn.BCEWithLogitsLoss()
BAD: dict[str, tuple[Any, Any, Any, type[Exception], str]] = {
    "features": (CE, torch.randn(SAMPLES, 3), labels(), ValueError, r"stage '0'.*Linear\(4, 5\).*shape \(6, 3\)"),
    "x dtype": (CE, torch.ones(SAMPLES, 4, dtype=torch.long), labels(), ValueError, r"stage '0'.*torch.int64"),
    "batch sizes": (CE, inputs(), labels()[:4], ValueError, r"y has shape \(4,\) for a batch of 6"),
    "one label": (CE, inputs(), torch.tensor(1), ValueError, r"y has shape \(\) for a batch of 6"),
    "label above": (CE, inputs(), with_label(CLASSES), ValueError, r"labels from . to 3.*0\.\.2"),
    "label below": (CE, inputs(), with_label(-1), ValueError, r"labels from -1 to .*0\.\.2"),
    "label dtype": (CE, inputs(), labels().int(), ValueError, r"y has dtype torch.int32"),
    "label floats": (CE, inputs(), labels().float(), ValueError, r"y holds floats of shape \(6,\)"),
    "label shape": (CE, inputs(), labels().unsqueeze(1), ValueError, r"shape \(6, 1\)"),
    "label list": (CE, inputs(), [0, 1, 2, 0, 1, 2], TypeError, "tensor of targets, got list"),
    "target shape": (MSE, inputs(), torch.randn(SAMPLES), ValueError, r"y has shape \(6,\).*unsqueeze"),
    "target list": (MSE, inputs(), [0.0] * SAMPLES, ValueError, "y has shape list"),
    "target bool": (
        MSE,
        inputs(),
        torch.ones(SAMPLES, CLASSES).bool(),
        ValueError,
        r"torch.bool; MSELoss needs floats",
    ),
    "bce shape": (BCE, inputs(), torch.rand(SAMPLES, 1), ValueError, r"y has shape \(6, 1\).*\(6, 3\)"),
    "bce labels": (BCE, inputs(), torch.ones(SAMPLES, CLASSES).long(), ValueError, r"torch.int64; BCEWith.*y.float"),
    "nll label": (nn.NLLLoss(), inputs(), with_label(9), ValueError, r"labels from . to 9.*0\.\.2"),
    "nll floats": (
        nn.NLLLoss(),
        inputs(),
        labels().float(),
        ValueError,
        "torch.float32 .* NLLLoss needs dtype torch.int64",
    ),
    "margin label": (nn.MultiMarginLoss(), inputs(), with_label(-100), ValueError, r"labels from -100 to .*0\.\.2"),
    "subclass label": (SameForward(), inputs(), with_label(CLASSES), ValueError, r"labels from . to 3.*0\.\.2"),
    "own forward": (
        OwnForward(),
        inputs(),
        with_label(CLASSES),
        ValueError,
        r"OwnForward cannot take y \(torch.int64 .*3",
    ),
    "loss of samples": (vector_loss, inputs(), labels(), ValueError, r"loss must return a scalar.*\(6,\)"),
    "failing loss": (failing_loss, inputs(), labels(), KeyError, "the user's own"),
    "one sample": (CE, torch.randn(1, 4), torch.tensor([0]), ValueError, "more than one sample|more than 1 value"),
}


@pytest.mark.parametrize("engine", ["auto", "autograd"])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_batch_is_refused_and_changes_nothing(name: str, engine: str) -> None:
    """Catches running statistics, counters, parameters, gradients or optimizer state touched before the refusal."""
    loss, x, y, error, message = BAD[name]
    core = AltMin(CodedNetwork(model(), engine), loss)
    good = torch.randn(SAMPLES, CLASSES) if loss in (MSE, BCE) else labels()
    if loss not in (vector_loss, failing_loss):
        core.step(inputs(), good.sigmoid() if loss is BCE else good)
    before = copy.deepcopy((core.state_dict(), core.optimizer.state_dict(), core.batches_seen))
    with pytest.raises(error, match=message):
        core.step(x, y)
    after = (core.state_dict(), core.optimizer.state_dict(), core.batches_seen)
    assert_bit_equal(after, before)
    assert all(p.grad is None for p in core.network.parameters())
    assert all(m.training for m in core.network.modules())


@pytest.mark.parametrize("kind", [nn.CrossEntropyLoss, nn.NLLLoss])
def test_class_weights_are_one_per_output(kind: Any) -> None:
    """Catches weights of another data set, which torch refuses in words of its own and by no name."""
    core = AltMin(model(), kind(torch.ones(CLASSES + 1)))
    with pytest.raises(ValueError, match=r"has class weights of shape \(4,\), but the network has 3 outputs"):
        core.step(inputs(), labels())


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda output, y: 1.0, "loss must return a scalar tensor .* got float"),
        (lambda output, y: None, "loss must return a scalar tensor .* got NoneType"),
        (lambda output, y: output.detach().mean(), "without a gradient with respect to the output"),
    ],
)
def test_a_loss_that_is_no_function_of_the_output_is_refused(loss: Any, message: str) -> None:
    """Catches errors from inside autograd for a loss that returns a number or forgets where it came from."""
    core = AltMin(model(), loss)
    with pytest.raises(ValueError, match=message):
        core.step(inputs(), labels())


def test_errors_of_torchs_losses_in_the_backward_pass_are_named() -> None:
    """Catches an error about dtypes that does not say whose: Huber's comes from its derivative only."""
    ours = local_loss(nn.HuberLoss())
    with pytest.raises(
        ValueError, match=r"HuberLoss cannot take y \(torch.float64 \(6, 3\)\) for outputs .torch.float32"
    ):
        ours.mean_gradient(torch.randn(SAMPLES, CLASSES), torch.randn(SAMPLES, CLASSES).double())


def test_an_early_batch_norm_is_put_back_when_a_later_one_refuses() -> None:
    """Catches a half-encoded batch: with one sample a convolution's BatchNorm has enough values, a Linear's has not."""
    module = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4), nn.BatchNorm1d(4), nn.ReLU(),
        nn.Linear(4, 2),
    )  # fmt: skip
    core = AltMin(module, nn.CrossEntropyLoss())
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match="drop_last=True"):
        core.step(torch.randn(1, 1, 4, 4), torch.tensor([0]))
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    module.eval()  # in eval mode one sample is as good as many
    core.step(torch.randn(1, 1, 4, 4), torch.tensor([0]))


NAN = float("nan")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AltMinObjective(mu=0.0), "mu must be a positive number, got 0"),
        (lambda: AltMinObjective(mu=-1.0), "mu must be"),
        (lambda: AltMinObjective(mu=NAN), "mu must be"),
        (lambda: AltMinObjective(mu=float("inf")), "mu must be"),
        (lambda: AltMinObjective(lambda_c=-0.1), "lambda_c must be a number >= 0"),
        (lambda: AltMinObjective(lambda_w=NAN), "lambda_w must be"),
        (lambda: AltMinObjective.reference(mu=0), "mu must be"),
        (lambda: GradientCodes(steps=0), "steps must be an integer >= 1, got 0"),
        (lambda: GradientCodes(steps=2.5), "steps must be an integer >= 1, got 2.5"),
        (lambda: GradientCodes(lr=0.0), "lr must be a positive number, got 0"),
        (lambda: GradientCodes(lr=-0.1), "lr must be"),
        (lambda: GradientCodes(lr=NAN), "lr must be"),
        (lambda: GradientCodes(momentum=1.0), r"momentum must lie in \[0, 1\)"),
        (lambda: GradientCodes(momentum=-0.1), "momentum must"),
        (lambda: GradientCodes(nesterov=True), "nesterov=True needs momentum"),
        (lambda: GradientCodes(tol=1.0), r"tol must lie in \(0, 1\), or None for a fixed number of steps, got 1"),
        (lambda: GradientCodes(tol=NAN), "tol must"),
        (lambda: LocalGradient(steps=0), "steps must be an integer >= 1, got 0"),
        (lambda: LocalGradient(steps=1.5), "steps must be an integer"),
        (lambda: LocalGradient(inputs="moving"), "inputs must be 'moved' or 'forward', got 'moving'"),
    ],
)
def test_settings_out_of_range_are_refused(make: Any, message: str) -> None:
    """Catches a setting that trains nonsense, or fails only at the first batch; the error names argument and value."""
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("argument", ["objective", "codes", "weights"])
def test_parts_of_the_wrong_kind_are_refused(argument: str) -> None:
    """Catches arguments in the wrong place (a code solver for the objective)."""
    wrong = {"objective": GradientCodes(), "codes": LocalGradient(), "weights": AltMinObjective()}[argument]
    with pytest.raises(TypeError, match=f"{argument} must be an instance of"):
        AltMin(model(), nn.CrossEntropyLoss(), **{argument: wrong})


def test_half_precision_parameters_are_refused() -> None:
    """Catches layers that never train: in float16 the moves of lower codes round to zero."""
    with pytest.raises(ValueError, match=r"network has parameters in float16.*network\.float\(\)"):
        AltMin(model().half(), nn.CrossEntropyLoss())


@pytest.mark.parametrize("x", [(inputs(),), inputs().numpy(), {"x": inputs()}], ids=lambda x: type(x).__name__)
def test_inputs_must_be_a_tensor(x: Any) -> None:
    """Catches an error from inside some layer about an attribute of whatever the loader gave."""
    with pytest.raises(TypeError, match=f"x must be a tensor of inputs.*got {type(x).__name__}"):
        AltMin(model(), nn.CrossEntropyLoss()).step(x, labels())


@pytest.mark.parametrize(
    ("first", "x", "message"),
    [
        (nn.LSTM(4, 5), inputs(), "returned a tuple; a stage must return one tensor"),
        (nn.Embedding(3, 5), torch.full((SAMPLES,), 7), r"cannot take an input of shape \(6,\)"),
    ],
    ids=["tuple", "index"],
)
def test_a_stage_that_fails_is_named(first: nn.Module, x: Tensor, message: str) -> None:
    """Catches torch's own TypeError or IndexError, which does not say where it comes from."""
    core = AltMin(nn.Sequential(first, nn.Linear(5, CLASSES)), nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match=f"stage '0'.*{message}"):
        core.step(x, labels())


@pytest.mark.parametrize("shape", [(0, 4), ()])
def test_a_batch_without_samples_is_an_error(shape: tuple[int, ...]) -> None:
    """Catches a mean over nothing, which is NaN, and an IndexError for a tensor that has no batch dimension."""
    core = AltMin(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match=rf"the batch is empty.*got {re.escape(str(shape))}"):
        core.step(torch.zeros(shape), torch.zeros(shape[:1], dtype=torch.long))
