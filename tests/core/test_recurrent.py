"""An Elman network as a chain of codes in time: each problem against autograd of the whole objective, written out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from lightning_altmin import (
    AltMin,
    AltMinObjective,
    CoactivationMemory,
    CodedRecurrentNetwork,
    CurvatureCodes,
    GradientCodes,
    LeastSquaresCodes,
    LineSearchCodes,
    LocalGradient,
    ProximalCodes,
    SequenceClassifier,
)
from lightning_altmin.nn import ElmanRNN, aligned
from lightning_altmin.parallel.cutting import refuse_uncuttable
from lightning_altmin.recurrent import RecurrentStage

F64 = torch.float64
LENGTHS = [5, 1, 3, 5]
MU = 0.6


def net(activation: str = "tanh", seed: int = 0, reads: int = 1) -> ElmanRNN:
    torch.manual_seed(seed)
    return ElmanRNN(3, 4, 2, activation, reads).double()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 5, 3, generator=generator, dtype=F64), torch.tensor([0, 1, 1, 0])


def sequences() -> list[Tensor]:
    x, _ = batch()
    return [sequence[:length] for sequence, length in zip(x, LENGTHS, strict=True)]


def cell(network: ElmanRNN, x: Tensor, below: Tensor | None) -> Tensor:
    """``W_x x + W_h s(c) + b`` from the two parts of the weight."""
    w_x, w_h = network.cell.weight[:, :3], network.cell.weight[:, 3:]
    driven = x @ w_x.t() + network.cell.bias
    return driven if below is None else driven + network.activation(below) @ w_h.t()


def objective(network: ElmanRNN, inputs: list[Tensor], y: Tensor, codes: list[list[Tensor]]) -> Tensor:
    """J summed over samples, each sequence by itself with its own codes: no padding, no batch, no shared code."""
    value = torch.zeros((), dtype=F64)
    for x, label, own in zip(inputs, y, codes, strict=True):
        below = None
        for step, code in zip(x, own, strict=True):
            value = value + MU / 2 * (code - cell(network, step, below)).square().sum()
            below = code
        output = network.head(torch.cat([network.activation(code) for code in own[-network.reads :]]))
        value = value + nn.functional.cross_entropy(output.unsqueeze(0), label.unsqueeze(0))
    return value


def own_codes(codes: list[Tensor], lengths: list[int]) -> list[list[Tensor]]:
    """The codes of each sequence: the last ones, for every sequence ends at the last step."""
    time = len(codes)
    return [[codes[t][i] for t in range(time - n, time)] for i, n in enumerate(lengths)]


INPUTS: dict[str, tuple[Any, list[int], int]] = {  # inputs, lengths, steps read
    "equal lengths": (lambda: batch()[0], [5, 5, 5, 5], 1),
    "lengths": (lambda: aligned(sequences()), LENGTHS, 1),
    "3 steps read": (lambda: batch()[0], [5, 5, 5, 5], 3),
    "all steps read": (lambda: batch()[0], [5, 5, 5, 5], 5),
}


@pytest.mark.parametrize("engine", ["closed_form", "autograd"])
@pytest.mark.parametrize("activation", ["tanh", "relu", "sigmoid"])
@pytest.mark.parametrize("kind", ["equal lengths", "lengths"])
def test_forward_inputs_and_rate_one_are_backprop_through_time(kind: str, activation: str, engine: str) -> None:
    """Catches any lost factor, step or sequence in the chain: all of them would have to cancel to pass."""
    network, (_, y) = net(activation), batch()
    x = INPUTS[kind][0]()
    core = AltMin(
        CodedRecurrentNetwork(network, engine),
        nn.CrossEntropyLoss(),
        AltMinObjective(mu=MU),
        GradientCodes(steps=1, lr=1.0),
        LocalGradient(inputs="forward"),
    )
    step = core.encode(x, y)
    core.solve_codes(step)
    core.fill_gradients(step)
    expected = torch.autograd.grad(nn.functional.cross_entropy(network(x), y), list(network.parameters()))
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("engine", ["closed_form", "autograd"])
@pytest.mark.parametrize("kind", INPUTS)
def test_every_code_problem_has_the_gradient_and_value_of_the_whole_objective(kind: str, engine: str) -> None:
    """Catches a problem with a wrong neighbour: each is dJ/dc_t with later codes moved and earlier ones as they were.

    Where a short sequence has not begun there is no code, and its gradient is zero.
    """
    make, lengths, reads = INPUTS[kind]
    network, (_, y), x = net(reads=reads), batch(), make()
    core = AltMin(CodedRecurrentNetwork(network, engine), nn.CrossEntropyLoss(), AltMinObjective(mu=MU))
    step = core.encode(x, y)
    inputs = [sequence[5 - n :, -3:] for sequence, n in zip(x, lengths, strict=True)]
    torch.manual_seed(2)
    for problem, level in core.code_problems(step):
        at = 0.3 * torch.randn_like(step.codes_forward[level])
        codes = [c + m for c, m in zip(step.codes_forward, step.moves, strict=True)]
        codes[level] = (step.codes_forward[level] + at).requires_grad_()
        value = objective(network, inputs, y, own_codes(codes, lengths))
        (expected,) = torch.autograd.grad(value, codes[level])
        begun = torch.tensor([level >= 5 - n for n in lengths]).unsqueeze(1)
        assert torch.equal(expected.ne(0).any(1), begun.squeeze(1))
        with torch.no_grad():
            found = problem.gradient(at) * MU
            torch.testing.assert_close(found * begun, expected, rtol=1e-10, atol=1e-12)
            # zero at the forward code, from where a solver starts, so that it never moves before the beginning
            assert bool((problem.gradient() * ~begun == 0).all())
            step.moves[level] = 0.3 * torch.randn_like(at) * begun


@pytest.mark.parametrize("engine", ["closed_form", "autograd"])
@pytest.mark.parametrize("kind", INPUTS)
def test_shared_weights_get_the_gradient_of_the_whole_objective(kind: str, engine: str) -> None:
    """Catches a step left out of the sum over time, a mean over steps, padding that counts, or unmoved inputs."""
    make, lengths, reads = INPUTS[kind]
    network, (_, y), x = net(reads=reads), batch(), make()
    core = AltMin(
        CodedRecurrentNetwork(network, engine), nn.CrossEntropyLoss(), AltMinObjective(mu=MU), GradientCodes(3, 0.4)
    )
    step = core.encode(x, y)
    core.solve_codes(step)
    core.fill_gradients(step)
    inputs = [sequence[5 - n :, -3:] for sequence, n in zip(x, lengths, strict=True)]
    value = objective(network, inputs, y, own_codes(step.codes, lengths)) / 4
    expected = torch.autograd.grad(value, list(network.parameters()))
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reads", [1, 2, 5])
def test_shares_of_a_plain_step_are_divided_out_step_by_step(reads: int) -> None:
    """Catches one share for all times, and a loss out of proportion to what comes through the next step.

    At forward inputs the result is again backprop's, whatever the rates; where a step is read by two, the loss is that
    at later codes moved, so the share must be small.
    """
    network, (x, y), share = net(reads=reads), batch(), 0.3 if reads == 1 else 1e-6
    core = AltMin(network, nn.CrossEntropyLoss(), codes=CurvatureCodes(share), weights=LocalGradient(inputs="forward"))
    expected = torch.autograd.grad(nn.functional.cross_entropy(network(x), y), list(network.parameters()))
    step = core.encode(x, y)
    core.solve_codes(step)
    core.fill_gradients(step)
    assert float(step.signals[0] / step.signals[-1]) == pytest.approx(share**4)
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10 if reads == 1 else 1e-4, atol=1e-12)


def test_a_share_below_all_numbers_gives_no_nan() -> None:
    """Catches 0 / 0 where nothing has arrived at the first of many steps."""
    torch.manual_seed(0)
    core = AltMin(ElmanRNN(1, 4, 2), nn.CrossEntropyLoss(), codes=CurvatureCodes(share=0.01))
    core.step(torch.randn(3, 200), torch.tensor([0, 1, 1]))
    assert all(bool(p.isfinite().all()) for p in core.network.parameters())


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("activation", ["tanh", "gelu"])
def test_verify_compares_every_step(kind: str, activation: str) -> None:
    """Catches engines that differ, and a check that leaves out a code."""
    core = AltMin(net(activation, reads=INPUTS[kind][2]), nn.CrossEntropyLoss())
    assert core.coded.stages[0].engine.kind == "closed_form"
    result = core.verify(INPUTS[kind][0](), batch()[1])
    assert result.largest <= 1e-12
    assert sum(quantity == "code gradient, moved" for _, quantity, _ in result.differences) == 5


@pytest.mark.parametrize(
    "codes", [CurvatureCodes, GradientCodes, LineSearchCodes, ProximalCodes], ids=lambda c: c.__name__
)
@pytest.mark.parametrize("weights", [LocalGradient, CoactivationMemory], ids=lambda w: w.__name__)
def test_solvers_train_it(codes: Any, weights: Any) -> None:
    """Catches a solver that keeps something per layer and is confused by many codes of one layer."""
    torch.manual_seed(0)
    x, y = torch.randn(32, 6, 3), torch.randint(2, (32,))
    core = AltMin(ElmanRNN(3, 12, 2), nn.CrossEntropyLoss(), codes=codes(), weights=weights())
    losses = [float(core.step(x, y, keep_codes=False).loss) for _ in range(60)]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("codes", [CurvatureCodes, GradientCodes, LineSearchCodes], ids=lambda c: c.__name__)
def test_solvers_train_it_read_at_all_steps(codes: Any) -> None:
    """Catches a solver that cannot serve two readers."""
    torch.manual_seed(0)
    x, y = torch.randn(32, 6, 3), torch.randint(2, (32,))
    core = AltMin(ElmanRNN(3, 12, 2, reads=6), nn.CrossEntropyLoss(), codes=codes())
    losses = [float(core.step(x, y, keep_codes=False).loss) for _ in range(60)]
    assert losses[-1] < 0.8 * losses[0]


def test_a_compiled_step_reads_the_same_steps() -> None:
    """Catches moves that a compiled function has not put where the output layer reads them."""
    x, y = torch.randn(4, 2, 3), torch.tensor([0, 1, 1, 0])
    networks = []
    for compiled in (False, True):
        torch.manual_seed(0)
        core = AltMin(ElmanRNN(3, 4, 2, reads=2), nn.CrossEntropyLoss(), codes=CurvatureCodes(0.5), compile=compiled)
        for _ in range(2):
            core.step(x, y, keep_codes=False)
        networks.append(core.network)
    for ours, theirs in zip(*(network.parameters() for network in networks), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reads", [2, 5])
def test_the_curvature_is_that_of_both_readers(reads: int) -> None:
    """Catches a curvature without the loss or without the next step: d^T H d by autograd of J, H by two derivatives.

    A secant is exact where J is quadratic: an identity in place of the activation and the squared error.
    """
    torch.manual_seed(0)
    network = ElmanRNN(3, 4, 2, nn.Identity, reads).double()
    x, y = batch()[0], torch.randn(4, 2, dtype=F64)
    core = AltMin(network, nn.MSELoss(), AltMinObjective(mu=MU))
    step = core.encode(x, y)
    for problem, level in core.code_problems(step):
        direction = torch.randn_like(step.codes_forward[level])

        def whole(code: Tensor, level: int = level) -> Tensor:
            codes = list(step.codes_forward)
            codes[level] = code
            value = torch.zeros((), dtype=F64)
            for t, (here, inputs) in enumerate(zip(codes, x.unbind(1), strict=True)):
                below = codes[t - 1] if t else None
                value = value + MU / 2 * (here - cell(network, inputs, below)).square().sum()
            output = network.head(torch.cat(codes[-reads:], 1))
            return value + (output - y).square().mean(1).sum()

        bend = torch.autograd.functional.hvp(whole, step.codes_forward[level], direction)[1]
        expected = (bend * direction).sum(1) / MU
        with torch.no_grad():
            torch.testing.assert_close(problem.curvature(direction), expected, rtol=1e-9, atol=1e-12)
            step.moves[level] = torch.zeros_like(direction)


def test_what_several_reads_cannot_do_is_refused() -> None:
    """Catches a solver that would see one of two readers only, padding that is read, and steps that are not there."""
    with pytest.raises(ValueError, match=r"ElmanRNN\(reads=3\)"):
        AltMin(net(reads=3), nn.CrossEntropyLoss(), codes=ProximalCodes())
    with pytest.raises(ValueError, match="different lengths"):
        net(reads=3)(aligned(sequences()))
    with pytest.raises(ValueError, match="fewer than reads=6"):
        net(reads=6)(batch()[0])
    with pytest.raises(ValueError, match="reads"):
        net(reads=0)


def test_one_memory_over_all_steps() -> None:
    """Catches a memory of one step: A is the sum over steps and sequences of [x, s(c)] [x, s(c)]^T, by hand."""
    network, (x, y) = net(), batch()
    core = AltMin(network, nn.CrossEntropyLoss(), weights=CoactivationMemory())
    step = core.encode(x, y)
    core.solve_codes(step)
    core.differentiate(step)
    codes = step.codes if core.weights.inputs_of(core.coded.stages[0]) == "moved" else step.codes_forward
    hidden = [torch.zeros(4, 4, dtype=F64), *(torch.tanh(c) for c in codes[:-1])]
    rows = torch.cat([torch.cat([x[:, t], hidden[t], torch.ones(4, 1, dtype=F64)], 1) for t in range(5)])
    expected = rows.t() @ rows
    found = [b for name, b in core.weights.named_buffers() if name.endswith(".A") and b.shape == expected.shape]
    assert len(found) == 1
    torch.testing.assert_close(found[0] / found[0][-1, -1], expected / expected[-1, -1])


def test_what_cannot_work_is_refused_by_name() -> None:
    """Catches solvers and strategies that need a code per layer, and engines without a rule."""
    with pytest.raises(ValueError, match="stage 'cell' has StepInput"):
        AltMin(net(), nn.CrossEntropyLoss(), codes=LeastSquaresCodes())
    with pytest.raises(ValueError, match="no rule for SELU"):
        CodedRecurrentNetwork(net("selu"), "closed_form")
    with pytest.raises(ValueError, match="engine must be one of"):
        CodedRecurrentNetwork(net(), "fast")
    assert CodedRecurrentNetwork(net("selu")).stages[0].engine.kind == "autograd"
    with pytest.raises(ValueError, match="one per time step"):
        refuse_uncuttable(AltMin(net(), nn.CrossEntropyLoss()), 2)


def test_explain_shows_one_stage_for_all_steps() -> None:
    """Catches a row per step, or parameters counted once per step."""
    rows = [line.split() for line in AltMin(net(), nn.CrossEntropyLoss()).explain(batch()[0]).splitlines()]
    assert rows[1:] == [
        ["cell", "StepInput-Linear(7,", "4)", "4", "32", "closed_form"],
        ["head", "Tanh-Linear(4,", "2)", "2", "(output)", "10", "closed_form"],
    ]


def test_shorter_batches_follow_longer_ones() -> None:
    """Catches a number of steps that is fixed by the first batch."""
    core = AltMin(net(), nn.CrossEntropyLoss())
    for time in (5, 2, 1, 7):
        x, y = torch.randn(4, time, 3, dtype=F64), batch()[1]
        before = core.network(x).detach()
        step = core.step(x, y)
        assert len(step.codes) == time
        torch.testing.assert_close(step.output, before, rtol=1e-12, atol=1e-12)


def test_a_copy_has_weights_of_its_own() -> None:
    """Catches stages of a copy that still hold the original's parameters."""
    core = AltMin(net(), nn.CrossEntropyLoss())
    twin = copy.deepcopy(core)
    theirs = {id(p) for stage in twin.coded.stages for p in stage.parameters()}
    assert theirs == {id(p) for p in twin.network.parameters()}
    before = copy.deepcopy(core.network.state_dict())
    twin.step(*batch())
    assert all(torch.equal(value, before[name]) for name, value in core.network.state_dict().items())


def test_batches_of_a_sequence_classifier() -> None:
    """Catches lengths that are dropped, whichever way a loader gives them."""
    module = SequenceClassifier(net())
    x, y = batch()
    for given in (
        (x, torch.tensor(LENGTHS), y),
        {"x": x, "lengths": LENGTHS, "y": y},
        (pack_sequence(sequences(), enforce_sorted=False), y),
    ):
        found, labels = module.unpack(given)
        torch.testing.assert_close(found, aligned(sequences()))
        assert labels is y
    assert module.unpack((x, y))[0] is x


@pytest.mark.parametrize("with_targets", [True, False])
def test_sequences_are_predicted_as_they_are_tested(with_targets: bool) -> None:
    """Catches lengths that only training and test read; here each sequence is run by itself, without padding."""
    module = SequenceClassifier(net())
    x, y = batch()
    with torch.no_grad():
        expected = torch.cat([module.network(sequence[None]) for sequence in sequences()])
    packed = pack_sequence(sequences(), enforce_sorted=False)
    named = {"x": x, "lengths": torch.tensor(LENGTHS)}
    given: tuple[Any, ...] = (named, packed, [packed], {"inputs": packed}, aligned(sequences()))
    if with_targets:
        given = (named | {"y": y}, (x, torch.tensor(LENGTHS), y), (packed, y))
    for each in given:
        torch.testing.assert_close(module.predict_step(each, 0).detach(), expected)


@pytest.mark.parametrize("named", [True, False])
def test_lengths_are_looked_at_before_they_leave_the_cpu(named: bool) -> None:
    """Catches lengths that do not fit and, on a device, are known only as a batch that became NaN."""
    x, y = batch()
    lengths = torch.tensor([5, 1, 3, 6])
    given = {"x": x, "lengths": lengths, "y": y} if named else (x, lengths, y)
    module = SequenceClassifier(net())
    with pytest.raises(ValueError, match="lengths must be 4 whole numbers from 1 to 5"):
        module.on_before_batch_transfer(given, 0)
    lengths[3] = 5
    assert module.on_before_batch_transfer(given, 0) is given


def test_the_split_of_a_recurrent_network_is_verified() -> None:
    """Catches an error of its own where it is asked whether the steps compute what the network computes."""
    CodedRecurrentNetwork(net()).verify_split(batch()[0])

    class Doubled(ElmanRNN):
        def forward(self, x: Any) -> Tensor:
            return 2 * super().forward(x)

    with pytest.raises(ValueError, match=r"Doubled\.forward compute something else"):
        CodedRecurrentNetwork(Doubled(3, 4, 2).double()).verify_split(batch()[0])


@pytest.mark.parametrize(
    ("engine", "activation", "said"),
    [("fast", "tanh", "engine must be one of .* got 'fast'"), ("closed_form", "selu", "has no rule for SELU")],
)
def test_a_step_keeps_its_engine_where_another_is_refused(engine: str, activation: str, said: str) -> None:
    """Catches a step that silently goes on by autograd where it was asked for something else."""
    network = net(activation)
    with pytest.raises(ValueError, match=said):
        RecurrentStage(network, engine)
    stage = CodedRecurrentNetwork(network).stages[0]
    before = stage.engine
    with pytest.raises(ValueError, match=said):
        stage.use_engine(engine)
    assert stage.engine is before


def test_batches_without_lengths_are_left_alone_on_the_cpu() -> None:
    """Catches the look at lengths taking a pair for a padded batch, or failing where there are none."""
    module = SequenceClassifier(net())
    x, y = batch()
    packed = pack_sequence(sequences(), enforce_sorted=False)
    for given in ((x, y), [x, y], {"x": x, "y": y}, (packed, y), packed, x):
        assert module.on_before_batch_transfer(given, 0) is given
    torch.testing.assert_close(module.unpack((packed, y))[0], aligned(sequences()))


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda x, y: (x[..., 0], LENGTHS, y), ValueError, r"shape \(batch, time, features\)"),
        (lambda x, y: {"x": x[..., 0], "lengths": LENGTHS, "y": y}, ValueError, r"shape \(batch, time, features\)"),
        (lambda x, y: {"x": x, "image": x, "lengths": LENGTHS, "y": y}, TypeError, "batch is a dictionary with keys"),
        (lambda x, y: {"lengths": LENGTHS, "y": y}, TypeError, "batch is a dictionary with keys"),
    ],
    ids=["no features", "no features, by name", "two inputs", "no inputs"],
)
def test_what_is_no_padded_batch_is_said_where_it_is_unpacked(make: Any, error: type[Exception], said: str) -> None:
    """Catches an unpacking of a shape that fails inside Lightning's transfer hook, before anything can say why."""
    module, given = SequenceClassifier(net()), make(*batch())
    assert module.on_before_batch_transfer(given, 0) is given
    with pytest.raises(error, match=said):
        module.unpack(given)
