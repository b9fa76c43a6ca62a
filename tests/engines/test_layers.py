"""Oracle: autograd. Every rule of the closed form, alone, agrees with the autograd engine to 1e-12 in float64."""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_altmin.engines import StageEngine, StageMap, closed_form, has_closed_form, stage_engine
from lightning_altmin.engines.closed_form import _CONDITIONS, _RULES, rule_for
from lightning_altmin.engines.rule import Point, Rule
from tests.engines.catalogue import ACTIVATIONS, CASES, TOLERANCE, Case, largest_difference


def encoded(module: nn.Module, x: Tensor) -> tuple[list[StageEngine], list[Any]]:
    """Both engines of a module and their states after encoding the same batch from the same random state."""
    engines = [stage_engine([module], kind) for kind in ("closed_form", "autograd")]
    random = torch.get_rng_state()
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    states, outputs = [], []
    for engine in engines:
        torch.set_rng_state(random)
        for name, buffer in module.named_buffers():
            buffer.copy_(buffers[name])
        output, state = engine.encode(x.clone())
        outputs.append(output)
        states.append(state)
    assert largest_difference(*outputs) <= TOLERANCE
    return engines, states


def assert_maps_agree(ours: StageMap, theirs: StageMap, grad: Tensor, parameters: bool) -> None:
    if parameters:
        expected = {id(p): g for p, g in theirs.parameter_gradients(grad)}
        got = {id(p): g for p, g in ours.parameter_gradients(grad)}
        assert got.keys() == expected.keys()
        for key in got:
            assert largest_difference(got[key], expected[key]) <= TOLERANCE
    assert largest_difference(ours.input_gradient(grad), theirs.input_gradient(grad)) <= TOLERANCE
    assert largest_difference(ours.output(), theirs.output()) <= TOLERANCE


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_each_rule_agrees_with_autograd(case: Case) -> None:
    """Catches a wrong derivative, option or padding in a rule, in the code step's view and in the weight step's."""
    module, x = case.module(), case.input()
    (ours, theirs), states = encoded(module, x)
    moved = x + 0.3 * torch.randn_like(x)  # the code step has moved the input since encode
    for at in (x, moved):
        for view in ("fixed", "live"):
            maps = [
                getattr(engine, view)(at.clone(), state) for engine, state in zip((ours, theirs), states, strict=True)
            ]
            grad = torch.randn_like(maps[1].output())
            assert_maps_agree(*maps, grad, parameters=view == "live")


@pytest.mark.parametrize("view", ["fixed", "live"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_changes_are_differences_of_outputs(case: Case, view: str) -> None:
    """Catches a change that leaves a term out (a bias, a mask, a shift of batch statistics), for moves of any size."""
    module, x = case.module(), case.input()
    (ours, _), (state, _) = encoded(module, x)
    base = getattr(ours, view)(x, state).output()
    for size in (1.0, 1e-3, 1e-9):
        move = size * torch.randn_like(x)
        at = getattr(ours, view)(x, state, move)
        assert largest_difference(at.change(base), at.output() - base) <= TOLERANCE


@pytest.mark.parametrize("view", ["fixed", "live"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_small_changes_keep_their_digits(case: Case, view: str) -> None:
    """Catches a difference of rounded outputs: a move far below the last bit of its code is passed on in full.

    The oracle is the derivative, by autograd in double precision.
    """
    module, x = case.module(), case.input()
    (_, theirs), (_, state64) = encoded(module, x)
    move = 1e-12 * torch.randn_like(x)
    where = x.clone().requires_grad_()
    outputs = lambda at: getattr(theirs, view)(at, state64)._evaluate(at)  # noqa: E731
    _, expected = torch.autograd.functional.jvp(outputs, where, move)
    single = copy.deepcopy(module).float()
    torch.manual_seed(0)
    engine = stage_engine([single], "closed_form")
    random = torch.get_rng_state()
    _, state = engine.encode(x.float())
    if any(isinstance(m, nn.modules.dropout._DropoutNd) for m in single.modules()):
        torch.set_rng_state(random)
        _, state64 = theirs.encode(x)  # the mask that single precision drew
        _, expected = torch.autograd.functional.jvp(outputs, where, move)
    base = getattr(engine, view)(x.float(), state)
    small = move.float()
    change = getattr(engine, view)(x.float(), state, small).change(base.output())
    assert float((change.detach().double() - expected).norm()) <= 1e-4 * float(expected.norm())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_derivatives_never_change_their_input(case: Case) -> None:
    """Catches an engine that works in place on a code (an in-place activation) or on a gradient it was handed."""
    module, x = case.module(), case.input()
    for kind in ("closed_form", "autograd"):
        engine = stage_engine([module], kind)
        kept = x.clone()
        output, state = engine.encode(x)
        assert torch.equal(x, kept)
        grad = torch.randn_like(output)
        kept_grad = grad.clone()
        for stage_map in (engine.fixed(x, state), engine.live(x, state)):
            stage_map.output()
            stage_map.input_gradient(grad)
        engine.live(x, state).parameter_gradients(grad)
        assert torch.equal(x, kept)
        assert torch.equal(grad, kept_grad)


@pytest.mark.parametrize("name", ["max-pool", "max-pool-left-over"])
def test_rules_for_a_compiler_agree_with_autograd(name: str) -> None:
    """Catches a fused pooling that takes another of equal entries, loses what fills no tile, or rounds small moves."""
    module = CASES[name].module()
    assert type(rule_for(module).compiled()) is not type(rule_for(module))
    for x in (CASES[name].input(), CASES[name].input().round()):  # the latter with many ties
        (ours, theirs), states = encoded(module, x)
        ours.suit_compiler()
        grad = torch.randn_like(theirs.fixed(x, states[1]).output())
        assert_maps_agree(ours.fixed(x, states[0]), theirs.fixed(x, states[1]), grad, parameters=False)
        for size in (1.0, 1e-3):
            move = size * torch.randn_like(x)
            maps = [engine.fixed(x, state, move) for engine, state in zip((ours, theirs), states, strict=True)]
            change = maps[0].change(theirs.fixed(x, states[1]).output())
            assert largest_difference(change, maps[1].output() - theirs.fixed(x, states[1]).output()) <= TOLERANCE
            assert_maps_agree(*maps, grad, parameters=False)
    x, move = CASES[name].input().float(), 1e-12 * CASES[name].input()
    engine = stage_engine([module], "closed_form")
    engine.suit_compiler()
    _, state = engine.encode(x)
    _, kept = stage_engine([module], "autograd").encode(x)
    base, at = engine.fixed(x, state), engine.fixed(x, state, move.float())
    # the move of the entry that was largest, where the gradient of a sum of outputs is one
    there = stage_engine([module], "autograd").fixed(x, kept).input_gradient(torch.ones_like(base.output())) > 0
    assert torch.equal(at.change(base.output()).flatten().sort().values, move.float()[there].sort().values)


@pytest.mark.parametrize("kind", ["closed_form", "autograd"])
@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d-all", "conv3d", "batch-norm-1d", "batch-norm-2d"])
def test_frozen_parameters_get_no_gradient(name: str, frozen: str, kind: str) -> None:
    """Catches gradients for requires_grad=False, and the other parameter losing or changing its own."""
    module, x = CASES[name].module(), CASES[name].input()
    engine = stage_engine([module], kind)
    output, state = engine.encode(x)
    grad = torch.randn_like(output)
    every = {id(p): g for p, g in engine.live(x, state).parameter_gradients(grad)}
    getattr(module, frozen).requires_grad_(False)
    rest = engine.live(x, state).parameter_gradients(grad)
    (kept,) = [p for p in module.parameters() if p.requires_grad]
    assert [id(p) for p, _ in rest] == [id(kept)]
    assert largest_difference(rest[0][1], every[id(kept)]) <= TOLERANCE
    kept.requires_grad_(False)
    assert engine.live(x, state).parameter_gradients(grad) == []


def test_the_catalogue_covers_every_rule() -> None:
    """Catches a new rule that nobody tests."""
    assert set(_RULES) == {type(case.make()) for case in CASES.values()}


def test_every_activation_is_used_beyond_its_linear_range() -> None:
    """Catches a catalogue whose inputs miss a branch (ReLU6 above 6, Softplus above its threshold)."""
    for make in ACTIVATIONS.values():
        module = make()
        x = torch.tensor([[-30.0, -3.0, -0.2, 0.0, 0.2, 0.9, 3.0, 5.9, 6.5, 30.0]], dtype=torch.float64)
        (ours, theirs), states = encoded(module, x)
        maps = [engine.fixed(x, state) for engine, state in zip((ours, theirs), states, strict=True)]
        assert_maps_agree(*maps, torch.randn_like(x), parameters=False)


class _Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    "module",
    [
        _Doubled(3, 2),
        nn.Conv2d(2, 3, 3, padding="same"),
        nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"),
        nn.MaxPool2d(2, return_indices=True),
        nn.ConvTranspose2d(2, 3, 3),
        nn.PReLU(),
        nn.Softmax(1),
    ],
    ids=lambda m: type(m).__name__,
)
def test_what_no_rule_covers_is_left_to_autograd(module: nn.Module) -> None:
    """Catches a rule that serves a subclass or an option whose mathematics it does not know."""
    assert not has_closed_form(module)
    assert stage_engine([nn.ReLU(), module]).kind == "autograd"
    with pytest.raises(ValueError, match="no rule"):
        stage_engine([module], "closed_form")


def test_a_module_with_hooks_is_left_to_autograd() -> None:
    """Catches a closed form that ignores a forward hook (as weight norm uses), which changes the result."""
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        linear = nn.Linear(3, 2)
        assert stage_engine([linear]).kind == "closed_form"
        getattr(linear, register)(lambda *args: None)
        assert stage_engine([linear]).kind == "autograd"


def test_a_module_with_a_forward_of_its_own_is_left_to_autograd() -> None:
    """Catches a closed form of the type's forward where the instance's was replaced: it is 2 W x, not W x."""
    linear = nn.Linear(3, 2, bias=False).double()
    linear.forward = MethodType(lambda self, x: 2 * x @ self.weight.t(), linear)  # type: ignore[method-assign]
    assert not has_closed_form(linear)
    with pytest.raises(ValueError, match="no rule"):
        stage_engine([linear], "closed_form")
    engine, x = stage_engine([linear]), torch.randn(4, 3, dtype=torch.float64)
    output, state = engine.encode(x)
    torch.testing.assert_close(output, 2 * x @ linear.weight.t(), rtol=0, atol=1e-14)
    gradient = engine.fixed(x, state).input_gradient(output)
    torch.testing.assert_close(gradient, 2 * output @ linear.weight, rtol=0, atol=1e-14)


def test_an_unknown_engine_is_refused() -> None:
    """Catches a misspelt engine being taken for the default."""
    with pytest.raises(ValueError, match="closed-form"):
        stage_engine([nn.Linear(3, 2)], "closed-form")


def test_rules_without_formulas_say_so() -> None:
    """Catches a half-written rule that silently returns nothing."""

    class Empty(Rule):
        pass

    rule = Empty(nn.Identity())
    with pytest.raises(TypeError, match="Empty must define forward"):
        rule.encode(torch.ones(1))
    with pytest.raises(TypeError, match="Empty must define input_gradient"):
        rule.input_gradient(torch.ones(1), None)
    assert rule.parameter_gradients(torch.ones(1), None) == []


def test_a_new_rule_is_one_registration() -> None:
    """Catches an engine that cannot be extended from outside: a rule for a new type serves it at once."""

    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x

    assert stage_engine([Square()]).kind == "autograd"

    @closed_form(Square, when=lambda m: True)
    class SquareRule(Rule):
        def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
            return x * x, None

        def input_gradient(self, grad: Tensor, at: Point) -> Tensor:
            return 2 * at.x * grad

    try:
        x = torch.randn(3, 4, dtype=torch.float64)
        (ours, theirs), states = encoded(Square(), x)
        maps = [engine.fixed(x, state) for engine, state in zip((ours, theirs), states, strict=True)]
        assert_maps_agree(*maps, torch.randn_like(x), parameters=False)
    finally:
        del _RULES[Square], _CONDITIONS[Square]


def test_a_common_part_of_the_moves_costs_batch_norm_no_digits() -> None:
    """Catches a change of the variance that rounds with the moves' mean, which a BatchNorm does not see at all, and not
    with their deviation from it: in single precision, inputs around 10 that all move by about 1.
    """
    norm = nn.BatchNorm1d(4)
    x, move = 10 + torch.randn(256, 4), 1 + 1e-3 * torch.randn(256, 4)
    with torch.no_grad():
        engine = stage_engine([norm], "closed_form")
        _, state = engine.encode(x)
        change = engine.live(x, state, move).change(None)
        exact = nn.BatchNorm1d(4).double()
        expected = exact(x.double() + move.double()) - exact(x.double())
    error = (change - expected).norm() / expected.norm()
    # move and input have 24 digits each: what is left of a deviation of 1e-3 beside 1 and 10 is good to some 1e-5
    assert error < 1e-4
