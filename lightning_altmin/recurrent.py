"""A recurrent network seen as a chain of codes, one per time step, whose stages share their weights.

The code step is the algorithm's own: from the last step back, each code is moved towards what the next one asks. The
weight step is one regression over all steps of all sequences, for given the codes no step depends on another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_altmin.codes import CodeProblem, CodeSolver
from lightning_altmin.engines import (
    ENGINES,
    BatchState,
    Rule,
    StageEngine,
    StageMap,
    has_closed_form,
    rule_for,
    stage_engine,
)
from lightning_altmin.engines.autograd import AutogradMap
from lightning_altmin.engines.chain import Chain
from lightning_altmin.engines.rule import Point
from lightning_altmin.network import CodedNetwork
from lightning_altmin.nn.elman import ElmanRNN, StepInput
from lightning_altmin.stage import Encoding, Stage, StageData

if TYPE_CHECKING:
    from lightning_altmin.step import Step


class StepInputRule(Rule):
    """``[x, begun * s(c)]`` in closed form; the state of a step is ``(x, begun)``."""

    def __init__(self, module: StepInput) -> None:
        super().__init__(module)
        self._activation = rule_for(module.activation)

    def _activated(self, at: Point) -> Point:
        return Point(self._activation, None, at.x, None)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        inputs, begun = state
        hidden = self._activation.forward(x, None)[0] * begun
        return torch.cat([inputs, hidden], -1), None

    def change(self, difference: Tensor, base: Point, here: Point) -> Tensor:
        inputs, begun = here.state
        hidden = self._activation.change(difference, self._activated(base), self._activated(here)) * begun
        return nn.functional.pad(hidden, (inputs.shape[-1], 0))

    def input_gradient(self, grad: Tensor, at: Point) -> Tensor:
        inputs, begun = at.state
        return self._activation.input_gradient(grad[..., inputs.shape[-1] :] * begun, self._activated(at))


class _Recurrence(StageEngine):
    """A step of the cell; what it is given beside the code, ``(x, begun)``, is the batch's state."""

    def __init__(self, step_input: StepInput, cell: nn.Linear) -> None:
        self._step_input, self._cell = step_input, cell

    def encode(self, x: Tensor) -> tuple[Tensor, BatchState]:
        raise TypeError("a recurrent step needs its input beside the code: use CodedRecurrentNetwork.encode")

    def live(self, x: Tensor, state: BatchState, move: Tensor | None = None) -> StageMap:
        return self.fixed(x, state, move)  # no part of a step depends on the batch


class ClosedFormRecurrence(_Recurrence):
    """The step by the rules of its layers."""

    kind: ClassVar[str] = "closed_form"

    def __init__(self, step_input: StepInput, cell: nn.Linear) -> None:
        super().__init__(step_input, cell)
        self._rules = [StepInputRule(step_input), rule_for(cell)]

    def fixed(self, x: Tensor, state: BatchState, move: Tensor | None = None) -> StageMap:
        chain = Chain(self._rules, x, [state, None])
        return chain if move is None else chain.moved(move)


class AutogradRecurrence(_Recurrence):
    """The step by autograd, one step at a time."""

    kind: ClassVar[str] = "autograd"

    def fixed(self, x: Tensor, state: BatchState, move: Tensor | None = None) -> StageMap:
        modules = [self._step_input, self._cell]
        return AutogradMap(lambda code: self._cell(self._step_input(code, *state)), x, modules, move)


class RecurrentStage(Stage):
    """The stage of every time step: ``c_t = cell([x_t, s(c_{t-1})])``."""

    def __init__(self, network: ElmanRNN, engine: str) -> None:
        self._network = network
        super().__init__("cell", [network.step_input], [network.cell], is_output=False, engine=engine)

    def use_engine(self, engine: str) -> None:
        """Evaluate by another engine.

        Raises:
            ValueError: If ``engine`` is unknown, or the activation has no closed form.
        """
        if engine not in ENGINES:
            raise ValueError(f"engine must be one of {ENGINES}, got {engine!r}")
        network, closed = self._network, has_closed_form(self._network.activation)
        if engine == "closed_form" and not closed:
            raise ValueError(f"engine='closed_form' has no rule for {network.activation}; use engine='auto'")
        by_rules = closed and engine != "autograd"
        self.engine = (ClosedFormRecurrence if by_rules else AutogradRecurrence)(network.step_input, network.cell)


class ReadStep:
    """What the output layer makes of one of the codes that it reads: ``W s(c)`` with its columns of the weight."""

    def __init__(self, network: ElmanRNN, engine: StageEngine, code: Tensor, place: int) -> None:
        self._engine, self._code = engine, code
        self._columns = network.head.weight[:, place * network.hidden : (place + 1) * network.hidden]
        self._read, self._state = engine.encode(code)

    def change(self, move: Tensor) -> Tensor:
        """How far the output moves with the code."""
        return self._engine.fixed(self._code, self._state, move).change(self._read) @ self._columns.t()

    def input_gradient(self, grad: Tensor, move: Tensor | None) -> Tensor:
        """With respect to the code, moved."""
        return self._engine.fixed(self._code, self._state, move).input_gradient(grad @ self._columns)


@dataclass(kw_only=True)
class ReadCodeProblem(CodeProblem):
    """The problem of a code that the output layer reads, beside the next step if there is one.

    The loss at the codes as they are now then counts in it, too. It is scaled by the share of a plain step that reached
    this code from above (`signal`), for so is what the next step asks: together they stay in proportion. Solvers that
    tell no share (all but `CurvatureCodes`) leave it unscaled, and what the next step asks weighs the less in it the
    shorter their steps are.

    Attributes:
        read: What the output layer makes of this code.
        output: The network's output as the later codes, which have moved, have left it.
    """

    read: ReadStep
    output: Tensor

    def smooth_gradient(self, move: Tensor | None = None) -> Tensor:
        change = None if move is None else self.read.change(move)
        gradient = self._in_proportion(self.read.input_gradient(self._loss_gradient(change), move))
        if not self.is_top:
            return gradient + super().smooth_gradient(move)
        anchor = None if move is None else self.objective.code_anchor_gradient(move)
        return gradient if anchor is None else gradient + anchor

    def curvature(self, direction: Tensor, move: Tensor | None = None) -> Tensor:
        here = None if move is None else self.read.change(move)
        there = self.read.change(-direction if move is None else move - direction)
        bend = self._loss_gradient(here) - self._loss_gradient(there)
        curvature = self._in_proportion(((-there if here is None else here - there) * bend).sum(1))
        if not self.is_top:
            return curvature + super().curvature(direction, move)
        anchor = self.objective.code_anchor_gradient(direction)
        return curvature if anchor is None else curvature + (anchor * direction).sum(1)

    def value(self, move: Tensor | None = None) -> Tensor:
        raise TypeError("a code that two stages read has a gradient and a curvature, but no value, for its solver")

    def _loss_gradient(self, change: Tensor | None) -> Tensor:
        return self.objective.code_loss_gradient(
            self.loss.elsewhere(self.output if change is None else self.output + change)
        )

    def _in_proportion(self, term: Tensor) -> Tensor:
        return term if self.signal is None else term * self.signal


class CodedRecurrentNetwork(CodedNetwork):
    """An `ElmanRNN` seen as a chain of codes ``c_1..c_T``, made by one stage with the same weights at every step.

    Args:
        network: The network. It is not copied or changed.
        engine: ``"auto"``, ``"closed_form"`` or ``"autograd"``.

    A sequence that is shorter than the batch's longest has no code before its first step: nothing there depends on its
    weights or is moved.
    """

    def __init__(self, network: ElmanRNN, engine: str = "auto") -> None:
        self.network: ElmanRNN = network
        self._reasons, self._named = {}, False
        output = Stage("head", [network.activation], [network.head], is_output=True, engine=engine)
        self.stages = [RecurrentStage(network, engine), output]
        self._refuse_unusable()

    one_code_per_stage = False
    split_found = False  # it is the network's own steps

    def makers(self, codes: int | None = None) -> list[int]:
        return [0] * (2 if codes is None else codes) + [1]  # two steps have every pair of stages that meet

    def first_input(self, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0], self.network.hidden)  # what would have been before the first step

    def output_input(self, codes: Sequence[Tensor]) -> Tensor:
        return self.network.read(codes)

    def encode(self, x: Tensor) -> Encoding:
        cell, head = self.stages
        inputs, begun = self.network.steps(x)
        code = self.first_input(inputs)
        codes: list[Tensor] = []
        states: list[BatchState] = []
        for t in range(inputs.shape[1]):
            states.append((inputs[:, t], begun[:, t]))
            code = cell.fixed(code, states[-1]).output().detach()
            codes.append(code)
        output, state = head.encode(self.output_input(codes))
        return Encoding(codes, output, [*states, state])

    def refuse_codes(self, codes: CodeSolver) -> None:
        if self.network.reads > 1 and codes.reads_outputs:
            raise ValueError(
                f"codes={type(codes).__name__} asks for what one stage makes of a code, and with "
                f"ElmanRNN(reads={self.network.reads}) two stages read it: use CurvatureCodes, GradientCodes or "
                "LineSearchCodes, or reads=1"
            )

    def whole_problem(self, problem: CodeProblem, step: Step, level: int) -> CodeProblem:
        reads = self.network.reads
        place = level - len(step.codes_forward) + reads
        if reads == 1 or place < 0:
            return problem
        output = step.output
        for later in range(place + 1, reads):
            output = output + self._change(step, later)
        return ReadCodeProblem(
            **{field.name: getattr(problem, field.name) for field in fields(problem)},
            read=self._read_step(step, place),
            output=output,
        )

    def _read_step(self, step: Step, place: int) -> ReadStep:
        engine = stage_engine([self.network.activation], self.stages[1].engine.kind)
        return ReadStep(self.network, engine, step.codes_forward[place - self.network.reads], place)

    def _change(self, step: Step, place: int) -> Tensor:
        """How far a code's move has changed the output; each is computed once."""
        move = step.moves[place - self.network.reads]
        known = step.read_changes.get(place)
        if known is None or known[0] is not move:
            known = step.read_changes[place] = move, self._read_step(step, place).change(move)
        return known[1]

    def stage_data(self, step: Step, index: int, moved: bool) -> StageData:
        if index == 1:
            move = self.output_input(step.moves) if moved else None
            return StageData(step.states[-1], self.output_input(step.codes_forward), move, step.output, None, None)
        first = self.first_input(step.codes_forward[0])
        below = torch.stack([first, *step.codes_forward[:-1]], 1)
        moves = torch.stack(step.moves, 1)
        below_move = torch.cat([first.unsqueeze(1), moves[:, :-1]], 1) if moved else None
        signals = [signal for signal in step.signals if signal is not None]
        signal = None
        if signals:  # a share that has become less than the numbers can hold has nothing to be divided
            signal = torch.stack(signals).to(moves.dtype).clamp_min(torch.finfo(moves.dtype).tiny).unsqueeze(1)
        state = self.network.steps(step.x)
        return StageData(state, below, below_move, torch.stack(step.codes_forward, 1), moves, signal)


def coded_network(network: Any) -> CodedNetwork:
    """A network as a chain of codes: a recurrent one over time, any other over its layers; a coded one as it is."""
    if isinstance(network, CodedNetwork):
        return network
    return CodedRecurrentNetwork(network) if isinstance(network, ElmanRNN) else CodedNetwork(network)
