"""Oracle: autograd of the user's loss. Its mean as given and its sum over samples, in closed form or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from lightning_altmin import AltMin, GradientCodes
from lightning_altmin.losses import CallableLoss, CrossEntropy, LocalLoss, MeanSquaredError, ModuleLoss, local_loss
from tests.core.written_out import batch, network

CLASSES, SAMPLES = 5, 7


def labels() -> Tensor:
    return torch.randint(CLASSES, (SAMPLES,))


def weights() -> Tensor:
    return torch.rand(CLASSES, dtype=torch.float64) + 0.2


def some_ignored() -> Tensor:
    y = labels()
    y[[1, 4]] = -100
    return y


CASES: dict[str, tuple[Any, Any]] = {
    "plain": (lambda: nn.CrossEntropyLoss(), labels),
    "weights": (lambda: nn.CrossEntropyLoss(weights()), labels),
    "ignored": (lambda: nn.CrossEntropyLoss(), some_ignored),
    "ignore a class": (lambda: nn.CrossEntropyLoss(ignore_index=2), labels),
    "smoothing": (lambda: nn.CrossEntropyLoss(label_smoothing=0.3), labels),
    "smoothing everything": (lambda: nn.CrossEntropyLoss(label_smoothing=1.0), labels),
    "weights, ignored": (lambda: nn.CrossEntropyLoss(weights(), ignore_index=2), labels),
    "weights, smoothing": (lambda: nn.CrossEntropyLoss(weights(), label_smoothing=0.3), labels),
    "all three": (lambda: nn.CrossEntropyLoss(weights(), ignore_index=1, label_smoothing=0.3), labels),
    "ignored, smoothing": (lambda: nn.CrossEntropyLoss(label_smoothing=0.3), some_ignored),
    "soft targets": (
        lambda: nn.CrossEntropyLoss(weights(), label_smoothing=0.1),
        lambda: torch.rand(SAMPLES, CLASSES, dtype=torch.float64).softmax(1),
    ),
    "function": (lambda: functional.cross_entropy, labels),
}


def gradient(value: Tensor, at: Tensor) -> Tensor:
    return torch.autograd.grad(value, at)[0]


def output() -> Tensor:
    return torch.randn(SAMPLES, CLASSES, dtype=torch.float64, requires_grad=True)


def assert_is_the_loss(ours: LocalLoss, loss: Any, per_sample: Any, out: Tensor, y: Any) -> None:
    """``loss`` is the batch mean, ``per_sample`` the vector of the samples' losses."""
    torch.testing.assert_close(ours.mean(out, y), loss(out, y), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(ours.total(out, y), per_sample(out, y).sum(), rtol=1e-13, atol=1e-13)
    detached = out.detach()
    torch.testing.assert_close(ours.mean_gradient(detached, y), gradient(loss(out, y), out), rtol=1e-12, atol=1e-12)
    expected = gradient(per_sample(out, y).sum(), out)
    torch.testing.assert_close(ours.total_gradient(detached, y), expected, rtol=1e-12, atol=1e-12)
    at = ours.at(detached, y)  # shares work between the same four, asked for in any order
    torch.testing.assert_close(at.mean_gradient(), gradient(loss(out, y), out), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(at.total_gradient(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(at.mean(), loss(out, y), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(at.total(), per_sample(out, y).sum(), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", CASES)
def test_cross_entropy(name: str) -> None:
    """Catches class weights, ignored labels or smoothing missing from, or wrongly normalised in, the closed form."""
    make, targets = CASES[name]
    loss, y = make(), targets()
    ours = local_loss(loss)
    assert isinstance(ours, CrossEntropy)

    def per_sample(out: Tensor, y: Tensor) -> Tensor:
        options = {} if loss is functional.cross_entropy else {
            "weight": loss.weight, "ignore_index": loss.ignore_index, "label_smoothing": loss.label_smoothing,
        }  # fmt: skip
        return functional.cross_entropy(out, y, reduction="none", **options)

    assert_is_the_loss(ours, loss, per_sample, output(), y)


def test_cross_entropy_gradient_by_its_definition() -> None:
    """Catches an error shared with torch: softmax minus one-hot, by hand, for logits whose softmax is known."""
    out = torch.log(torch.tensor([[1.0, 2.0, 5.0], [4.0, 4.0, 2.0]], dtype=torch.float64))
    ours, y = local_loss(nn.CrossEntropyLoss()), torch.tensor([2, 0])
    total = torch.tensor([[1 / 8, 2 / 8, 5 / 8 - 1], [0.4 - 1, 0.4, 0.2]], dtype=torch.float64)
    torch.testing.assert_close(ours.total_gradient(out, y), total, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(ours.mean_gradient(out, y), total / 2, rtol=1e-14, atol=1e-15)


@given(
    seed=st.integers(0, 2**31),
    weighted=st.booleans(),
    smoothing=st.floats(0.0, 1.0),
    ignored=st.integers(-1, 4),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
)
@settings(max_examples=80, deadline=None)
def test_cross_entropy_in_every_combination(
    seed: int, weighted: bool, smoothing: float, ignored: int, scale: float
) -> None:
    """Catches what the listed combinations miss: any weights, smoothing, ignored class and size of the logits."""
    torch.manual_seed(seed)
    loss = nn.CrossEntropyLoss(weights() if weighted else None, ignore_index=ignored, label_smoothing=smoothing)
    y = labels()
    if bool((y == ignored).all()):
        y[0] = (ignored + 1) % CLASSES
    out = (output().detach() * scale).requires_grad_()

    def per_sample(out: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(
            out, y, loss.weight, ignore_index=ignored, label_smoothing=smoothing, reduction="none"
        )

    assert_is_the_loss(local_loss(loss), loss, per_sample, out, y)


def test_cross_entropy_per_position() -> None:
    """Catches positions summed, not averaged: a sample of an image or sequence loss is its mean over positions."""
    out = torch.randn(3, CLASSES, 4, 2, dtype=torch.float64, requires_grad=True)
    y = torch.randint(CLASSES, (3, 4, 2))
    assert_is_the_loss(
        local_loss(nn.CrossEntropyLoss()),
        nn.CrossEntropyLoss(),
        lambda out, y: torch.stack([functional.cross_entropy(out[i : i + 1], y[i : i + 1]) for i in range(3)]),
        out,
        y,
    )


ELEMENTWISE = {
    "mse": (nn.MSELoss(), lambda d: d.square()),
    "l1": (nn.L1Loss(), lambda d: d.abs()),
    "huber": (nn.HuberLoss(delta=0.5), lambda d: torch.where(d.abs() < 0.5, d.square() / 2, 0.5 * (d.abs() - 0.25))),
}


@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 4), (6, 3, 2)])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_losses(name: str, shape: tuple[int, ...]) -> None:
    """Catches features summed instead of averaged in a regression loss, and a factor of 2."""
    loss, formula = ELEMENTWISE[name]
    out, y = torch.randn(shape, dtype=torch.float64, requires_grad=True), torch.randn(shape, dtype=torch.float64)
    ours = local_loss(loss)
    assert isinstance(ours, MeanSquaredError) == (name == "mse")
    assert_is_the_loss(ours, loss, lambda out, y: formula(out - y).reshape(6, -1).mean(1), out, y)


def test_binary_cross_entropy() -> None:
    """Catches a loss with options (pos_weight) whose per-sample copy forgets them."""
    weight = torch.tensor([2.0, 0.5], dtype=torch.float64)
    loss = nn.BCEWithLogitsLoss(pos_weight=weight)
    out = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    y = torch.randint(2, (6, 2)).double()

    def per_sample(out: Tensor, y: Tensor) -> Tensor:
        return -(weight * y * torch.log(torch.sigmoid(out)) + (1 - y) * torch.log(1 - torch.sigmoid(out))).mean(1)

    assert_is_the_loss(local_loss(loss), loss, per_sample, out, y)


def test_a_plain_function_is_a_batch_mean() -> None:
    """Catches a function's value taken as a sum: its sum over samples is the batch size times its value."""

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return (out - y).abs().pow(1.5).sum(1).mean()

    out, y = output(), torch.randn(SAMPLES, CLASSES, dtype=torch.float64)
    ours = local_loss(loss)
    assert isinstance(ours, CallableLoss)
    assert_is_the_loss(ours, loss, lambda out, y: (out - y).abs().pow(1.5).sum(1), out, y)


def test_negative_log_likelihood_after_log_softmax_is_cross_entropy() -> None:
    """Catches modules after the output layer being dropped: LogSoftmax + NLLLoss must equal CrossEntropyLoss."""
    plain = network(5, 7, 6, 4)
    x, y = batch(plain)
    results = []
    for module, loss in (
        (plain, nn.CrossEntropyLoss()),
        (nn.Sequential(*plain, nn.LogSoftmax(1)), nn.NLLLoss()),
    ):
        plain.zero_grad()
        core = AltMin(module, loss, codes=GradientCodes(steps=3, lr=0.5))
        step = core.encode(x, y)
        core.solve_codes(step)
        core.fill_gradients(step)
        results.append((step.loss, step.codes, [p.grad for p in plain.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def test_buffers_of_the_loss_move_with_the_model() -> None:
    """Catches class weights left in another precision: the per-sample copy shares the user's module's buffers."""
    loss = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    core = AltMin(network(5, 7, 4).float(), loss).double()
    x, y = batch(core.network)
    core.step(x, y)
    for ours in (loss.weight, core.local_loss.module.weight, core.local_loss._per_sample.weight):
        assert ours.dtype == torch.float64


def test_reductions_other_than_mean_are_refused() -> None:
    """Catches a sum taken for a mean; the error says what to pass."""
    for reduction in ("sum", "none"):
        with pytest.raises(ValueError, match=r"reduction='mean'"):
            local_loss(nn.MSELoss(reduction=reduction))
    with pytest.raises(ValueError, match="reduction"):
        local_loss(nn.KLDivLoss(reduction="batchmean"))


def test_a_callable_need_not_be_hashable() -> None:
    """Catches a dataclass refused because its ``==`` takes its hash away."""

    @dataclass
    class Scaled:
        scale: float

        def __call__(self, out: Tensor, y: Tensor) -> Tensor:
            return self.scale * (out - y).square().mean()

    out = torch.randn(4, 3)
    torch.testing.assert_close(local_loss(Scaled(2.0)).mean(out, out + 1), torch.tensor(2.0))


def test_labels_that_are_no_class_do_not_reach_a_kernel() -> None:
    """Catches losses whose labels break a device: only cross-entropy's were looked at.

    What a kernel is given instead takes no part (ignored), or is a class where a loss ignores none; the evidence
    says that the batch is bad.
    """
    out, y = output().detach(), torch.tensor([0, 4, 5, -1, -100, 2, 3])
    for loss, expected in (
        (nn.NLLLoss(), [0, 4, -100, -100, -100, 2, 3]),
        (nn.NLLLoss(ignore_index=5), [0, 4, 5, 5, 5, 2, 3]),
        (nn.MultiMarginLoss(), [0, 4, 0, 0, 0, 2, 3]),
    ):
        ours = local_loss(loss)
        assert ours.readable(out, y).tolist() == expected
        assert [bool(e) for e in ours.evidence(out, y)] == [False]
        assert [bool(e) for e in ours.evidence(out, y.clamp(0, 4))] == [True]
    bytes_ = local_loss(nn.NLLLoss()).readable(out, torch.tensor([0, 4, 5, 255, 200, 2, 3], dtype=torch.uint8))
    assert bytes_.tolist() == [0, 4, -100, -100, -100, 2, 3]


def test_a_forward_of_ones_own_may_take_other_labels() -> None:
    """Catches labels refused that a subclass makes classes of."""

    class FromOne(nn.CrossEntropyLoss):
        def forward(self, out: Tensor, y: Tensor) -> Tensor:
            return super().forward(out, y - 1)

    out, y = output().detach(), torch.randint(1, CLASSES + 1, (SAMPLES,))
    ours = local_loss(FromOne())
    ours.check(out, y)
    torch.testing.assert_close(ours.mean(out, y), functional.cross_entropy(out, y - 1))


def test_what_is_no_loss_is_refused() -> None:
    """Catches a class passed for an instance, a non-callable, and a loss with weights that nobody would train."""
    for wrong in (nn.CrossEntropyLoss, "cross_entropy", None):
        with pytest.raises(TypeError, match="loss must be"):
            local_loss(wrong)

    class Trained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = nn.Parameter(torch.ones(1))

    with pytest.raises(ValueError, match="trainable parameters"):
        local_loss(Trained())


def test_modules_without_reduction_are_functions() -> None:
    """Catches a user's own loss module being refused; and an already wrapped loss being wrapped twice."""

    class Mean(nn.Module):
        def forward(self, out: Tensor, y: Tensor) -> Tensor:
            return (out - y).square().mean()

    ours = local_loss(Mean())
    assert isinstance(ours, CallableLoss)
    assert local_loss(ours) is ours
    assert isinstance(local_loss(functional.mse_loss), MeanSquaredError)
    assert isinstance(local_loss(nn.SmoothL1Loss()), ModuleLoss)


@pytest.mark.parametrize(
    "loss",
    [
        *(nn.PoissonNLLLoss(), nn.HingeEmbeddingLoss(), nn.MultiLabelSoftMarginLoss(), nn.SoftMarginLoss()),
        *(functional.l1_loss, functional.huber_loss, functional.smooth_l1_loss, functional.mse_loss),
        *(functional.poisson_nll_loss, functional.hinge_embedding_loss, functional.multilabel_soft_margin_loss),
        *(functional.kl_div, functional.soft_margin_loss),
    ],
)
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning")  # kl_div's
def test_targets_are_not_broadcast(loss: Any) -> None:
    """Catches targets of shape (batch,) for outputs (batch, 1), which broadcast to batch x batch pairs."""
    core = AltMin(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), loss)
    with pytest.raises(ValueError, match=r"y has shape \(5,\) but the network's output has \(5, 1\)"):
        core.step(torch.randn(5, 3), torch.rand(5))
    core.step(torch.randn(5, 3), torch.rand(5, 1))


@pytest.mark.parametrize("name", ["poisson_nll_loss", "kl_div", "soft_margin_loss", "hinge_embedding_loss"])
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning")  # kl_div's
def test_functions_are_taken_with_their_own_defaults(name: str) -> None:
    """Catches a module in a function's place whose defaults are others."""
    function = getattr(functional, name)
    out, y = torch.randn(6, 3, dtype=torch.float64), torch.rand(6, 3, dtype=torch.float64)
    assert isinstance(local_loss(function), ModuleLoss)
    torch.testing.assert_close(local_loss(function).mean(out, y), function(out, y), rtol=0, atol=0)


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.L1Loss()])
def test_targets_in_double_for_a_network_in_single(loss: nn.Module) -> None:
    """Catches a gradient in the targets' precision, as NumPy's have it, which no layer in single can take."""
    x, y = torch.randn(5, 3), torch.randn(5, 2, dtype=torch.float64)
    networks = [nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    for trained, targets in zip(networks, (y, y.float()), strict=True):
        AltMin(trained, loss).step(x, targets)
    for found, expected in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", [lambda output, y: (output - y).square().mean(), nn.HuberLoss()])
def test_the_output_is_left_out_of_graphs(loss: Any) -> None:
    """Catches a loss differentiated at the network's own output: whoever keeps it would keep a graph per batch."""
    core = AltMin(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), loss)
    step = core.step(torch.randn(5, 3), torch.randn(5, 2))
    assert not any(t.requires_grad for t in (step.output, step.loss, *step.codes, *step.codes_forward))


@pytest.mark.parametrize("wrong", [[0, 1, 2, 3, 4, 0, 1], "labels", None], ids=["list", "string", "nothing"])
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.NLLLoss(), nn.MultiMarginLoss()])
def test_labels_that_are_no_tensor_are_refused_by_name(loss: nn.Module, wrong: Any) -> None:
    """Catches an AttributeError about a dtype, where a loader gave a list of labels."""
    said = f"{type(loss).__name__} needs a tensor of targets, got {type(wrong).__name__}"
    with pytest.raises(TypeError, match=said):
        local_loss(loss).check(output().detach(), wrong)


@pytest.mark.parametrize("shift", [0.0, -0.5])
def test_probabilities_reach_a_kernel_as_they_are(shift: float) -> None:
    """Catches probabilities taken for labels that are no class: they would be replaced, or the batch be a bad one.

    That holds for floats of any kind, of which torch takes negative ones, too.
    """
    out, y = output().detach(), torch.rand(SAMPLES, CLASSES, dtype=torch.float64).softmax(1) + shift
    ours, given_y = local_loss(nn.CrossEntropyLoss()), y.clone()
    assert torch.equal(ours.readable(out, y), given_y)
    assert all(bool(evidence) for evidence in ours.evidence(out, y))


def probabilities() -> Tensor:
    return torch.rand(SAMPLES, CLASSES, dtype=torch.float64).softmax(1)


@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        (nn.NLLLoss(weights(), ignore_index=2), labels),
        (nn.CrossEntropyLoss(weights()), some_ignored),
        (nn.CrossEntropyLoss(weights()), probabilities),
        (nn.CrossEntropyLoss(weights(), label_smoothing=0.2), probabilities),
        (nn.MultiMarginLoss(weight=weights()), labels),
        (nn.MSELoss(), probabilities),
        (nn.HuberLoss(), probabilities),
    ],
    ids=lambda value: value.__name__ if callable(value) and not isinstance(value, nn.Module) else type(value).__name__,
)
def test_weighted_means_of_parts_are_the_mean_of_the_whole(loss: nn.Module, targets: Any) -> None:
    """Catches parts of a batch that count by their labels' weights where torch divides by the number of samples.

    The mean of the whole is the mean of its parts' means, each counting as much as what it was divided by.
    """
    ours, out, y = local_loss(loss), output().detach(), targets()
    parts = list(zip(out.split([3, 4]), y.split([3, 4]), strict=True))
    counts = torch.stack([ours.weight(*part) for part in parts])
    means = torch.stack([ours.mean(*part) for part in parts])
    torch.testing.assert_close((counts * means).sum() / counts.sum(), loss(out, y), rtol=1e-6, atol=1e-9)
