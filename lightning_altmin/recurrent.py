"""A recurrent network seen as a chain of codes, one per time step, whose stages share their weights.

The code step is the algorithm's own: from the last step back, each code is moved towards what the next one asks. The
weight step is one regression over all steps of all sequences, for given the codes no step depends on another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_altmin.engines import ENGINES, BatchState, Rule, StageEngine, StageMap, has_closed_form, rule_for
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
        self._reasons = {}
        output = Stage("head", [network.activation], [network.head], is_output=True, engine=engine)
        self.stages = [RecurrentStage(network, engine), output]
        self._refuse_unusable()

    one_code_per_stage = False
    split_found = False  # it is the network's own steps

    def makers(self, codes: int | None = None) -> list[int]:
        return [0] * (2 if codes is None else codes) + [1]  # two steps have every pair of stages that meet

    def first_input(self, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0], self.network.hidden)  # what would have been before the first step

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
        output, state = head.encode(code)
        return Encoding(codes, output, [*states, state])

    def stage_data(self, step: Step, index: int, moved: bool) -> StageData:
        if index == 1:
            top = len(step.codes_forward) - 1
            move = step.moves[top] if moved else None
            return StageData(step._states[-1], step.codes_forward[top], move, step.output, None, None)
        first = self.first_input(step.codes_forward[0])
        below = torch.stack([first, *step.codes_forward[:-1]], 1)
        moves = torch.stack(step.moves, 1)
        below_move = torch.cat([first.unsqueeze(1), moves[:, :-1]], 1) if moved else None
        signals = [signal for signal in step._signals if signal is not None]
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
