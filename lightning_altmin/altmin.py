"""Online alternating minimization with auxiliary variables (arXiv 1806.09077), in plain torch.

One mini-batch, the whole algorithm::

    codes c_1..c_L  <-  forward pass                                   encode
    for l = L..1:   c_l  <-  lower  loss or mu/2 ||f_{l+1}(c_l) - c_{l+1}||^2  + mu/2 ||c_l - c_l_forward||^2
    for each l:     W_l  <-  lower  mu/2 ||c_l - f_l(c_{l-1})||^2      independently; the output stage lowers the loss

No gradient runs through more than one stage: each line above differentiates a single stage at a fixed input.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_altmin.arguments import given_or
from lightning_altmin.codes import CodeProblem, CodeSolver, CurvatureCodes
from lightning_altmin.compiled import CompiledBatch
from lightning_altmin.engines import Gradients
from lightning_altmin.engines.batch_norm_state import batch_norms
from lightning_altmin.guard import Buffers, Guard, Policy, buffer_owners, guard_for, is_bad
from lightning_altmin.losses import Loss, LossAt, local_loss
from lightning_altmin.network import CodedNetwork
from lightning_altmin.objective import AltMinObjective
from lightning_altmin.optim import check_optimizer, clear_gradients, equal_groups_merged
from lightning_altmin.processes import Processes
from lightning_altmin.recurrent import coded_network
from lightning_altmin.step import Step
from lightning_altmin.verification import Verification, verify
from lightning_altmin.weights import LocalGradient, WeightProblem, WeightSolver


class AltMin(nn.Module):
    """Trains a network by online alternating minimization; no Lightning needed.

    Args:
        network: An ``nn.Sequential``, a module that can be traced, a list of blocks, an `ElmanRNN`, or a
            `CodedNetwork`. It is trained in place and stays an ordinary module.
        loss: ``loss(output, target)``, a mean over the batch, as in PyTorch.
        objective: Constants of the objective.
        codes: How codes are moved.
        weights: How weights are changed.
        nonfinite: What a bad batch does: ``"raise"`` or ``"skip"``; either way it changes nothing.
        compile: Compute a batch's phases in one function compiled by ``torch.compile``; ``True``, or one of its modes
            (``"reduce-overhead"`` for CUDA graphs). Needs closed forms throughout; see `CompiledBatch`.
        processes: Who shares a batch: ``DataParallel()`` under torch.distributed; one process if not given.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If the network, the loss or a setting cannot be used; see `CodedNetwork` and `local_loss`.
    """

    def __init__(
        self,
        network: nn.Module | CodedNetwork | Sequence[nn.Module],
        loss: Loss,
        objective: AltMinObjective | None = None,
        codes: CodeSolver | None = None,
        weights: WeightSolver | None = None,
        nonfinite: Policy = "raise",
        compile: bool | str = False,
        processes: Processes | None = None,
    ) -> None:
        super().__init__()
        self.coded = coded_network(network)
        self.network = self.coded.network
        self.local_loss = local_loss(loss)
        self.loss = loss  # registered if it is a module, so that its buffers move with this one
        self.objective: AltMinObjective = given_or(AltMinObjective, "objective", objective, AltMinObjective)
        self.codes: CodeSolver = given_or(CurvatureCodes, "codes", codes, CodeSolver)
        self.weights: WeightSolver = given_or(LocalGradient, "weights", weights, WeightSolver)
        self.codes.check([self.coded.stages[maker] for maker in self.coded.makers()], self.objective)
        self.codes.check_loss(self.local_loss)
        self.coded.refuse_codes(self.codes)
        self.weights.check(self.coded.stages, self.objective, self.local_loss)
        self.make_optimizer()  # a wrong per-layer setting is an error here, not at the first batch
        self.codes.prepare(self.coded.depth)
        _refuse_half_precision(self.network)
        self._probe = (next(self.network.parameters()),)  # tells the device; in a tuple: not registered twice
        if not self._probe[0].is_meta:  # a network that is on its device already; without data, values would be lost
            for part in (self.objective, self.codes, self.weights):
                part.to(self._probe[0].device)
        self._nonfinite: Policy = nonfinite
        self._guard: Guard = guard_for(torch.device("cpu"), nonfinite)
        self._guarded = "cpu"
        self.norms = batch_norms([self.network])
        self.buffer_owners = buffer_owners(self.network, self.codes, self.weights)
        self._optimizer: Optimizer | None = None
        self.batches_seen = 0
        self.split_verified = not self.coded.split_found
        self.compiled: CompiledBatch | None = None
        self.processes = given_or(Processes, "processes", processes, Processes)
        self.compiled = CompiledBatch(self, compile) if compile else None  # of stages that know who shares a batch

    # ---------------------------------------------------------------- the algorithm

    def step(self, x: Tensor, y: Any, keep_codes: bool = True) -> Step:
        """Train on one mini-batch: encode, solve codes, fill gradients, optimizer step.

        Args:
            x: Inputs, shape ``(batch, *features)``.
            y: Targets, first dimension ``batch``.
            keep_codes: Keep codes, moves and residuals in the result; ``False`` frees each as soon as nothing needs
                it, and the result then has none of them.

        Returns:
            The batch's codes, loss and residuals; nothing in it has been looked at, so no device sync happened.

        Raises:
            ValueError: If the batch cannot be used; nothing is changed.
            NonFiniteError: If the batch is bad and ``nonfinite="raise"``; nothing is changed, but by weight steps of it
                before the bad one. On an accelerator ``guard.check()`` raises it; until then nothing is changed.
        """
        step = self.encode(x, y, keep_codes)
        with step.undone_on_error():
            self.solve_codes(step)
            for inner in range(self.weights.steps):
                clear_gradients(self.optimizer)
                self.fill_gradients(step, inner)
                with self.guard.protect(self.optimizer), equal_groups_merged(self.optimizer):
                    self.optimizer.step()
        clear_gradients(self.optimizer)
        return step

    @torch.no_grad()
    def encode(self, x: Tensor, y: Any, keep_codes: bool = True) -> Step:
        """Phase 1: the forward pass sets the codes. Running statistics and the random state advance here only."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor of inputs, shape (batch, *features), got {type(x).__name__}")
        if x.dim() == 0 or x.shape[0] == 0:
            raise ValueError(f"the batch is empty: x must have shape (batch, *features), got {tuple(x.shape)}")
        if not self.split_verified:
            self.coded.verify_split(x)
            self.split_verified = True
        self.processes.begin(self)
        number, buffers = self.batches_seen, Buffers(self.buffer_owners)
        run = self.run_encode if self.compiled is None else self.compiled
        with buffers.restored_on_error():
            step = run(x, y, keep_codes, self.codes.measures(number))
        step.number, step.buffers = number, buffers
        self.batches_seen += 1
        return step

    def run_encode(self, x: Tensor, y: Any, keep_codes: bool, measures: bool) -> Step:
        """The part of `encode` that depends on the batch alone."""
        encoding = self.coded.encode(x)
        if self.compiled is None:  # which has checked before, for this looks at the labels
            self.local_loss.check(encoding.output, y)
        given = y
        if x.device.type != "cpu":  # where labels have been looked at
            y = self.local_loss.readable(encoding.output, y)
        loss_at = self.local_loss.at(encoding.output, y)
        loss = loss_at.mean()
        if loss.dim() != 0:
            raise ValueError(f"loss must return a scalar (a mean over the batch), got shape {tuple(loss.shape)}")
        return Step(
            x,
            y,
            encoding.output,
            loss,
            encoding.codes,
            moves=[code.new_zeros(()).expand_as(code) for code in encoding.codes],  # not moved yet, no memory
            signals=[None] * len(encoding.codes),
            margins=[None] * len(encoding.codes),
            code_steps=[None] * len(encoding.codes),
            loss_at=loss_at,
            states=encoding.states,
            keeps=keep_codes,
            measures=measures,
            given=given,
        )

    @torch.no_grad()
    def solve_codes(self, step: Step) -> None:
        """Phase 2: from the top code down, each code is moved, with the already moved code above it as target.

        Where codes are not kept, a stage's gradients are computed as soon as its own code and the one below have moved,
        and its code is freed: weights change after all of them, so the order does not matter.
        """
        if step.solved is not None:
            return
        frees = not step.keeps and self.weights.steps == 1 and self.coded.one_code_per_stage
        gradients: Gradients = []
        for level in range(len(step.codes_forward) - 1, -1, -1):
            self.move_code(step, level)
            if frees:
                gradients += self.passing_gradients(step, level + 1)
        if frees:
            gradients += self.passing_gradients(step, 0)
            gradients = self.weights.complete(gradients)
            step.solved = gradients, is_bad(gradients, self._evidence(step))

    def move_code(self, step: Step, level: int) -> None:
        """Move one code; the one above has moved before."""
        problem = self.code_problem(step, level)
        step.moves[level] = self.codes.solve(problem)
        signal = problem.signal
        # Several weight steps go all the way to a code's target, whose own size then matters.
        if problem.rate is not None and self.weights.steps == 1:
            signal = problem.rate if signal is None else problem.rate * signal
        step.signals[level] = signal
        step.margins[level] = problem.margins
        step.code_steps[level] = problem.steps

    def passing_gradients(self, step: Step, level: int) -> Gradients:
        """One stage's local gradients; the codes above its input are freed on the way, and that one if it can be."""
        problem = self.weight_problem(step, level)
        # Not `del step.moves[level:]`, which torch 2.8 cannot trace.
        step.codes_forward, step.moves = step.codes_forward[:level], step.moves[:level]
        step.margins, step.states = step.margins[:level], step.states[:level]
        if self.weights.uses_up:
            problem.passing = True
            problem.spends = not self.codes.reads_outputs
            if level > 0:
                problem.spends &= not self.coded.stages[level - 1].engine.reads_base_output
            if level > 0 and problem.spends:
                # Whoever reads it all the same makes the batch a bad one.
                step.codes_forward[-1] = step.output.new_full((), torch.nan).expand(step.codes_forward[-1].shape)
            if level == self.coded.depth:
                step.loss_at = LossAt(self.local_loss, step.output, step.y)  # without what the old one has computed
        return self.weights.gradients(problem)

    @torch.no_grad()
    def fill_gradients(self, step: Step, inner: int = 0) -> bool:
        """Phase 3: add each stage's local gradient to ``.grad``, judged good as a whole or not added at all.

        Args:
            step: The batch, its codes solved.
            inner: Number of weight steps already taken on this batch; from the first on, outputs known from encode
                are out of date and are computed anew.

        Returns:
            Whether the batch was admitted (an accelerator is not asked: there it is always ``True``).
        """
        gradients, bad = self.differentiate(step, inner) if step.solved is None else step.solved
        gradients, bad = self.processes.share(self, step, gradients, bad, first=inner == 0)
        assert step.buffers is not None
        admitted = self.guard.admit(step.number, inner, gradients, bad, step.buffers)
        for parameter, gradient in admitted:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return bool(admitted) or not gradients

    def differentiate(self, step: Step, inner: int = 0) -> tuple[Gradients, Tensor]:
        """Each stage's local gradient, and whether the batch is bad (a bool scalar); changes no parameter."""
        gradients: Gradients = []
        for problem in self.weight_problems(step, inner):
            gradients += self.weights.gradients(problem)
            if step.keeps and inner == 0 and problem.move is not None:
                _ = problem.output_gradient  # which finds the residual, if the solver had no need of it
                assert problem.residual is not None
                step.residuals.append(problem.residual.square().sum() / problem.residual.shape[0])
        gradients = self.weights.complete(gradients)
        return gradients, is_bad(gradients, self._evidence(step))

    # ---------------------------------------------------------------- the problems, one at a time

    def code_problems(self, step: Step) -> Iterator[tuple[CodeProblem, int]]:
        """The codes' problems from the top down; each is made when asked for, from the codes as they are then."""
        levels = range(len(step.codes_forward) - 1, -1, -1)
        return ((self.code_problem(step, level), level) for level in levels)

    def code_problem(self, step: Step, level: int) -> CodeProblem:
        """The problem of one code, counted from 0 at the bottom, from the codes as they are now."""
        makers = self.coded.makers(len(step.codes_forward))
        is_top = level == len(step.codes_forward) - 1
        problem = CodeProblem(
            objective=self.objective,
            above=self.coded.stages[makers[level + 1]],
            state=step.states[level + 1],
            forward=step.codes_forward[level],
            forward_output=step.output if is_top else step.codes_forward[level + 1],
            target_move=None if is_top else step.moves[level + 1],
            loss=step.loss_at,
            level=makers[level],
            measures=step.measures,
            signal=None if is_top else step.signals[level + 1],
            target_margins=None if is_top else step.margins[level + 1],
        )
        return self.coded.whole_problem(problem, step, level)

    def weight_problems(self, step: Step, inner: int = 0) -> Iterator[WeightProblem]:
        """The stages' problems; none depends on another's result."""
        return (self.weight_problem(step, level, inner) for level in range(self.coded.depth + 1))

    def weight_problem(self, step: Step, level: int, inner: int = 0) -> WeightProblem:
        """The problem of one stage, counted from 0 at the bottom."""
        stage = self.coded.stages[level]
        data = self.coded.stage_data(step, level, self.weights.inputs_of(stage) == "moved")
        return WeightProblem(
            objective=self.objective,
            stage=stage,
            state=data.state,
            forward_input=data.forward_input,
            forward_output=data.forward_output,
            move=data.move,
            input_move=data.input_move,
            loss=step.loss_at,
            signal=data.signal,
            margins=data.margins,
            processes=self.processes,
            number=step.number,
            inner=inner,
        )

    # ---------------------------------------------------------------- state

    @property
    def processes(self) -> Processes:
        """Who shares a batch; may be set between batches, by a Trainer's strategy for one."""
        return self._processes

    @processes.setter
    def processes(self, processes: Processes) -> None:
        self.coded.share(processes.samples)
        self._processes = processes
        if self.compiled is not None:
            self.compiled.check_stages()

    def pending_gradients(self) -> dict[str, Tensor]:
        """Gradients that are being accumulated, by parameter name."""
        return {name: p.grad for name, p in self.named_parameters() if p.grad is not None}

    def restore_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Go on accumulating from `pending_gradients`; parameters that are not among them have none."""
        for name, parameter in self.named_parameters():
            gradient = gradients.get(name)
            parameter.grad = None if gradient is None else gradient.to(parameter.device)

    def forward(self, x: Tensor) -> Tensor:
        """The ordinary forward pass of the network, shape ``(batch, *output)``."""
        output: Tensor = self.network(x)
        return output

    def make_optimizer(self) -> Optimizer:
        """A new optimizer over the network's parameters, as the weight solver wants it.

        Raises:
            TypeError: If the weight solver's factory returns something else.
            ValueError: If a trainable parameter is missing, or the optimizer is LBFGS.
        """
        optimizer = self.weights.optimizer(self.coded.stages)
        check_optimizer(optimizer, self.coded.stages)
        return optimizer

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer of `step`, made at first use, after the module was moved to its device."""
        if self._optimizer is None:
            self._optimizer = self.make_optimizer()
        return self._optimizer

    @property
    def guard(self) -> Guard:
        """The guard against bad batches, fit for the device the parameters are on.

        On an accelerator a bad batch is reported by its ``check()`` alone, which waits for the device.
        """
        device = self._probe[0].device
        if device.type != self._guarded:
            guard = guard_for(device, self._nonfinite)
            guard.follow(self._guard)
            self._guard, self._guarded = guard, device.type
        return self._guard

    def get_extra_state(self) -> Tensor:
        """The number of batches seen: solvers that measure now and then go on measuring at the same batches."""
        return torch.tensor(self.batches_seen)

    def set_extra_state(self, state: Tensor) -> None:
        self.batches_seen = int(state)

    def explain(self, x: Tensor | None = None) -> str:
        """A table of the stages, see `CodedNetwork.explain`, and what the weight solver keeps for them."""
        return "\n\n".join(part for part in (self.coded.explain(x), self.weights.explain()) if part)

    def verify(self, x: Tensor, y: Any, tolerance: float = 1e-10) -> Verification:
        """Compare this model's engines with autograd on a batch, leaving everything as it was; see `verify`."""
        return verify(self, x, y, tolerance)

    def _evidence(self, step: Step) -> list[Tensor]:
        # BatchNorm divides by its deviation, so a huge value spoils the running variance and no gradient.
        evidence = [step.loss, *(n.running_var.sum() for n in self.norms if n.running_var is not None)]
        evidence += self.weights.evidence()
        return evidence if step.y is step.given else evidence + self.local_loss.evidence(step.output, step.given)


def _refuse_half_precision(network: nn.Module) -> None:
    if any(parameter.dtype == torch.float16 for parameter in network.parameters()):
        raise ValueError(
            "network has parameters in float16, in which most moves of lower codes are zero: keep them in float32 "
            "(network.float()) and compute in 16 bits by Trainer(precision='bf16-mixed') or torch.autocast"
        )
