"""Oracle: least squares over all recorded pairs at once, by an orthogonal factorisation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_altmin import AltMin, AltMinObjective, CoactivationMemory, GradientCodes, LayerwiseWeights, LocalGradient
from lightning_altmin.weights import WeightProblem, bcd
from tests.weights.problems import assert_layer, random_features, ridge_over

RIDGE = 1e-3


class Recorded(CoactivationMemory):
    """A memory that also keeps the pairs of input and target that each layer was given."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def gradients(self, problem: WeightProblem) -> Any:
        if not problem.stage.is_output:
            inside = problem.input
            for module in problem.stage.transfer:
                inside = module(inside)
            self.pairs.setdefault(problem.stage.name, []).append((inside, problem.target))
        return super().gradients(problem)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_one_pass_in_any_order_is_the_joint_solution(sizes: list[int], random: Any) -> None:
    """Catches statistics that miss a batch or count one twice, and a solution that depends on the order or the split
    of the stream: over frozen features the weights after one pass are those of all samples together.
    """
    network = random_features()
    core = AltMin(network, nn.CrossEntropyLoss(), weights=CoactivationMemory("solve", ridge=RIDGE, every=1))
    x, y = torch.randn(sum(sizes), 5, dtype=torch.float64), torch.randint(3, (sum(sizes),))
    order = list(range(len(x)))
    random.shuffle(order)
    for index, size in enumerate(sizes):
        chosen = order[sum(sizes[:index]) : sum(sizes[:index]) + size]
        core.step(x[chosen], y[chosen])
    assert_layer(network[2], ridge_over(network[:2](x), torch.eye(3, dtype=x.dtype)[y], RIDGE))


def test_classes_that_come_one_after_the_other_are_not_forgotten() -> None:
    """Catches forgetting: a stream sorted by class ends at the same weights as a shuffled one."""
    x, y = torch.randn(60, 5, dtype=torch.float64), torch.arange(60) % 3
    results = []
    for order in (torch.randperm(60), torch.argsort(y, stable=True)):
        torch.manual_seed(0)
        network = random_features()
        core = AltMin(network, nn.CrossEntropyLoss(), weights=CoactivationMemory("solve", every=1))
        for chosen in order.split(7):
            core.step(x[chosen], y[chosen])
        results.append(network[2].weight.detach())
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("convolutional", [False, True])
def test_hidden_layers_are_fitted_to_all_their_codes(convolutional: bool) -> None:
    """Catches targets of another layer, unmoved codes as targets, a convolution solved over its samples only, and a
    solution in another batch than every third.
    """
    if convolutional:
        network = nn.Sequential(
            nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(3, 4, 2), nn.Tanh(), nn.Flatten(),
            nn.Linear(16, 3),
        ).double()  # fmt: skip
        shape: tuple[int, ...] = (2, 6, 6)
    else:
        network = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        shape = (5,)
    memory = Recorded(form="solve", ridge=RIDGE, every=3)
    codes = GradientCodes(steps=2, lr=0.5)
    core = AltMin(network, nn.CrossEntropyLoss(), AltMinObjective(mu=0.1), codes, memory)
    start = copy.deepcopy(network)
    for number in range(6):
        core.step(torch.randn(30, *shape, dtype=torch.float64), torch.randint(3, (30,)), keep_codes=number % 2 == 0)
        if number == 1:
            torch.testing.assert_close(network.state_dict(), start.state_dict(), rtol=0, atol=0)
    for name in ("0", "2"):
        layer = network[int(name)]
        a, c = (torch.cat(each) for each in zip(*memory.pairs[name], strict=True))
        assert len(a) == 180
        if convolutional:
            unfolded = nn.functional.unfold(a, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
            a, c = unfolded.transpose(1, 2).flatten(0, 1), c.flatten(2).transpose(1, 2).flatten(0, 1)
        assert_layer(layer, ridge_over(a, c, RIDGE), 1e-9)


def test_coordinate_descent_starts_from_the_weights_there_are() -> None:
    """Catches a sweep from zero, one with targets left over from the batch before, and a shrunk bias."""
    network = random_features()
    memory = CoactivationMemory("solve", solver="bcd", lambda_w=0.01, every=1)
    core = AltMin(network, nn.CrossEntropyLoss(), weights=memory)
    W = torch.cat([network[2].weight, network[2].bias.unsqueeze(1)], 1).detach()
    seen: list[tuple[Tensor, Tensor]] = []
    for _ in range(3):
        x, y = torch.randn(9, 5, dtype=torch.float64), torch.randint(3, (9,))
        core.step(x, y)
        a = network[:2](x)
        seen.append((torch.cat([a, a.new_ones(9, 1)], 1), torch.eye(3, dtype=x.dtype)[y]))
        A, B = sum(a.t() @ a for a, _ in seen), sum(c.t() @ a for a, c in seen)
        W = bcd(W, A, B, 0.01, bias=True)
        assert_layer(network[2], W)


def test_the_end_of_a_stream_is_solved_on_demand() -> None:
    """Catches batches since the last solution that solve() leaves out."""
    network = random_features()
    memory = CoactivationMemory("solve", ridge=RIDGE, every=100)
    core = AltMin(network, nn.CrossEntropyLoss(), weights=memory)
    x, y = torch.randn(40, 5, dtype=torch.float64), torch.randint(3, (40,))
    for chosen in torch.arange(40).split(7):
        core.step(x[chosen], y[chosen])
    memory.solve()
    assert_layer(network[2], ridge_over(network[:2](x), torch.eye(3, dtype=x.dtype)[y], RIDGE))


def test_single_precision_is_summed_in_double() -> None:
    """Catches sums in single precision, which lose digits as a stream goes on: here 1e-5 of them after 1000 batches."""
    network = random_features().float()
    memory = CoactivationMemory("solve", every=10_000)
    core = AltMin(network, nn.CrossEntropyLoss(), weights=memory)
    x, y = torch.randn(20, 5), torch.randint(3, (20,))
    for _ in range(1000):
        core.step(x, y, keep_codes=False)
    a = torch.cat([network[:2](x), torch.ones(20, 1)], 1)
    (A,) = (value for name, value in core.state_dict().items() if name.endswith(".A"))
    torch.testing.assert_close(A, 1000 * (a.t() @ a).double(), rtol=1e-12, atol=1e-9)


def test_regression_is_fitted_to_its_targets() -> None:
    """Catches one-hot targets where there are none."""
    network = random_features()
    core = AltMin(network, nn.MSELoss(), weights=CoactivationMemory("solve", ridge=RIDGE, every=1))
    x, y = torch.randn(30, 5, dtype=torch.float64), torch.randn(30, 3, dtype=torch.float64)
    core.step(x, y)
    assert_layer(network[2], ridge_over(network[:2](x), y, RIDGE))


def test_ignored_labels_are_left_out() -> None:
    """Catches samples of no class that count as one of class 0, or whose appended one counts."""
    network = random_features()
    core = AltMin(
        network, nn.CrossEntropyLoss(ignore_index=7), weights=CoactivationMemory("solve", ridge=RIDGE, every=1)
    )
    x, y = torch.randn(30, 5, dtype=torch.float64), torch.randint(3, (30,))
    y[::4] = 7
    core.step(x, y)
    kept = y != 7
    assert_layer(network[2], ridge_over(network[:2](x)[kept], torch.eye(3, dtype=x.dtype)[y[kept]], RIDGE))


def test_samples_weigh_what_the_loss_says_of_their_class() -> None:
    """Catches class weights that are left out: with weights that are whole numbers a sample counts as so many."""
    network = random_features()
    loss = nn.CrossEntropyLoss(torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64))
    core = AltMin(network, loss, weights=CoactivationMemory("solve", ridge=RIDGE, every=1))
    x, y = torch.randn(30, 5, dtype=torch.float64), torch.randint(3, (30,))
    core.step(x, y)
    times = torch.tensor([1, 3, 2])[y]
    a, labels = network[:2](x).repeat_interleave(times, 0), y.repeat_interleave(times)
    assert_layer(network[2], ridge_over(a, torch.eye(3, dtype=x.dtype)[labels], RIDGE))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (nn.CrossEntropyLoss(label_smoothing=0.1), "label_smoothing=0.1 says nothing"),
        (nn.BCEWithLogitsLoss(), "does not minimise the loss, BCEWithLogitsLoss"),
        (nn.functional.l1_loss, "does not minimise the loss, L1Loss"),
        (lambda output, target: (output - target).square().mean(), "does not minimise the loss, a function"),
    ],
)
def test_losses_that_least_squares_do_not_minimise_are_refused(loss: Any, message: str) -> None:
    """Catches an output layer that is fitted to something else than the loss asks for, without a word; a hidden layer
    has no part in the loss, and an output layer with a solver of its own minimises it.
    """
    with pytest.raises(ValueError, match=message + ".*LayerwiseWeights"):
        AltMin(random_features(), loss, weights=CoactivationMemory("solve"))
    hidden = LayerwiseWeights({"output": LocalGradient(), "default": CoactivationMemory("solve")})
    network = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    AltMin(network, loss, weights=hidden)


def test_a_frozen_bias_stays_and_counts() -> None:
    """Catches a bias that is part of the output but not of the targets, or that is changed though frozen."""
    network = random_features()
    network[2].bias.requires_grad_(False)
    bias = network[2].bias.detach().clone()
    core = AltMin(network, nn.MSELoss(), weights=CoactivationMemory("solve", ridge=RIDGE, every=1))
    x, y = torch.randn(30, 5, dtype=torch.float64), torch.randn(30, 3, dtype=torch.float64)
    core.step(x, y)
    expected = ridge_over(network[:2](x), y - bias, RIDGE, bias=False)
    torch.testing.assert_close(network[2].weight.detach(), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(network[2].bias.detach(), bias, rtol=0, atol=0)


def test_output_layer_by_its_loss() -> None:
    """Catches an output layer that the memory still touches when it has a solver of its own."""
    network = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    weights = LayerwiseWeights(
        {
            "output": LocalGradient(lambda params: torch.optim.SGD(params, lr=0.5), inputs="forward"),
            "default": CoactivationMemory("solve", every=1),
        }
    )
    core = AltMin(network, nn.CrossEntropyLoss(), weights=weights)
    x, y = torch.randn(30, 5, dtype=torch.float64), torch.randint(3, (30,))
    loss = nn.functional.cross_entropy(network(x), y)
    gradient = torch.autograd.grad(loss, network[2].weight)[0]
    before = [layer.weight.detach().clone() for layer in (network[0], network[2])]
    core.step(x, y)
    torch.testing.assert_close(network[2].weight, before[1] - 0.5 * gradient, rtol=1e-10, atol=1e-12)
    assert not torch.equal(network[0].weight, before[0])


def test_what_cannot_be_solved_is_refused() -> None:
    """Catches a BatchNorm between a layer and its target, and class weights that soft labels make ambiguous."""
    normed = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3))
    with pytest.raises(ValueError, match=r"stage '0' has \['BatchNorm1d'\] after it; use form='innovation'"):
        AltMin(normed, nn.CrossEntropyLoss(), weights=CoactivationMemory("solve"))
    loss = nn.CrossEntropyLoss(torch.ones(3, dtype=torch.float64))
    core = AltMin(random_features(), loss, weights=CoactivationMemory("solve"))
    with pytest.raises(ValueError, match="y holds probabilities of several; leave CrossEntropyLoss's weight out"):
        core.step(torch.randn(4, 5, dtype=torch.float64), torch.rand(4, 3, dtype=torch.float64).softmax(1))


def test_a_memory_that_has_seen_nothing_is_not_solved_for() -> None:
    """Catches weights set to zero by a call that came too early."""
    core = AltMin(random_features(), nn.CrossEntropyLoss(), weights=CoactivationMemory("solve"))
    before = core.network[2].weight.clone()
    with pytest.raises(ValueError, match="have seen nothing to solve for"):
        core.weights.solve()
    assert torch.equal(core.network[2].weight, before)


def test_residuals_are_there_for_every_hidden_stage() -> None:
    """Catches a monitor that reads another layer's residual, because a memory has no need of its own."""
    core = AltMin(
        nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), nn.MSELoss(), weights=CoactivationMemory("solve")
    )
    step = core.step(torch.randn(8, 5), torch.randn(8, 3))
    assert len(step.residuals) == 1
    assert float(step.residuals[0]) == pytest.approx(float(step.moves[0].square().sum() / 8), rel=1e-5)


def test_a_label_per_position_is_refused() -> None:
    """Catches one-hot labels along the wrong dimension; the way out that the message names trains."""
    x, y = torch.randn(4, 2, 5, 5), torch.randint(3, (4, 3, 3))

    def network() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 3))

    core = AltMin(network(), nn.CrossEntropyLoss(), weights=CoactivationMemory("solve", every=1))
    before = copy.deepcopy(core.network.state_dict())
    with pytest.raises(ValueError, match=r"one label per sample, the output has shape \(4, 3, 3, 3\); .*LayerwiseWei"):
        core.step(x, y)
    torch.testing.assert_close(core.network.state_dict(), before, rtol=0, atol=0)
    weights = LayerwiseWeights({"output": LocalGradient(), "default": CoactivationMemory("solve", every=1)})
    core = AltMin(network(), nn.CrossEntropyLoss(), weights=weights)
    core.step(x, y)
    assert not torch.equal(core.network[2].weight, before["2.weight"])
