"""Oracle: autograd of the whole objective, written out. The code step moves each code by gradient steps on J."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_altmin import AltMin, AltMinObjective, CodedNetwork, GradientCodes
from tests.core.written_out import (
    Constants,
    batch,
    convolutional,
    cross_entropy_total,
    network,
    objective,
    stage_functions,
    sweep,
)

SETTINGS = {
    "one step": Constants(),
    "rate 1": Constants(lr=1.0),
    "small mu": Constants(mu=0.003, lr=0.3),
    "large mu": Constants(mu=20.0),
    "anchor": Constants(steps=4),
    "l1": Constants(lambda_c=0.05, steps=3),
    "momentum": Constants(steps=5, lr=0.3, momentum=0.9),
    "nesterov": Constants(steps=5, lr=0.3, momentum=0.9, nesterov=True),
    "everything": Constants(mu=0.7, lambda_c=0.02, steps=4, lr=0.4, momentum=0.5, nesterov=True),
}
NETWORKS = {"mlp": lambda: network(5, 7, 6, 4), "deep": lambda: network(5, 4, 4, 4, 4, 3), "conv": convolutional}


def core_for(module: nn.Module, at: Constants, loss: Any = None, engine: str = "auto") -> AltMin:
    return AltMin(
        CodedNetwork(module, engine),
        nn.CrossEntropyLoss() if loss is None else loss,
        objective=AltMinObjective(mu=at.mu, lambda_c=at.lambda_c),
        codes=GradientCodes(at.steps, at.lr, at.momentum, at.nesterov),
    )


def moved_codes(core: AltMin, x: Tensor, y: Any) -> tuple[list[Tensor], list[Tensor]]:
    step = core.encode(x, y)
    core.solve_codes(step)
    return step.codes_forward, step.codes


def assert_close(ours: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12) -> None:
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("engine", ["closed_form", "autograd"])
@pytest.mark.parametrize("at", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS.keys())
def test_the_sweep_descends_the_objective(make: Any, at: Constants, engine: str) -> None:
    """Catches a lost or flipped term, a mean for a sum, a wrong rate or momentum, and a sweep in the wrong order.

    (Each code must see the already moved code above it, and forward codes below.)
    """
    module = make()
    x, y = batch(module)
    forward, moved = moved_codes(core_for(module, at, engine=engine), x, y)
    expected_forward, expected = sweep(stage_functions(module), x, y, cross_entropy_total, at)
    assert_close(forward, expected_forward)
    assert_close(moved, expected)
    assert all(not torch.equal(a, b) for a, b in zip(forward, moved, strict=True))


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_by_hand(nesterov: bool) -> None:
    """Catches a wrong recurrence: on a quadratic in one number, three steps are unrolled with pen and paper.

    f(c) = c, so the gradient of J / mu at c for the loss (c - 1)^2 and mu = 1 is 2 (c - 1) + (c - c0), c0 = 3.
    """
    module = nn.Sequential(nn.Linear(1, 1), nn.Identity(), nn.Linear(1, 1)).double()
    with torch.no_grad():
        for layer in (module[0], module[2]):
            layer.weight.fill_(1.0)
            layer.bias.fill_(0.0)
    at = Constants(mu=1.0, steps=3, lr=0.1, momentum=0.2, nesterov=nesterov)
    start = torch.tensor([[3.0]], dtype=torch.float64)
    _, (code,) = moved_codes(core_for(module, at, nn.MSELoss()), start, torch.ones(1, 1, dtype=torch.float64))
    if nesterov:
        # g1 = 4, v1 = 4, c = 3 - .1 (4 + .8) = 2.52; g2 = 3.04 - .48 = 2.56, v2 = 3.36, c = 2.52 - .1 (2.56 + .672) =
        # 2.1968; g3 = 2.3936 - .8032 = 1.5904, v3 = 2.2624, c = 2.1968 - .1 (1.5904 + .45248) = 1.992512
        assert float(code) == pytest.approx(1.992512, abs=1e-14)
    else:
        # g1 = 4, v1 = 4, c = 2.6; g2 = 3.2 - .4 = 2.8, v2 = 3.6, c = 2.24; g3 = 2.48 - .76 = 1.72, v3 = 2.44, c = 1.996
        assert float(code) == pytest.approx(1.996, abs=1e-14)


@pytest.mark.parametrize("at", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(torch.tensor([1.0, 3.0, 0.5, 2.0]), label_smoothing=0.1)])
def test_a_samples_codes_do_not_depend_on_its_batch(at: Constants, loss: nn.Module) -> None:
    """Catches any mean over the batch in the code step: the halves of a batch give the codes of the whole."""
    module = convolutional()
    x, y = batch(module, 7)
    core = core_for(module, at, loss.double())
    _, whole = moved_codes(core, x, y)
    _, first = moved_codes(core, x[:2], y[:2])
    _, rest = moved_codes(core, x[2:], y[2:])
    assert_close([torch.cat(parts) for parts in zip(first, rest, strict=True)], whole)


@pytest.mark.parametrize("mu", [1e-3, 1.0, 1e3])
def test_hidden_codes_move_at_rate_lr_for_every_mu(mu: float) -> None:
    """Catches a rate of lr instead of lr / mu: in a linear network one plain step moves the lower code by
    lr * W^T (move of the code above), whatever mu is, so that the signal does not shrink with mu on its way down.
    """
    module = network(5, 6, 6, 4, activation=nn.Identity)
    x, y = batch(module)
    (below, top), (below_moved, top_moved) = moved_codes(core_for(module, Constants(mu=mu)), x, y)
    expected = 0.7 * (top_moved - top) @ module[2].weight.detach()
    torch.testing.assert_close(below_moved - below, expected, rtol=1e-9, atol=1e-12)


@given(
    seed=st.integers(0, 2**31),
    widths=st.lists(st.integers(2, 6), min_size=3, max_size=6),
    mu=st.floats(1e-3, 10.0),
    lambda_c=st.sampled_from([0.0, 0.0, 1e-2]),
    activation=st.sampled_from([nn.Tanh, nn.Sigmoid, nn.SiLU, nn.Softplus]),
)
@settings(max_examples=60, deadline=None)
def test_no_code_raises_the_objective(
    seed: int, widths: list[int], mu: float, lambda_c: float, activation: type[nn.Module]
) -> None:
    """Catches ascent in any term: for a step well below the inverse curvature, J falls with every code of the sweep.

    The l1 term is left out of the bound where a code may cross zero, by a step that is small against every entry.
    """
    torch.manual_seed(seed)
    module = network(*widths, activation=activation)
    x, y = batch(module, 3)
    functions = stage_functions(module)
    at = Constants(mu=mu, lambda_c=lambda_c, lr=1e-6 * min(1.0, mu))
    core = core_for(module, at)
    step = core.encode(x, y)
    with torch.no_grad():
        value = objective(functions, x, y, step.codes, cross_entropy_total, at)
        for problem, level in core.code_problems(step):
            crossed = step.codes[level].sign()
            step.moves[level] = core.codes.solve(problem)
            after = objective(functions, x, y, step.codes, cross_entropy_total, at)
            if lambda_c == 0 or torch.equal(crossed, step.codes[level].sign()):
                assert after <= value + 1e-12 * max(1.0, float(value))
            value = after


def test_the_problem_of_a_code_is_its_part_of_the_objective() -> None:
    """Catches a value (for monitors and line searches) that is not the objective: differences of both must agree."""
    at = Constants(mu=0.4, lambda_c=0.03)
    module = network(5, 7, 6, 4)
    x, y = batch(module)
    functions = stage_functions(module)
    core = core_for(module, at)
    step = core.encode(x, y)
    with torch.no_grad():
        for problem, level in core.code_problems(step):
            move = torch.randn_like(step.moves[level])
            before = objective(functions, x, y, step.codes, cross_entropy_total, at)
            step.moves[level] = move
            after = objective(functions, x, y, step.codes, cross_entropy_total, at)
            difference = problem.value(move) - problem.value()
            torch.testing.assert_close(difference, after - before, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("reference", [False, True])
def test_gradients_are_those_of_the_values(reference: bool) -> None:
    """Catches an objective (the reference preset too) whose gradient and value tell different stories."""
    make = AltMinObjective.reference if reference else AltMinObjective
    module = network(5, 7, 6, 4)
    x, y = batch(module)
    core = AltMin(
        CodedNetwork(module, "autograd"), nn.CrossEntropyLoss(), objective=make(mu=0.2, lambda_c=0.07, lambda_w=0.0)
    )
    step = core.encode(x, y)
    for problem, _ in core.code_problems(step):
        stage = nn.Sequential(*problem.above.modules)
        code = (problem.forward + 0.3 * torch.randn_like(problem.forward)).requires_grad_()
        output = stage(code)
        objective_ = core.objective
        value = objective_.code_anchor_value(code - problem.forward) + objective_.code_sparsity_value(code)
        if problem.is_top:
            value = value + objective_.code_loss_value(problem.loss.elsewhere(output))
        else:
            value = value + objective_.code_coupling_value(output - problem.target)
        (expected,) = torch.autograd.grad(value / 0.2, code)
        with torch.no_grad():
            torch.testing.assert_close(
                problem.gradient(code.detach() - problem.forward), expected, rtol=1e-12, atol=1e-12
            )


def test_the_code_step_leaves_parameters_and_gradients_alone() -> None:
    """Catches a code step that fills .grad, or needs a graph through the parameters."""
    for engine in ("closed_form", "autograd"):
        module = network(5, 7, 6, 4)
        x, y = batch(module)
        before = [p.detach().clone() for p in module.parameters()]
        moved_codes(core_for(module, Constants(steps=3), engine=engine), x, y)
        assert all(p.grad is None for p in module.parameters())
        assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))


def test_forward_codes_survive_the_code_step() -> None:
    """Catches a solver that moves the forward code, the anchor, in place."""
    module = network(5, 7, 6, 4)
    x, y = batch(module)
    core = core_for(module, Constants(steps=5, momentum=0.9))
    step = core.encode(x, y)
    kept = [code.clone() for code in step.codes_forward]
    core.solve_codes(step)
    assert all(torch.equal(a, b) for a, b in zip(step.codes_forward, kept, strict=True))


def test_batch_norm_is_a_fixed_affine_map_in_the_code_step() -> None:
    """Catches batch statistics recomputed at moved codes: the oracle's map has the statistics of the forward pass."""
    module = nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)
    ).double()
    with torch.no_grad():
        for norm in (module[1], module[4]):
            norm.weight.uniform_(0.5, 2.0)
            norm.bias.normal_()
    x = torch.randn(6, 4, dtype=torch.float64)
    y = torch.randint(3, (6,))

    def fixed(linear: nn.Linear, norm: nn.BatchNorm1d, inputs: Tensor) -> Any:
        h = linear(inputs).detach()
        mean, deviation = h.mean(0), (h.var(0, correction=0) + norm.eps).sqrt()
        return lambda c: (linear(c) - mean) / deviation * norm.weight + norm.bias

    first = fixed(module[0], module[1], x)
    second_affine = fixed(module[3], module[4], torch.tanh(first(x)))
    functions = [first, lambda c: second_affine(torch.tanh(c)), lambda c: module[6](torch.tanh(c))]
    at = Constants(mu=0.3, steps=3, lr=0.5, momentum=0.5)
    for engine in ("closed_form", "autograd"):
        _, moved = moved_codes(core_for(module, at, engine=engine), x, y)
        _, expected = sweep(functions, x, y, cross_entropy_total, at)
        assert_close(moved, [code.detach() for code in expected], 1e-11)


def test_a_solver_of_ones_own_sees_the_problem_and_only_moves_codes() -> None:
    """Catches a sweep that ignores the solver: one that halves each code must leave halved codes, top code first."""
    from lightning_altmin import CodeSolver
    from lightning_altmin.codes import CodeProblem

    targets: list[bool] = []

    class Halve(CodeSolver):
        def solve(self, problem: CodeProblem) -> Tensor:
            targets.append(problem.is_top)
            if not problem.is_top:
                assert problem.target.shape == problem.forward_output.shape
                torch.testing.assert_close(problem.target, problem.forward_output / 2)
            return -problem.forward / 2

    module = network(5, 7, 6, 4)
    x, y = batch(module)
    core = AltMin(module, nn.CrossEntropyLoss(), codes=Halve())
    forward, moved = moved_codes(core, x, y)
    assert targets == [True, False]
    assert_close(moved, [code / 2 for code in forward])


def test_the_top_code_is_judged_by_the_loss_alone() -> None:
    """Catches a solver that pulls the network's output towards itself; codes below have the moved code above."""
    module = network(5, 7, 6, 4)
    core = core_for(module, Constants())
    x, y = batch(module)
    step = core.encode(x, y)
    core.solve_codes(step)
    (top, _), (below, level) = core.code_problems(step)
    assert (top.is_top, below.is_top) == (True, False)
    torch.testing.assert_close(below.target, step.codes[level + 1], rtol=0, atol=0)
    with pytest.raises(ValueError, match="the top code has no target: the stage above it is judged by the loss"):
        _ = top.target
