"""Brute force over all patterns of levels: what crossings are worth, and that the search never raises the problem."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from lightning_altmin import (
    AltMin,
    AltMinObjective,
    DiscreteCodes,
    GradientCodes,
    LocalGradient,
)
from lightning_altmin.codes import CodeProblem
from lightning_altmin.margins import MarginLoss
from lightning_altmin.nn import Quantise, Sign, Staircase
from tests.core.staircase_problems import STAIRCASES, data, network, sgd, solved


@torch.no_grad()
def objective_above(problem: CodeProblem, values: Tensor) -> Tensor:
    """What the values that the layer above reads cost each sample, written out."""
    linear: Any = problem.above.affine[0]
    output = values @ linear.weight.t() + linear.bias
    if problem.target_margins is not None:
        return written_out_margins(problem.target_margins, output)
    target = problem.loss.target
    if target.is_floating_point():
        return (output - target).square().mean(1)
    return functional.cross_entropy(output, target, reduction="none")


def written_out_margins(loss: MarginLoss, code: Tensor) -> Tensor:
    totals = []
    for sample in range(len(code)):
        total = 0.0
        for j in range(code.shape[1]):
            above, below = (
                float(code[sample, j] - loss.above[sample, j]),
                float(loss.below[sample, j] - code[sample, j]),
            )
            for distance, rise in ((above, loss.up[sample, j]), (below, loss.down[sample, j])):
                total += float(rise) * min(max((distance + loss.margin) / (2 * loss.margin), 0.0), 1.0)
        totals.append(total)
    return torch.tensor(totals, dtype=torch.float64)


def patterns(staircase: Staircase, units: int) -> list[Tensor]:
    return [torch.tensor(p, dtype=torch.float64) for p in itertools.product(range(staircase.steps + 1), repeat=units)]


def landing(problem: CodeProblem, level: Tensor, margin: float) -> Tensor:
    """The code of each unit at a level: where it is, or just inside the level's nearest threshold."""
    s: Any = problem.above.transfer[0]
    start = s.level(problem.forward)
    inside = margin if s.steps == 1 else min(margin, s.gap / 2)
    code = problem.forward.clone()
    for i, j in itertools.product(*map(range, code.shape)):
        to = int(level[..., j] if level.dim() == 1 else level[i, j])
        if to > start[i, j]:
            code[i, j] = s.first + (to - 1) * s.gap + inside
        if to < start[i, j]:
            code[i, j] = s.first + to * s.gap - inside
    return code


def total(problem: CodeProblem, level: Tensor, margin: float) -> Tensor:
    """The whole problem of each sample at a pattern, by definition."""
    s: Any = problem.above.transfer[0]
    values = (s.low + s.rise * level).expand_as(problem.forward)
    price = (landing(problem, level, margin) - problem.forward).square().sum(1)
    return objective_above(problem, values) + 0.5 * float(problem.objective.mu) * price


@pytest.mark.parametrize("loss", [None, nn.MSELoss()], ids=["cross-entropy", "squares"])
@pytest.mark.parametrize("make", STAIRCASES.values(), ids=STAIRCASES)
def test_top_crossings_are_worth_what_brute_force_says(make: Any, loss: Any) -> None:
    """Catches a first-order change in place of the exact one, a wrong size of a step, and a level beyond the ends."""
    _, _, problems = solved(network(make), DiscreteCodes(flips=16), loss=loss)
    top = problems[0]
    s: Any = top.above.transfer[0]
    level, margins = s.level(top.forward), top.margins
    assert margins is not None
    here = objective_above(top, s.value(level))
    for j in range(level.shape[1]):
        for rises, way in ((margins.up, 1), (margins.down, -1)):
            other = level.clone()
            other[:, j] += way
            exists = (other[:, j] >= 0) & (other[:, j] <= s.steps)
            change = (objective_above(top, s.value(other)) - here).where(exists, 0)
            torch.testing.assert_close(rises[:, j], change, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make", STAIRCASES.values(), ids=STAIRCASES)
def test_lower_crossings_are_exact_on_the_straight_part_of_every_ramp(make: Any) -> None:
    """Catches a margin loss above that is not the one below is judged by, a missing size of a step, a wrong sign.

    With a wide margin no unit above reaches the end of its ramp, and the first-order change is the change.
    """
    _, _, problems = solved(network(make), DiscreteCodes(flips=16, margin=50.0))
    lower = problems[1]
    s: Any = lower.above.transfer[0]
    level, margins = s.level(lower.forward), lower.margins
    assert margins is not None
    here = objective_above(lower, s.value(level))
    assert float(margins.up.detach().abs().max()) > 1e-6
    for j in range(level.shape[1]):
        for rises, way in ((margins.up, 1), (margins.down, -1)):
            other = level.clone()
            other[:, j] += way
            exists = (other[:, j] >= 0) & (other[:, j] <= s.steps)
            change = (objective_above(lower, s.value(other)) - here).where(exists, 0)
            torch.testing.assert_close(rises[:, j], change, rtol=1e-9, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(STAIRCASES)), st.integers(0, 10**6), st.sampled_from([1e-4, 0.01, 0.3]), st.integers(1, 9)
)
def test_the_search_never_raises_the_problem_and_brute_force_is_never_beaten(
    name: str, seed: int, mu: float, flips: int
) -> None:
    """Catches a set accepted without looking, a price of the way left out, and moves that miss their level.

    At the move found, the problem by definition is at most that at the forward code, and at least the lowest of all
    patterns.
    """
    codes = DiscreteCodes(flips=flips, rounds=2, margin=0.4)
    _, step, problems = solved(network(STAIRCASES[name], seed=seed), codes, mu, seed)
    for problem, level in zip(problems, (1, 0), strict=True):
        s: Any = problem.above.transfer[0]
        found = s.level(problem.forward + step.moves[level])
        torch.testing.assert_close(landing(problem, found, 0.4), problem.forward + step.moves[level])
        reached = total(problem, found, 0.4)
        assert bool((reached <= total(problem, s.level(problem.forward), 0.4) + 1e-12).all())
        lowest = torch.stack([total(problem, p, 0.4) for p in patterns(s, problem.forward.shape[1])]).amin(0)
        assert bool((reached >= lowest - 1e-12).all())
        torch.testing.assert_close(
            float(problem.value(step.moves[level]).detach()), float(reached.sum().detach()), rtol=1e-9, atol=1e-12
        )


def test_one_flip_is_the_best_single_one() -> None:
    """Catches a search that takes another unit than the best: with a loss that is linear in the output, first-order
    changes are exact, so brute force over single flips knows the answer.
    """

    class Linear(nn.Module):
        reduction = "mean"

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            values = output.gather(1, (target.unsqueeze(1) + 1) % 3).squeeze(1)
            return values if self.reduction == "none" else values.mean()

    module = network(widths=(5, 7))
    core = AltMin(module, Linear(), AltMinObjective(mu=0.05), codes := DiscreteCodes(flips=1, margin=0.2))
    x, y = data()
    step = core.encode(x, y)
    with torch.no_grad():
        problem, _ = next(core.code_problems(step))
        move = codes.solve(problem)
    level = Sign().level(problem.forward)
    linear: Any = module[2]

    def cost(pattern: Tensor) -> Tensor:
        output = (2 * pattern - 1) @ linear.weight.t() + linear.bias
        price = (landing(problem, pattern, 0.2) - problem.forward).square().sum(1) * 0.025
        return output.gather(1, (y.unsqueeze(1) + 1) % 3).squeeze(1) + price

    candidates = [level]
    for j in range(7):
        flipped = level.clone()
        flipped[:, j] = 1 - flipped[:, j]
        candidates.append(flipped)
    best = torch.stack([cost(c) for c in candidates]).argmin(0)
    for sample in range(len(x)):
        assert torch.equal(Sign().level(problem.forward + move)[sample], candidates[int(best[sample])][sample])
    assert len(best.unique()) > 1


def test_margin_gradients_are_those_of_the_written_out_ramps() -> None:
    """Catches a slope outside the ramp, and up and down confused; central differences of the formula."""
    torch.manual_seed(3)
    above = torch.randn(4, 6).double()
    up, down = torch.randn(4, 6).double(), torch.randn(4, 6).double()
    loss = MarginLoss(above, above - 1.0, up, down, 0.7)
    code = 2 * torch.randn(4, 6).double()
    torch.testing.assert_close(loss.values(code), written_out_margins(loss, code))
    expected, size = torch.zeros_like(code), 1e-6
    for i, j in itertools.product(range(4), range(6)):
        ahead, behind = code.clone(), code.clone()
        ahead[i, j] += size
        behind[i, j] -= size
        slope = (written_out_margins(loss, ahead) - written_out_margins(loss, behind)).sum() / (2 * size)
        expected[i, j] = slope
    torch.testing.assert_close(loss.gradient(code), expected, rtol=1e-6, atol=1e-8)
    assert bool((expected == 0).any())


def test_weights_go_down_the_margin_loss_at_the_moved_inputs() -> None:
    """Catches a weight step that still goes by the squared distance, a batch mean left out, and inputs not moved."""
    core, step, _ = solved(network(), DiscreteCodes(flips=4), mu=1e-3)
    assert any(bool((m != 0).any()) for m in step.moves)
    core.fill_gradients(step)
    for level, index in ((0, 0), (1, 2)):
        layer: Any = core.network[index]
        x = step.x if level == 0 else Sign()(step.codes_forward[0] + step.moves[0])
        with torch.enable_grad():
            code = layer(x)
        slope = step.margins[level].gradient(code.detach()) / len(x)
        expected = torch.autograd.grad(code, [layer.weight, layer.bias], slope)
        for got, want in zip((layer.weight.grad, layer.bias.grad), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)


class _Slopes(DiscreteCodes):
    """What crossings are worth to first order at the top, too."""

    def solve(self, problem: CodeProblem) -> Tensor:
        move = super().solve(problem)
        margins = problem.margins
        if problem.is_top and margins is not None:
            linear: Any = problem.above.affine[0]
            slope = problem.loss.total_gradient() @ linear.weight.detach() * 2
            problem.margins = MarginLoss(
                margins.above,
                margins.below,
                slope.where(margins.up != 0, 0),
                -slope.where(margins.down != 0, 0),
                margins.margin,
            )
        return move


def test_to_first_order_without_moves_it_is_straight_through_backprop() -> None:
    """The theorem of the docs: catches any factor between the levels. Oracle: autograd with the clipped identity."""

    class Clipped(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
            ctx.save_for_backward(x)
            return Sign()(x)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            return grad * (ctx.saved_tensors[0].abs() < 1)

    module = network()
    core, step, _ = solved(module, _Slopes(flips=0))
    core.fill_gradients(step)
    hidden = step.x
    for index in (0, 2):
        hidden = Clipped.apply(module[index](hidden))
    expected = torch.autograd.grad(functional.cross_entropy(module[4](hidden), step.y), list(module.parameters()))
    for parameter, want in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, want, rtol=1e-9, atol=1e-12)
    exact, _, _ = solved(network(), DiscreteCodes(flips=0))
    step = exact.encode(*data())
    exact.solve_codes(step)
    exact.fill_gradients(step)
    other: Any = exact.network[2]
    assert not torch.allclose(other.weight.grad, module[2].weight.grad, rtol=1e-3)  # and the solver itself is not


@pytest.mark.parametrize("order", [(Sign, nn.Tanh), (nn.Tanh, Sign), (nn.ReLU, Sign, nn.Tanh)])
def test_it_mixes_with_smooth_layers(order: tuple[type[nn.Module], ...]) -> None:
    """Catches a smooth code that does not follow the margins above it, and a sign below a squared target.

    Every code's problem must not rise, and every layer must be trained.
    """
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for make in order:
        layers += [nn.Linear(5, 5), make()]
    module = nn.Sequential(*layers, nn.Linear(5, 3)).double()
    codes = DiscreteCodes(flips=16, smooth=GradientCodes(3, 0.05))
    core, step, problems = solved(module, codes, mu=0.5)
    for problem in problems:
        with torch.no_grad():
            after = float(problem.value(step.moves[problem.level]))
            assert after <= float(problem.value()) + 1e-12
    core.fill_gradients(step)
    for parameter in module.parameters():
        assert parameter.grad is not None
        assert float(parameter.grad.abs().max()) > 0


def test_samples_do_not_depend_on_their_batch() -> None:
    """Catches a rank or a comparison over the batch."""
    module = network(Quantise)
    core = AltMin(module, nn.CrossEntropyLoss(), AltMinObjective(mu=0.01), DiscreteCodes(flips=3))
    x, y = data(batch=6)
    together = core.encode(x, y)
    core.solve_codes(together)
    assert bool((together.moves[0] != 0).any())
    for i in range(6):
        alone = core.encode(x[i : i + 1], y[i : i + 1])
        core.solve_codes(alone)
        for a, b in zip(alone.moves, together.moves, strict=True):
            torch.testing.assert_close(a[0], b[i], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", STAIRCASES.values(), ids=STAIRCASES)
def test_it_learns_what_a_linear_model_cannot(make: Any) -> None:
    """Catches hidden layers that are not trained in the right direction: which of two circles a point is on."""
    torch.manual_seed(0)
    angle, y = 6.3 * torch.rand(512), torch.randint(2, (512,))
    x = (1.0 + y).unsqueeze(1) * torch.stack([angle.cos(), angle.sin()], 1)
    module = nn.Sequential(nn.Linear(2, 40), make(), nn.Linear(40, 40), make(), nn.Linear(40, 2))
    adam = LocalGradient(lambda params: torch.optim.Adam(params, lr=0.01))
    core = AltMin(module, nn.CrossEntropyLoss(), AltMinObjective(mu=0.01), DiscreteCodes(flips=4), adam)
    for _ in range(300):
        core.step(x, y)
    assert float((core(x).argmax(1) == y).double().mean()) > 0.9


def test_convolutions_between_signs() -> None:
    """Catches shapes of images taken for rows, and a BatchNorm after the layer above left out."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 3, 3), Sign(), nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), Sign(), nn.Flatten()]
    module = nn.Sequential(*layers, nn.Linear(16, 3)).double()
    core = AltMin(module, nn.CrossEntropyLoss(), AltMinObjective(mu=1e-4), DiscreteCodes(flips=8))
    x, y = torch.randn(7, 1, 6, 6).double(), torch.randint(3, (7,))
    core.verify(x, y)
    step = core.encode(x, y)
    with torch.no_grad():
        for problem, level in core.code_problems(step):
            step.moves[level] = core.codes.solve(problem)
            step.margins[level] = problem.margins
            assert step.moves[level].shape == problem.forward.shape
            assert float(problem.value(step.moves[level])) < float(problem.value())


def test_the_closed_form_of_changes_is_the_evaluated_loss() -> None:
    """Catches class weights, ignored labels or the shift against overflow in the closed form of cross-entropy."""
    torch.manual_seed(0)
    output, target = 3 * torch.randn(6, 4).double(), torch.tensor([0, 1, 2, 3, -100, 1])
    moves = torch.cat([torch.randn(5, 4), 90 * torch.randn(2, 4)]).double()
    for weight in (None, torch.rand(4).double()):
        core = AltMin(network(outputs=4), loss := nn.CrossEntropyLoss(weight=weight), codes=DiscreteCodes())
        ours = core.local_loss.at(output, target).changes(moves)
        loss.reduction = "none"
        expected = torch.stack([loss(output + m, target) - loss(output, target) for m in moves], 1)
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)


def test_a_batch_whose_codes_are_not_kept_trains_the_same() -> None:
    """Catches margins that are freed before their stage's weight step."""
    results = []
    for keep in (True, False):
        torch.manual_seed(0)
        core = AltMin(
            network(), nn.CrossEntropyLoss(), AltMinObjective(mu=0.01), DiscreteCodes(flips=16), LocalGradient(sgd)
        )
        for seed in range(4):
            core.step(*data(seed), keep_codes=keep)
        results.append([p.detach().clone() for p in core.network.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
