"""What a weight solver is given (one stage's problem) and what it must do (say how the parameters change)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_altmin.engines import BatchState, Gradients, StageMap, SummedMap
from lightning_altmin.losses import LocalLoss, LossAt
from lightning_altmin.margins import MarginLoss
from lightning_altmin.objective import AltMinObjective
from lightning_altmin.processes import Processes
from lightning_altmin.stage import Stage

Inputs = Literal["moved", "forward"]
"""Which codes are the inputs of the weight step: moved by the code step (the paper), or the forward ones."""


@dataclass
class WeightProblem:
    """The local problem of one stage, independent of all others.

    Hidden stage: the batch mean of ``mu/2 ||target - f(input)||^2``. Output stage (``move is None``): the loss as
    the user gave it. Both plus the l1 term of the weights.

    Attributes:
        objective: Constants and reductions.
        stage: The stage whose parameters are free.
        state: What encode fixed in it for this batch.
        forward_input: The forward code below (or x), shape ``(batch, *code)``.
        forward_output: The stage's forward code (or the network's output), as encode found it.
        move: Move of the stage's code, or ``None`` for the output stage.
        input_move: How far the stage's input is from ``forward_input``, if it is a moved code.
        loss: The network's loss at its forward output, with the batch's targets.
        signal: The share of a plain step of rate 1 that reached this code, if the code solver's steps vary: the
            coupling's gradient is divided by it. A positive factor leaves the coupling's minimum where it is; this one
            keeps the gradient's size from following the code solver's step lengths. `None` with several weight steps.
        margins: How the stage's code is judged where its code solver has said so: it takes the place of the squared
            distance to the moved code.
        processes: Who else has samples of this batch.
        number: Number of the batch, counted from 0 since training began.
        inner: Number of weight steps already taken on this batch: from the first on, ``forward_output`` is no longer
            the stage at ``forward_input``.
    """

    objective: AltMinObjective
    stage: Stage
    state: BatchState
    forward_input: Tensor
    forward_output: Tensor
    move: Tensor | None
    input_move: Tensor | None
    loss: LossAt
    signal: Tensor | None = None
    margins: MarginLoss | None = None
    processes: Processes = field(default_factory=Processes)
    passing: bool = False
    """Whether `last_gradients` may let go of the tensors above as soon as it is done with them."""
    spends: bool = False
    """Whether nobody else has a use for ``move``, and for a ``forward_input`` that moves: they may be overwritten."""
    number: int = 0
    inner: int = 0
    residual: Tensor | None = None
    """``f(input) - target`` of a hidden stage, set by `output_gradient` unless ``passing``."""
    # Kept once computed; a cached_property would hold a lock, which cannot be traced.
    _live: StageMap | None = field(default=None, repr=False)
    _output_gradient: Tensor | None = field(default=None, repr=False)
    _smooth: Gradients | None = field(default=None, repr=False)

    @property
    def input(self) -> Tensor:
        """The code below as the weight step reads it (or x), shape ``(batch, *code)``."""
        return self.forward_input if self.input_move is None else self.forward_input + self.input_move

    @property
    def known(self) -> bool:
        """Whether the stage at ``input`` is still ``forward_output``."""
        return self.inner == 0 and self.input_move is None

    @property
    def target(self) -> Tensor:
        """The stage's moved code, shape ``(batch, *code)``; the output stage has none.

        Raises:
            ValueError: If this is the output stage's problem, or the code is judged by its margins.
        """
        if self.move is None:
            raise ValueError("the output stage has no code: its target is the loss's")
        if self.margins is not None:
            raise ValueError(
                f"stage {self.stage.name!r} has no target, a staircase reads its code: it is judged by margins, which "
                "only solvers that go by gradients can use, such as LocalGradient()"
            )
        return self.forward_output + self.move

    def gradients(self) -> Gradients:
        """Gradients of this problem alone with respect to the stage's trainable parameters."""
        return self._with_sparsity(self.smooth_gradients)

    def last_gradients(self) -> Gradients:
        """The same where nothing will be asked of this problem afterwards: its tensors are freed on the way."""
        return self._with_sparsity(self.last_smooth_gradients())

    def last_smooth_gradients(self) -> Gradients:
        """`last_gradients` without the l1 term."""
        stage, output_gradient = self.live, self.output_gradient
        if self.passing:
            for name in ("state", "forward_input", "forward_output", "input_move", "move", "loss"):
                if hasattr(self, name):
                    delattr(self, name)
            self._live = self._output_gradient = None
        return stage.parameter_gradients(output_gradient)

    def _with_sparsity(self, gradients: Gradients) -> Gradients:
        if self.objective.lambda_w > 0:
            gradients = [(p, g if (l1 := self._sparsity(p)) is None else g + l1) for p, g in gradients]
        return gradients

    @property
    def smooth_gradients(self) -> Gradients:
        """`gradients` without the l1 term."""
        if self._smooth is None:
            self._smooth = self.live.parameter_gradients(self.output_gradient)
        return self._smooth

    @property
    def live(self) -> StageMap:
        """The stage at ``input``."""
        if self._live is None:
            if self.spends and self.stage.is_output and self.input_move is not None:
                # Another tensor in the same memory: rules tell by the tensor itself whether encode has seen an input.
                moved = self.forward_input.add_(self.input_move).detach()
                self._live = self.stage.live(moved, self.state)
            else:
                self._live = self.stage.live(self.forward_input, self.state, self.input_move)
            if self.stage.mixes_processes:
                self._live = SummedMap(self._live, self._divisor())
        return self._live

    @property
    def output_gradient(self) -> Tensor:
        """Gradient of this problem, the l1 term left out, with respect to the stage's output."""
        if self._output_gradient is None:
            self._output_gradient = self._find_output_gradient()
        return self._output_gradient

    def _divisor(self) -> Tensor:
        """What the mean of this problem over the samples here was divided by."""
        if self.move is None:
            return self.loss.loss.weight(self.loss.output, self.loss.target)
        return self.move.new_full((), float(self.move.shape[0]))

    def _find_output_gradient(self) -> Tensor:
        if self.move is None:
            return (self.loss if self.known else self.loss.elsewhere(self.live.output())).mean_gradient()
        if self.margins is not None:
            output = self.forward_output if self.known else self.live.output()
            if not self.passing:
                self.residual = output - self.forward_output - self.move
            gradient = self.margins.gradient(output).div_(output.shape[0])
            return gradient if self.signal is None else gradient.div_(self.signal)
        # As a sum of differences: f(input) - (c_forward + move) would round away a move that is small beside the code.
        if self.known:
            residual = self.move.neg_() if self.spends and self.move.is_contiguous() else -self.move
        elif self.inner > 0 or self.input_move is None:
            residual = self.live.output() - self.forward_output - self.move
        else:
            live = self.live
            if self.spends:
                del self.forward_input, self.state
            residual = live.residual(self.forward_output, self.move, self.spends)
        if self.passing:
            self.move = None
        else:
            self.residual, residual = residual, residual.clone()
        return self.objective.weight_coupling_gradient(residual, self.signal)

    def _sparsity(self, parameter: nn.Parameter) -> Tensor | None:
        return self.objective.weight_sparsity_gradient(parameter, self.stage.is_output)


class WeightSolver(nn.Module, ABC):
    """Solves the stages' local problems, through gradients and one optimizer.

    Subclass and write two methods: `optimizer`, and `gradients`, called per stage and batch. A solver
    that knows the new weights W* outright returns ``W - W*`` and makes an optimizer whose step is ``W -= grad``.

    Attributes:
        inputs: Which codes the weight step reads; override `inputs_of` to choose per stage.
        steps: Weight steps per batch, >= 1. All of them together are one optimization step of the batch.
        uses_up: Whether `gradients` asks a problem for ``last_gradients`` and nothing else, so that codes can be freed,
            or overwritten, as soon as a stage has its gradients.
        sets_weights: Whether the optimizer's step leads to weights that were solved for, and not along a direction:
            then it must not be clipped or averaged over batches.
        traceable: Whether `gradients` can be part of a compiled graph: it keeps nothing from batch to batch.
    """

    inputs: Inputs = "moved"
    steps: int = 1
    uses_up: bool = False
    sets_weights: bool = False
    traceable: bool = True

    def check(self, stages: Sequence[Stage], objective: AltMinObjective, loss: LocalLoss) -> None:
        """Called once with what it will be asked to solve; a solver that cannot do it refuses here.

        Raises:
            ValueError: If a stage, a term of the objective or the loss cannot be served, naming it.
        """
        return

    def inputs_of(self, stage: Stage) -> Inputs:
        """Which codes the weight step of this stage reads."""
        return self.inputs

    def kept_for(self, stage: Stage) -> Sequence[nn.Module]:
        """Modules whose buffers hold what is kept for this stage alone: only the process that owns it needs them."""
        return ()

    def measured(self) -> Sequence[Tensor]:
        """What was measured in this batch as sums over its samples, for several processes to add up.

        Asked once per batch, after its first gradients; `learn` is then given the sums over all samples.
        """
        return []

    def learn(self, sums: Sequence[Tensor]) -> None:
        """Take over what `measured` returned, summed over the samples of all processes that share the batch."""
        return

    @abstractmethod
    def optimizer(self, stages: Sequence[Stage]) -> Optimizer:
        """One optimizer over the trainable parameters of all stages, with a named parameter group per stage.

        May be called more than once, also for an optimizer that is looked at and not used; none may depend on another.

        Raises:
            ValueError: If a setting names a stage that does not exist.
        """

    @abstractmethod
    def gradients(self, problem: WeightProblem) -> Gradients:
        """The direction in which the optimizer is to change each parameter of one stage (it will subtract it)."""

    def complete(self, gradients: Gradients) -> Gradients:
        """Called once per weight step with what `gradients` gave for all stages; returns what is to be used.

        For what needs all stages at once, such as one collective over processes.
        """
        return gradients

    def evidence(self) -> Sequence[Tensor]:
        """Scalars that a batch's statistics made and that must be finite for the batch to be used."""
        return ()

    def explain(self) -> str:
        """What the solver keeps and costs per layer; empty if there is nothing to say."""
        return ""
