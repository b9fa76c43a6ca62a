"""Closed form: rates from known curvatures; and what the moves of a code must survive, depth and batch-mates."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_altmin import AltMin, AltMinObjective, CodedNetwork, CurvatureCodes, GradientCodes, LocalGradient
from lightning_altmin.nn import MLP, LeNet5
from tests.core.written_out import batch, convolutional, network


def orthogonal(scale: float) -> nn.Sequential:
    """Linear stages ``scale`` times a rotation: every code's problem has curvature ``1 + scale^2`` below the top."""
    module = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)).double()
    for layer in module:
        nn.init.orthogonal_(layer.weight, gain=scale)
    return module


def gradients(core: AltMin, x: Tensor, y: Any) -> list[Tensor]:
    step = core.encode(x, y)
    core.solve_codes(step)
    core.fill_gradients(step)
    found = [p.grad.clone() for p in core.network.parameters() if p.grad is not None]
    core.network.zero_grad()
    return found


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_the_estimate_is_the_curvature_and_counts_from_the_next_batch(scale: float) -> None:
    """Catches a curvature of the wrong stage, a batch judged by its own estimate, and a rate other than share / kappa.

    The stages are isometries times ``scale``, the loss is a mean of 6 squares: kappa = 1 + scale^2 for hidden codes,
    1 + (2 / 6) scale^2 / mu for the top one.
    """
    module, mu, share = orthogonal(scale), 0.7, 0.3
    core = AltMin(module, nn.MSELoss(), AltMinObjective(mu=mu), CurvatureCodes(share))
    x = torch.randn(5, 6, dtype=torch.float64)
    y = torch.randn(5, 6, dtype=torch.float64)
    kappa = [1 + scale**2, 1 + scale**2, 1 + scale**2 / (3 * mu)]
    for estimate in ([1.0, 1.0, 1.0], kappa):
        step = core.encode(x, y)
        moves = [-share / k for k in estimate]
        expected = [None] * 3
        above = 2 / 6 * (step.output - y) / mu
        for level in (2, 1, 0):
            above = moves[level] * above @ module[level + 1].weight
            expected[level] = above
            above = -above
        core.solve_codes(step)
        core.fill_gradients(step)  # where what was measured is learned
        for ours, theirs in zip(step.moves, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(core.codes.curvature, torch.tensor(kappa, dtype=torch.float64), rtol=1e-10, atol=0)


def test_a_rise_counts_at_once_a_fall_slowly() -> None:
    """Catches an average that lags behind rising weights, with which a rate of 1 / kappa would overshoot."""
    module = orthogonal(1.0)
    core = AltMin(module, nn.MSELoss(), codes=CurvatureCodes())
    x, y = torch.randn(2, 5, 6, dtype=torch.float64)
    gradients(core, x, y)
    for scale, expected in ((3.0, 10.0), (1.0, 0.8 * 10 + 0.2 * 2)):
        nn.init.orthogonal_(module[1].weight, gain=scale)
        gradients(core, x, y)
        torch.testing.assert_close(float(core.codes.curvature[0]), expected, rtol=1e-9, atol=0)


def test_measured_at_the_first_batches_and_every_nth() -> None:
    """Catches a measurement at every batch, which costs a forward pass, or at none."""
    module = network(5, 7, 4)
    core = AltMin(module, nn.CrossEntropyLoss(), codes=CurvatureCodes(every=8), weights=LocalGradient(steps=1))
    before, measured = core.codes.curvature.clone(), []
    for number in range(25):
        with torch.no_grad():
            module[2].weight.mul_(1.1)  # the estimate changes whenever it is made
        core.step(*batch(module))
        if not torch.equal(before, core.codes.curvature):
            measured.append(number)
        before = core.codes.curvature.clone()
    assert measured == [0, 1, 2, 3, 4, 8, 16, 24]


@pytest.mark.parametrize("steps", [1, 3])
def test_codes_do_not_depend_on_the_batch(steps: int) -> None:
    """Catches a rate from the batch at hand: a sample moves as it would alone, also at a batch that measures."""
    module = convolutional()
    x, y = batch(module, 5)
    core = AltMin(module, nn.CrossEntropyLoss(), codes=CurvatureCodes(steps=steps))
    gradients(core, x, y)
    parts = []
    for rows in (slice(0, 5), slice(0, 2), slice(2, 5)):
        alone = copy.deepcopy(core)
        step = alone.encode(x[rows], y[rows])
        alone.solve_codes(step)
        parts.append(step.codes)
    for whole, first, rest in zip(*parts, strict=True):
        torch.testing.assert_close(torch.cat([first, rest]), whole, rtol=1e-12, atol=1e-12)


def test_weight_gradients_do_not_follow_the_rates() -> None:
    """Catches shares that are not divided out, or by the wrong layer's product.

    With forward inputs the gradient is backprop's whatever the rates are; with moved ones, in the limit of small moves.
    """
    module = network(6, 9, 8, 7, 4)
    x, y = batch(module)
    loss = nn.CrossEntropyLoss()
    expected = torch.autograd.grad(loss(module(x), y), list(module.parameters()))
    for inputs, share, tolerance in (("forward", 0.3, 1e-12), ("moved", 1e-7, 1e-6)):
        weights = LocalGradient(inputs=inputs)  # type: ignore[arg-type]
        core = AltMin(module, loss, codes=CurvatureCodes(share), weights=weights)
        for _ in range(3):  # rates change after the first batch
            for ours, theirs in zip(gradients(core, x, y), expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_more_steps_go_further_and_keep_the_gradients_size() -> None:
    """Catches later steps that start anew, and a share that forgets them: stages that shrink leave n steps of rate r
    the way 1 - (1 - r)^n of the anchor alone.
    """
    module = orthogonal(1e-3)
    x, y = torch.randn(2, 5, 6, dtype=torch.float64)
    expected = torch.autograd.grad(nn.MSELoss()(module(x), y), list(module.parameters()))
    weights = LocalGradient(inputs="forward")
    core = AltMin(module, nn.MSELoss(), AltMinObjective(mu=1.0), CurvatureCodes(0.25, steps=3), weights)
    step = core.encode(x, y)
    core.solve_codes(step)
    full = -(2 / 6) * (step.output - y) @ module[3].weight
    torch.testing.assert_close(step.moves[2], (1 - 0.75**3) * full, rtol=1e-5, atol=0)
    for ours, theirs in zip(gradients(core, x, y), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-12)


DEEP = functools.partial(MLP, 20, [30] * 12, 5, activation="tanh")


NORMALISED = functools.partial(MLP, 20, [50] * 8, 5, batch_norm=True)


@pytest.mark.parametrize(
    ("make", "tolerance"), [(DEEP, 1e-3), (LeNet5, 1e-3), (NORMALISED, 1e-2)], ids=["deep", "lenet", "batch-norm"]
)
def test_small_moves_are_not_rounded_away(make: Any, tolerance: float) -> None:
    """Catches residuals taken as differences of stored codes: single precision must give what double precision gives.

    After eleven hidden layers the lowest move is far below the last bit of the code.
    """
    torch.manual_seed(0)
    double = make().double()
    single = copy.deepcopy(double).float()
    shape = (16, 1, 28, 28) if isinstance(double[0], nn.Conv2d) else (16, 20)
    x, y = torch.randn(shape), torch.randint(5, (16,))
    exact = gradients(AltMin(double, nn.CrossEntropyLoss()), x.double(), y)
    rounded = gradients(AltMin(single, nn.CrossEntropyLoss()), x, y)
    for ours, theirs in zip(rounded, exact, strict=True):
        if float(theirs.norm()) < 1e-9:
            continue  # a bias in front of a BatchNorm has the gradient 0
        assert float((ours.double() - theirs).norm() / theirs.norm()) < tolerance


def test_the_engines_agree() -> None:
    """Catches an estimate that one engine makes otherwise: bit patterns differ, values must not.

    With SGD, for Adam divides a gradient by its own size and makes much of the last bits of a small one.
    """
    parts = []
    module = convolutional()
    x, y = batch(module)
    for engine in ("closed_form", "autograd"):
        coded = CodedNetwork(copy.deepcopy(module), engine)
        weights = LocalGradient(lambda params: torch.optim.SGD(params, lr=0.1))
        core = AltMin(coded, nn.CrossEntropyLoss(), codes=CurvatureCodes(steps=2), weights=weights)
        parts.append([*(core.step(x, y) for _ in range(3))][-1].codes)
    for ours, theirs in zip(*parts, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_bad_batch_leaves_the_estimate_alone() -> None:
    """Catches an estimate poisoned by a batch that is left out."""
    module = network(5, 7, 4)
    core = AltMin(module, nn.CrossEntropyLoss(), nonfinite="skip")
    x, y = batch(module)
    core.step(x, y)
    before = core.codes.curvature.clone()
    core.step(x * float("nan"), y)
    assert torch.equal(core.codes.curvature, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"share": 0.0}, "share must lie in .0, 1., got 0"),
        ({"share": 1.5}, "share must lie in .0, 1., got 1.5"),
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"every": 2.5}, "every must be an integer >= 1, got 2.5"),
    ],
)
def test_bad_settings(arguments: dict[str, Any], message: str) -> None:
    """Catches a setting that fails at the first batch, or moves no code at all."""
    with pytest.raises(ValueError, match=message):
        CurvatureCodes(**arguments)


def test_fixed_rates_are_left_as_they_are() -> None:
    """Catches shares divided out of a solver that did not ask: GradientCodes keeps the objective's own gradients."""
    module = network(6, 9, 8, 4)
    x, y = batch(module)
    sizes = []
    for lr in (1e-3, 1e-4):
        core = AltMin(module, nn.CrossEntropyLoss(), codes=GradientCodes(1, lr))
        sizes.append(float(gradients(core, x, y)[0].norm()))
    assert sizes[0] / sizes[1] == pytest.approx(100, rel=1e-2)  # two codes, each moved by lr


def test_several_weight_steps_learn() -> None:
    """Catches gradients of later weight steps divided by the shares: the first step reaches far past such a target."""
    torch.manual_seed(0)
    module = MLP(20, [50] * 4, 5)
    x = torch.randn(64, 20)
    y = x[:, :5].argmax(1)
    for steps in (2, 4):
        weights = LocalGradient(lambda p: torch.optim.SGD(p, lr=0.2), steps=steps)
        core = AltMin(copy.deepcopy(module), nn.CrossEntropyLoss(), AltMinObjective(0.2), CurvatureCodes(1.0), weights)
        losses = [float(core.step(x, y).loss) for _ in range(100)]
        assert losses[-1] < losses[0]


def test_sparse_codes_keep_their_weight_at_every_depth() -> None:
    """Catches an l1 term that grows as the signal beside it shrinks: its effect is that of plain steps of rate 1."""
    module = orthogonal(1.0)
    x, y = torch.randn(2, 5, 6, dtype=torch.float64)
    sizes = []
    for codes in (CurvatureCodes(1e-3), GradientCodes(1, 1.0)):
        found = []
        for lambda_c in (0.0, 1e-4):
            core = AltMin(
                module,
                nn.MSELoss(),
                AltMinObjective(1.0, lambda_c),
                copy.deepcopy(codes),
                LocalGradient(inputs="forward"),
            )
            found.append(gradients(core, x, y)[0])
        sizes.append(found[1] - found[0])
    torch.testing.assert_close(sizes[0], sizes[1], rtol=1e-6, atol=1e-12)


def test_one_solver_for_each_model() -> None:
    """Catches an estimate that two models overwrite for each other."""
    codes = CurvatureCodes()
    AltMin(network(5, 7, 4), nn.CrossEntropyLoss(), codes=codes)
    with pytest.raises(ValueError, match="belongs to another model; make one for each"):
        AltMin(network(5, 7, 6, 4), nn.CrossEntropyLoss(), codes=codes)
