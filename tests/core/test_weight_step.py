"""Oracle: autograd of each stage's own problem, written out. Stages are independent; inner steps evaluate anew."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_altmin import AltMin, AltMinObjective, CodedNetwork, GradientCodes, LocalGradient, Step
from tests.core.written_out import batch, convolutional, network, stage_functions

MU, LAMBDA_W = 0.3, 0.02
NETWORKS = {"mlp": lambda: network(5, 7, 6, 4), "conv": convolutional}


def sgd(rate: float) -> Any:
    return lambda params: torch.optim.SGD(params, lr=rate)


def core_for(module: nn.Module, loss: Any, engine: str = "auto", lambda_w: float = 0.0, **weights: Any) -> AltMin:
    return AltMin(
        CodedNetwork(module, engine),
        loss,
        objective=AltMinObjective(mu=MU, lambda_w=lambda_w),
        codes=GradientCodes(steps=2, lr=0.8),
        weights=LocalGradient(**weights),
    )


def solved(core: AltMin, x: Tensor, y: Any) -> Step:
    step = core.encode(x, y)
    core.solve_codes(step)
    return step


def local_problem(module: nn.Module, inputs: Tensor, target: Tensor, mu: float) -> Tensor:
    """Batch mean of mu/2 ||target - f(input)||^2, features summed."""
    return mu / 2 * (target - module(inputs)).pow(2).sum() / len(inputs)


@pytest.mark.parametrize("engine", ["closed_form", "autograd"])
@pytest.mark.parametrize("inputs", ["moved", "forward"])
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS.keys())
def test_each_stage_descends_its_own_problem_and_nothing_else(make: Any, inputs: Any, engine: str) -> None:
    """Catches a mean over features, a wrong input (x for code, forward for moved), and an output stage at the wrong
    code; the oracle differentiates one problem at a time, with all other losses absent.
    """
    module = make()
    x, y = batch(module)
    core = core_for(module, nn.CrossEntropyLoss(), engine, inputs=inputs)
    step = solved(core, x, y)
    core.fill_gradients(step)
    stages = stage_functions(module)
    below = [x, *(step.codes if inputs == "moved" else step.codes_forward)]
    for level, stage in enumerate(stages):
        if level < len(step.codes):
            value = local_problem(stage, below[level], step.codes[level], MU)
        else:
            value = nn.functional.cross_entropy(stage(below[level]), y)
        parameters = list(stage.parameters())
        for parameter, expected in zip(parameters, torch.autograd.grad(value, parameters), strict=True):
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("engine", ["closed_form", "autograd"])
def test_lambda_w_pulls_weights_and_spares_biases(engine: str) -> None:
    """Catches an l1 term on biases or batch norm scales, one averaged over entries, or one with the wrong sign."""
    module = nn.Sequential(
        nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)
    ).double()
    x, y = batch(module)
    gradients = []
    for lambda_w in (0.0, LAMBDA_W):
        twin = copy.deepcopy(module)
        core = core_for(twin, nn.CrossEntropyLoss(), engine, lambda_w)
        core.fill_gradients(solved(core, x, y))
        gradients.append({name: p.grad for name, p in twin.named_parameters()})
    for name, parameter in module.named_parameters():
        pull = LAMBDA_W * parameter.detach().sign() if name in ("0.weight", "3.weight", "5.weight") else 0.0
        torch.testing.assert_close(gradients[1][name], gradients[0][name] + pull, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("inputs", ["moved", "forward"])
@pytest.mark.parametrize("steps", [2, 4])
def test_inner_steps_evaluate_the_problem_anew(steps: int, inputs: Any) -> None:
    """Catches inner steps that reuse encode's outputs or the first gradient: K plain SGD steps are unrolled here."""
    module, rate = network(5, 7, 6, 4), 0.4
    x, y = batch(module)
    core = core_for(module, nn.CrossEntropyLoss(), optimizer=sgd(rate), steps=steps, inputs=inputs)
    expected = copy.deepcopy(module)
    step = solved(core_for(copy.deepcopy(module), nn.CrossEntropyLoss(), inputs=inputs), x, y)
    below = [x, *(step.codes if inputs == "moved" else step.codes_forward)]
    stages = stage_functions(expected)
    for _ in range(steps):
        for level, stage in enumerate(stages):
            hidden = level < len(step.codes)
            value = (
                local_problem(stage, below[level], step.codes[level], MU)
                if hidden
                else nn.functional.cross_entropy(stage(below[level]), y)
            )
            parameters = list(stage.parameters())
            with torch.no_grad():
                for parameter, gradient in zip(parameters, torch.autograd.grad(value, parameters), strict=True):
                    parameter -= rate * gradient
    core.step(x, y)
    for ours, theirs in zip(module.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("engine", ["closed_form", "autograd"])
def test_batch_norm_is_differentiated_through_its_statistics(engine: str) -> None:
    """Catches a weight step that holds encode's statistics fixed, uses running ones, or touches them again."""
    module = nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)
    ).double()
    plain = copy.deepcopy(module)
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))
    plain(x)  # one forward pass of plain PyTorch is all that running statistics may see of a batch
    core = core_for(module, nn.CrossEntropyLoss(), engine)
    step = solved(core, x, y)
    core.fill_gradients(step)
    for ours, expected in zip(module.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-14, atol=1e-14)
    frozen = copy.deepcopy(module)
    first, second = nn.Sequential(*frozen[:2]), nn.Sequential(*frozen[2:5])
    values = [
        local_problem(first, x, step.codes[0], MU),
        local_problem(second, step.codes[0], step.codes[1], MU),
        nn.functional.cross_entropy(frozen[5:](step.codes[1]), y),
    ]
    expected = torch.autograd.grad(sum(values), list(frozen.parameters()))
    for parameter, gradient in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("engine", ["auto", "autograd"])
def test_running_statistics_after_a_whole_step(engine: str) -> None:
    """Catches a whole step, with several code and weight steps, that updates running statistics more than once."""
    module = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)).double()
    plain = copy.deepcopy(module)
    core = core_for(module, nn.CrossEntropyLoss(), engine, steps=3)
    for _ in range(2):
        x, y = torch.randn(5, 1, 6, 6, dtype=torch.float64), torch.randint(4, (5,))
        plain.load_state_dict({**plain.state_dict(), **dict(module.named_parameters())})
        plain(x)
        core.step(x, y)
    buffers = dict(plain.named_buffers())
    assert int(buffers["1.num_batches_tracked"]) == 2
    for name, buffer in module.named_buffers():
        torch.testing.assert_close(buffer, buffers[name], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("engine", ["closed_form", "autograd"])
def test_frozen_parameters_stay_as_they_are(engine: str) -> None:
    """Catches training of requires_grad=False, or a frozen layer that stops the layers around it from training."""
    module = network(5, 7, 6, 6, 4)
    for parameter in (*module[2].parameters(), module[4].bias):
        parameter.requires_grad_(False)
    x, y = batch(module)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    core = core_for(module, nn.CrossEntropyLoss(), engine)
    for _ in range(3):
        core.step(x, y)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name]) == (name in ("2.weight", "2.bias", "4.bias"))
        assert parameter.grad is None


def test_gradients_add_up_and_step_clears_them() -> None:
    """Catches gradients that overwrite accumulated ones, and a step that leaves its gradients behind."""
    module = network(5, 7, 4)
    x, y = batch(module)
    core = core_for(module, nn.CrossEntropyLoss())
    step = solved(core, x, y)
    core.fill_gradients(step)
    once = [p.grad.clone() for p in module.parameters()]
    core.fill_gradients(step)
    for parameter, gradient in zip(module.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient, rtol=1e-15, atol=0)
    module.zero_grad()
    core.step(x, y)
    assert all(p.grad is None for p in module.parameters())


def test_what_a_step_reports() -> None:
    """Catches a loss taken after the update, a residual of the wrong input, or codes of the wrong shape."""
    module = network(5, 7, 6, 4)
    x, y = batch(module)
    kept = copy.deepcopy(module)
    core = core_for(module, nn.CrossEntropyLoss())
    result = core.step(x, y)
    with torch.no_grad():
        torch.testing.assert_close(result.output, kept(x), rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(result.loss, nn.functional.cross_entropy(kept(x), y), rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(result.codes_forward[1], kept[:3](x), rtol=1e-14, atol=1e-14)
        below = [x, result.codes[0]]
        for stage, inputs, code, residual in zip(
            stage_functions(kept), below, result.codes, result.residuals, strict=False
        ):
            expected = (stage(inputs) - code).pow(2).sum() / len(x)
            torch.testing.assert_close(residual, expected, rtol=1e-12, atol=1e-14)
    assert len(result.residuals) == len(result.codes) == 2
    assert [result.number, core.step(x, y).number] == [0, 1]
    torch.testing.assert_close(core(x), module(x))


def test_the_defaults_train() -> None:
    """Catches defaults that do not train: AltMin(network, loss) alone halves the loss on labels that can be learnt."""
    module = network(5, 32, 32, 4, activation=nn.ReLU)
    x, _ = batch(module, 64)
    y = x[:, :4].argmax(1)
    core = AltMin(module, nn.CrossEntropyLoss())
    losses = [float(core.step(x, y).loss) for _ in range(120)]
    assert losses[-1] < 0.5 * losses[0]


def test_a_weight_solver_of_ones_own() -> None:
    """Catches a step that ignores the solver: one that solves least squares outright must make the residual zero."""
    from lightning_altmin import WeightSolver
    from lightning_altmin.weights import WeightProblem

    class Newton(WeightSolver):
        def optimizer(self, stages: Any) -> torch.optim.Optimizer:
            return torch.optim.SGD([{"params": list(s.parameters()), "name": s.name} for s in stages], lr=1.0)

        def gradients(self, problem: WeightProblem) -> Any:
            if problem.move is None or problem.stage.name != "0":
                return []
            linear = problem.stage.affine[0]
            ones = torch.ones(len(problem.input), 1, dtype=problem.input.dtype)
            solution = torch.linalg.lstsq(torch.cat([problem.input, ones], 1), problem.target).solution
            return [(linear.weight, linear.weight - solution[:-1].t()), (linear.bias, linear.bias - solution[-1])]

    module = network(5, 7, 6, 4)
    x, y = batch(module, 4)  # fewer samples than inputs: the fit is exact
    kept = copy.deepcopy(module)
    core = AltMin(module, nn.CrossEntropyLoss(), weights=Newton())
    result = core.step(x, y)
    torch.testing.assert_close(module[0](x), result.codes[0], rtol=1e-9, atol=1e-9)
    assert torch.equal(module[2].weight, kept[2].weight)


def test_the_output_stage_has_the_losss_target() -> None:
    """Catches a solver of least squares that takes the output itself for its target: hidden stages have moved codes."""
    module = network(5, 7, 6, 4)
    core = core_for(module, nn.CrossEntropyLoss())
    step = solved(core, *batch(module))
    *hidden, output = core.weight_problems(step)
    for problem, code in zip(hidden, step.codes, strict=True):
        torch.testing.assert_close(problem.target, code, rtol=0, atol=0)
    with pytest.raises(ValueError, match="the output stage has no code: its target is the loss's"):
        _ = output.target
