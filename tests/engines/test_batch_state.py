"""What a batch fixes: BatchNorm's statistics, updated once and equal to PyTorch's; one random draw in all phases."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_altmin.engines import SharedSamples, StageEngine, StageMap, stage_engine
from lightning_altmin.stage import Stage
from tests.engines.catalogue import CASES, Case, largest_difference

ENGINES = ["closed_form", "autograd"]
NORMS = {name: case for name, case in CASES.items() if name.startswith("batch-norm")}


def use_everywhere(engine: StageEngine, x: Tensor, state: Any, steps: int = 3) -> None:
    """What the code step and the weight step do with a stage after encode."""
    for _ in range(steps):
        for view in (engine.fixed, engine.live):
            at = view(x + torch.randn_like(x), state)
            at.input_gradient(torch.ones_like(at.output()))
        live = engine.live(x + torch.randn_like(x), state)
        live.parameter_gradients(torch.ones_like(live.output()))


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("case", NORMS.values(), ids=NORMS.keys())
def test_running_statistics_are_updated_once_and_as_pytorch_does(case: Case, kind: str) -> None:
    """Catches statistics updated again in the code or weight step (as in the official code), by moved codes, by a
    wrong momentum, or not at all; three batches, so that momentum=None averages.
    """
    module = case.module()
    twin = copy.deepcopy(module)
    engine = stage_engine([module], kind)
    for _ in range(3):
        x = case.input() + torch.randn(1, dtype=torch.float64)
        twin(x)
        _, state = engine.encode(x)
        use_everywhere(engine, x, state)
    assert module.state_dict().keys() == twin.state_dict().keys()
    for ours, expected in zip(module.buffers(), twin.buffers(), strict=True):
        assert largest_difference(ours.double(), expected.double()) <= 1e-14
    assert [m.training for m in module.modules()] == [m.training for m in twin.modules()]
    assert getattr(module, "track_running_stats", None) == getattr(twin, "track_running_stats", None)


class Block(nn.Module):
    """A block only autograd can serve, with a BatchNorm and noise inside."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.drop = nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.norm(self.layer(x)))


def test_statistics_inside_a_block_are_updated_once() -> None:
    """Catches the same inside a module that is opaque to the closed form."""
    block = Block().double()
    twin = copy.deepcopy(block)
    engine = stage_engine([block])
    assert engine.kind == "autograd"
    for seed in range(3):
        x = torch.randn(6, 5, dtype=torch.float64)
        torch.manual_seed(seed)
        twin(x)
        torch.manual_seed(seed)
        _, state = engine.encode(x)
        use_everywhere(engine, x, state)
    for ours, expected in zip(block.buffers(), twin.buffers(), strict=True):
        assert largest_difference(ours.double(), expected.double()) <= 1e-14


def test_a_batch_norm_used_twice_in_a_stage_is_refused() -> None:
    """Catches the second use's statistics silently standing in for the first's in the code step."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.layer(self.norm(x)))

    with pytest.raises(ValueError, match="more than once"):
        stage_engine([Twice()]).encode(torch.randn(4, 3))


class Written(nn.Module):
    """A mean that moves with each batch, taken from it: by writing to its buffer, or by setting a new one."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("mean", None if how == "first" else torch.zeros(4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if self.mean is None:
            self.mean = x.detach().mean(0)
        elif self.how == "written":
            self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        elif self.how == "written past autograd":
            self.mean.data.mul_(0.9).add_(0.1 * x.detach().mean(0))
        else:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


@pytest.mark.parametrize("how", ["written", "written past autograd", "replaced", "first"])
def test_every_phase_starts_from_encodes_buffers(how: str) -> None:
    """Catches later phases that run a block from where encode left its buffers, one update further, and advance them.

    By hand: the mean m becomes 0.9 m + 0.1 x.mean(0), and x - m has the gradient of x. A batch encoded in parts has
    a mean for each.
    """
    engine = stage_engine([Written(how)])
    module, expected = engine._modules[0], torch.zeros(4, dtype=torch.float64)
    states, outputs, inputs = [], [], []
    for number in range(3):
        x = torch.randn(6, 4, dtype=torch.float64) + 3
        expected = x.mean(0) if how == "first" and number == 0 else expected
        expected = expected if how == "first" and number == 0 else 0.9 * expected + 0.1 * x.mean(0)
        output, state = engine.encode(x)
        torch.testing.assert_close(output, x - expected, rtol=0, atol=1e-14)
        for view in (engine.fixed, engine.live):
            assert torch.equal(view(x, state).output(), output)
            assert torch.equal(view(x, state).input_gradient(2 * x), 2 * x)
        use_everywhere(engine, x, state)
        torch.testing.assert_close(module.mean, expected, rtol=0, atol=1e-14)
        states.append(state)
        outputs.append(output)
        inputs.append(x)
    whole = engine.fixed(torch.cat(inputs), engine.joined(states))
    assert torch.equal(whole.output(), torch.cat(outputs))
    torch.testing.assert_close(module.mean, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("how", ["written", "replaced"])
def test_a_block_that_writes_buffers_moves_all_samples_by_one_factor(how: str) -> None:
    """Catches small moves lengthened by a factor for each sample where samples meet in a buffer.

    By hand: x + d - 0.1 (x + d).mean(0) changes by d - 0.1 d.mean(0), though one sample's d is a thousand times longer.
    """
    engine = stage_engine([Written(how)])
    x = torch.randn(6, 4, dtype=torch.float64)
    move = 1e-12 * torch.randn_like(x)
    move[0] *= 1000
    output, state = engine.encode(x)
    for view in (engine.fixed, engine.live):
        change = view(x, state, move).change(output)
        expected = move - 0.1 * move.mean(0)
        torch.testing.assert_close(change, expected, rtol=0, atol=1e-6 * float(move.abs().max()))


DROPOUTS = {n: c for n, c in CASES.items() if n.startswith("dropout") and n not in ("dropout-eval", "dropout-nothing")}


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("case", DROPOUTS.values(), ids=DROPOUTS.keys())
def test_one_mask_in_all_phases(case: Case, kind: str) -> None:
    """Catches a new mask in the code or weight step: with x = 1 the output and the gradient are both the mask."""
    engine = stage_engine([case.module()], kind)
    ones = torch.ones(case.shape, dtype=torch.float64)
    mask, state = engine.encode(ones)
    assert set(mask.unique().tolist()) <= {0.0, 1 / (1 - 0.4)}
    torch.rand(3)  # somebody else uses the generator meanwhile
    before = torch.get_rng_state()
    for view in (engine.fixed, engine.live):
        at = view(2 * ones, state)
        assert torch.equal(at.output(), 2 * mask)
        assert torch.equal(at.input_gradient(3 * ones), 3 * mask)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ENGINES)
def test_a_new_batch_gets_a_new_mask_and_pytorchs_own(kind: str) -> None:
    """Catches a mask kept from batch to batch, and a stream of random numbers that differs from plain PyTorch's."""
    module = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5))
    engine = stage_engine(list(module), kind)
    x = torch.randn(8, 8)
    random = torch.get_rng_state()
    first, second = engine.encode(x)[0], engine.encode(x)[0]
    assert not torch.equal(first, second)
    torch.set_rng_state(random)
    assert torch.equal(first, module(x))
    assert torch.equal(second, module(x))


class Noise(nn.Module):
    """A random module without a mask that anyone could keep."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.randn(x.shape, dtype=x.dtype)


def test_random_modules_without_a_mask_are_replayed() -> None:
    """Catches noise that changes between the phases of a batch, and phases that advance the generator."""
    engine = stage_engine([Noise(), nn.Tanh()])
    x = torch.ones(5, 4, dtype=torch.float64)
    output, state = engine.encode(x)
    before = torch.get_rng_state()
    for view in (engine.fixed, engine.live):
        assert torch.equal(view(x, state).output(), output)
        noise = torch.atanh(output)
        expected = (1 - output.square()) * noise
        torch.testing.assert_close(view(x, state).input_gradient(torch.ones_like(x)), expected, rtol=0, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(engine.encode(x)[0], output)


def test_the_change_to_another_input_needs_no_move() -> None:
    """Catches a change of zero, or one that reads a move that is not there: by hand, W x + b changes by W (y - x).

    Only closed forms must be told the move: by autograd it is the difference of two outputs.
    """
    layer = nn.Linear(5, 4).double()
    engine = stage_engine([layer], "autograd")
    x, y = torch.randn(2, 6, 5, dtype=torch.float64)
    output, state = engine.encode(x)
    for view in (engine.fixed, engine.live):
        change = view(y, state).change(output)
        torch.testing.assert_close(change, (y - x) @ layer.weight.detach().t(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ENGINES)
def test_parts_that_a_batch_norm_has_normalised_are_not_joined(kind: str) -> None:
    """Catches one part's statistics taken for those of the whole batch; with running statistics a part is as good."""
    norm = nn.BatchNorm1d(4).double()
    engine = stage_engine([nn.Linear(5, 4).double(), norm], kind)
    parts = list(torch.randn(2, 6, 5, dtype=torch.float64))
    (output, _), *_ = states = [engine.encode(part) for part in parts]
    with pytest.raises(ValueError, match=r"BatchNorm in training mode normalises by the whole batch"):
        engine.joined([state for _, state in states])
    torch.testing.assert_close(engine.fixed(parts[0], engine.joined([states[0][1]])).output(), output)
    norm.eval()
    states = [engine.encode(part) for part in parts]
    whole = engine.fixed(torch.cat(parts), engine.joined([state for _, state in states]))
    torch.testing.assert_close(whole.output(), torch.cat([output for output, _ in states]), rtol=1e-12, atol=1e-12)


class OwnEngine(StageEngine):
    """An engine that defines what it must and nothing else."""

    kind = "own"

    def __init__(self, modules: list[nn.Module]) -> None:
        self._by = stage_engine(modules, "autograd")

    def encode(self, x: Tensor) -> tuple[Tensor, Any]:
        return self._by.encode(x)

    def fixed(self, x: Tensor, state: Any, move: Tensor | None = None) -> StageMap:
        return self._by.fixed(x, state, move)

    def live(self, x: Tensor, state: Any, move: Tensor | None = None) -> StageMap:
        return self._by.live(x, state, move)


def test_an_engine_of_ones_own_refuses_what_it_does_not_define() -> None:
    """Catches a base class that guesses: one part's state for the whole, statistics of one process for those of all.

    A batch in one part, and statistics of this process alone, are what every engine has.
    """
    engine = OwnEngine([nn.Linear(5, 4), nn.BatchNorm1d(4)])
    states = [engine.encode(torch.randn(6, 5))[1] for _ in range(2)]
    assert engine.joined(states[:1]) is states[0]
    with pytest.raises(ValueError, match="OwnEngine does not define joined"):
        engine.joined(states)
    engine.share(None)
    with pytest.raises(ValueError, match="OwnEngine does not define share"):
        engine.share(Elsewhere(torch.randn(3, 4)))


class Elsewhere(SharedSamples):
    """A second process, whose samples are given; it is asked for moments only."""

    def __init__(self, x: Tensor) -> None:
        variance, mean = torch.var_mean(x, 0, correction=0)
        self._own = torch.cat([mean, variance, mean.new_tensor([float(len(x))])])

    def total(self, vector: Tensor) -> Tensor:
        raise AssertionError("no derivative is asked for")

    def rows(self, vector: Tensor) -> Tensor:
        return torch.stack([vector, self._own])


@pytest.mark.parametrize("kind", ENGINES)
def test_another_engine_shares_the_samples_that_the_one_before_has_shared(kind: str) -> None:
    """Catches a stage that, given another engine (as `verify` does), normalises by this process's samples alone."""
    here, there = torch.randn(6, 4, dtype=torch.float64), 3 + 2 * torch.randn(5, 4, dtype=torch.float64)
    norm = nn.BatchNorm1d(4).double()
    stage = Stage("0", [], [norm], is_output=False)
    stage.share(Elsewhere(there))
    stage.use_engine(kind)
    expected = copy.deepcopy(norm)(torch.cat([here, there]))[:6]
    torch.testing.assert_close(stage.encode(here)[0], expected.detach(), rtol=1e-10, atol=1e-10)
    stage.share(None)
    torch.testing.assert_close(stage.encode(here)[0], copy.deepcopy(norm)(here).detach(), rtol=1e-10, atol=1e-10)


def test_a_stage_whose_engine_refuses_to_share_goes_on_alone() -> None:
    """Catches a stage that says it shares its samples after the refusal, and takes the second attempt for granted."""
    stage = Stage("0", [], [nn.BatchNorm1d(4)], is_output=False)
    stage.engine = OwnEngine(stage.modules)
    samples = Elsewhere(torch.randn(3, 4))
    for _ in range(2):
        with pytest.raises(ValueError, match="OwnEngine does not define share"):
            stage.share(samples)
        assert not stage.mixes_processes
