"""AM-mem: each layer remembers sums of products of all it has seen, and takes its weights or its steps from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_altmin.arguments import check_number
from lightning_altmin.engines import Gradients
from lightning_altmin.losses import LocalLoss
from lightning_altmin.objective import AltMinObjective
from lightning_altmin.optim import LayerwiseOptimizer
from lightning_altmin.processes import Processes
from lightning_altmin.stage import Stage
from lightning_altmin.weights.base import Inputs, WeightProblem, WeightSolver
from lightning_altmin.weights.innovation import InnovationForm, Positions
from lightning_altmin.weights.least_squares_layer import least_squares_layer
from lightning_altmin.weights.local_gradient import OptimizerFactory, adam, trainable
from lightning_altmin.weights.memory_form import Memory, MemoryForm
from lightning_altmin.weights.solve import SolveForm, Storage
from lightning_altmin.weights.statistics import Statistics

Form = Literal["innovation", "solve"]
Equations = Literal["cholesky", "bcd"]

_FORMS: dict[str, type[MemoryForm[Any]]] = {"innovation": InnovationForm, "solve": SolveForm}
_OWN = {
    **dict.fromkeys(("step", "limit", "positions", "rank"), "innovation"),
    **dict.fromkeys(("solver", "lambda_w", "window", "storage"), "solve"),
}
"""Settings of one form only, and which it is."""


class CoactivationMemory(WeightSolver):
    r"""The co-activation memory (arXiv 1806.09077, AM-mem): layers with sufficient statistics of their inputs.

    Every layer keeps :math:`A = \sum a a^\top` of its inputs ``a``, discounted by ``forgetting`` per measurement; a
    trained bias is an appended one. Convolutions count every position of every sample.

    ``form="innovation"``, the default: :math:`W \leftarrow W + step \cdot \overline{D a^\top} (\bar A + ridge)^{-1}`,
    bars for means, ``D`` the change that the layer's own problem asks of its output: minus its gradient, which with one
    code step and forward inputs is backprop's. So this form is then backprop preconditioned by the inputs' second
    moments. The output layer takes part with the gradient of the loss.

    ``form="solve"``, the paper's: :math:`B = \sum c a^\top` is kept too, and every ``every`` batches ``W`` becomes the
    ridge solution (``solver="cholesky"``) or moves towards it by one sweep of `bcd` (``"bcd"``). The output layer is
    fitted to one-hot labels, or to the targets of a regression.

    Args:
        form: ``"innovation"`` or ``"solve"``.
        solver: ``"cholesky"`` or ``"bcd"``; of the solve form. (The innovation form inverts A by Cholesky factors.)
        ridge: Relative to mean(diag A). Innovation: in [0.1, 10], 1 if not given. Cholesky: >= 0, 1e-3 if not given.
        forgetting: Discount per measurement, in (0, 1]; if not given, 0.95 (innovation) or 1 (solve).
        step: Of the innovation form, in (0, 1]; 0.8 if not given. It is the optimizer's learning rate, which schedules
            may change.
        limit: Of the innovation form: largest change of a layer in one step, relative to its norm at the first step,
            > 0; 0.2 if not given. ``math.inf`` is no bound, and then large steps diverge in networks with convolutions.
        positions: Of the innovation form: what a convolution's sum over positions is divided by: ``"mean"``, their
            number, or its ``"root"``, which is used if not given. Changes asked for at neighbouring positions agree in
            part, so their mean is a timid step.
        rank: Of the innovation form: keep only this many leading directions of A in layers with more inputs than that;
            0 keeps its diagonal only. For wide layers.
        every: Batches from one use of new statistics to the next, >= 1. The innovation form measures at these batches
            (and at 1, 2, 4, ... before the first of them); the solve form solves at them and measures at all.
        lambda_w: Threshold of the shrinkage of ``"bcd"``, >= 0.
        window: Of the solve form: solve for this many latest tasks only, >= 1. `begin_task` says where they begin, or a
            ``MemoryPolicy("window")`` in a stream of tasks.
        storage: Of the solve form, how A is kept between batches: ``"full"``, if not given; ``"triangle"``, what its
            symmetry does not give, half of A's bytes for the same weights; or ``"single"``, the triangle in single
            precision, a quarter of them (sums are rounded, so ``ridge`` must be >= 1e-4).
        inputs: Which codes are the layers' inputs; if not given, ``"forward"``, but for hidden layers of the solve form
            ``"moved"``. The output layer's moved input knows the label: fitted to it, the layer would need that move.
        optimizer: Makes the optimizer of parameters that no memory holds: scales of a BatchNorm, a PReLU.

    Raises:
        ValueError: If a setting is out of its range or belongs to the other form; from `optimizer`, if a layer is
            neither Linear nor Conv2d, or a convolution has groups.

    What is frozen after the model was made keeps its value: a layer whose weight is frozen rests, and nothing is
    measured of it; a frozen bias is left out of what is solved for. Both go on once they are trained again.

    The whole of a batch is one optimizer step. ``LayerwiseWeights`` combines memories with other solvers:
    ``LayerwiseWeights({"output": LocalGradient(), "default": CoactivationMemory()})``. Several processes sum their
    statistics whenever they are used anew and before they are saved.
    """

    traceable = False

    def __init__(
        self,
        form: Form = "innovation",
        solver: Equations | None = None,
        ridge: float | None = None,
        forgetting: float | None = None,
        step: float | None = None,
        limit: float | None = None,
        positions: Positions | None = None,
        rank: int | None = None,
        every: int = 10,
        lambda_w: float = 0.0,
        window: int | None = None,
        storage: Storage | None = None,
        inputs: Inputs | None = None,
        optimizer: OptimizerFactory = adam,
    ) -> None:
        super().__init__()
        if inputs not in (None, "moved", "forward"):
            raise ValueError(f"inputs must be 'moved' or 'forward', got {inputs!r}")
        if not callable(optimizer):
            raise TypeError(f"optimizer must be a function of parameters, got {optimizer!r}")
        settings = {
            "solver": solver,
            "ridge": ridge,
            "forgetting": forgetting,
            "step": step,
            "limit": limit,
            "positions": positions,
            "rank": rank,
            "every": every,
            "lambda_w": lambda_w or None,
            "window": window,
            "storage": storage,
        }
        self._form = _form(form, **settings)
        self._given = {name: value for name, value in (settings | {"inputs": inputs}).items() if value is not None}
        self.form = form
        self.every = every
        self.forgetting = self._form.forgetting
        self.sets_weights = self._form.sets_weights
        self.window = window
        self._inputs = inputs
        self._others = optimizer
        self._memories: dict[str, Memory[Any]] = {}
        self._statistics = nn.Module()  # not a ModuleDict, which has no room for a layer called `keys`
        self._pending: list[tuple[Memory[Any], Tensor | None]] = []
        self._batch: int | None = None
        self._processes = Processes()
        self._measured = self._renews = False

    # ---------------------------------------------------------------- what the algorithm asks for

    def check(self, stages: Sequence[Stage], objective: AltMinObjective, loss: LocalLoss) -> None:
        """Refuse terms of the objective that a memory does not follow.

        Raises:
            ValueError: If there is an l1 term of the weights, codes are coupled otherwise than the form supposes, or
                it cannot follow the loss.
        """
        own = [stage for stage in stages if _is_for(stage)]
        if own:
            _refuse_l1(objective)
        if any(not stage.is_output for stage in own):
            self._form.check_objective(objective)
        if any(stage.is_output for stage in own):
            self._form.check_loss(loss)

    def inputs_of(self, stage: Stage) -> Inputs:
        if self._inputs is not None:
            return self._inputs
        return self._form.inputs_of(stage)

    def optimizer(self, stages: Sequence[Stage]) -> Optimizer:
        self._remember(stages)
        held, others = [], []
        for stage in stages:
            memory = self._memories.get(stage.name)
            if memory is not None:
                held.append({"params": memory.layer.parameters, "name": stage.name})
            if rest := _beside(stage, memory):
                others.append({"params": rest, "name": stage.name if memory is None else f"{stage.name} (rest)"})
        if not held and not others:
            raise ValueError("network has no trainable parameter")
        children: dict[str, Optimizer] = {}
        if held:
            children["memory"] = self._form.optimizer(held)
        if others:
            made = self._others(others)
            inner = made.children if isinstance(made, LayerwiseOptimizer) else {"others": made}
            children |= {f"others/{name}" if name != "others" else name: child for name, child in inner.items()}
        return LayerwiseOptimizer(children)

    def kept_for(self, stage: Stage) -> Sequence[nn.Module]:
        memory = self._memories.get(stage.name)
        return () if memory is None else (memory.statistics,)

    def gradients(self, problem: WeightProblem) -> Gradients:
        memory = self._memories.get(problem.stage.name)
        if memory is None:
            return problem.gradients()
        _refuse_l1(problem.objective)  # again, for it may have been changed
        layer, statistics = memory.layer, memory.statistics
        self._processes = problem.processes
        if problem.number != self._batch:  # what a batch that failed half-way has left behind
            self._batch, self._pending = problem.number, []
        self._measured, self._renews = self._form.measures(problem.number), self._form.renews(problem.number)
        if self._measured and not layer.is_frozen:
            target, weights = self._form.targets(problem, memory)
            rows = problem.live.layer_input(layer.layer)
            statistics.add(rows, target, weights, self.forgetting, self._processes.count)
        gradients: Gradients = []
        if _beside(problem.stage, memory):
            own = {id(p) for p in layer.parameters}
            gradients = [(p, g) for p, g in problem.smooth_gradients if id(p) not in own]
        if layer.is_frozen:
            return gradients
        if self._renews:
            self._pending.append((memory, self._form.pending(problem, memory)))
        elif (direction := self._form.direction(problem, memory)) is not None:
            gradients += layer.split(direction)
        return gradients

    def complete(self, gradients: Gradients) -> Gradients:
        if not self._renews:
            return gradients
        pending, self._pending = self._pending, []
        if self._processes.count > 1:  # measured in this batch, so they hold shares: no need to look
            self._sum([memory.statistics for memory, _ in pending])
        for memory, part in pending:
            gradients = gradients + memory.layer.split(self._form.renewed_direction(memory, part))
        return gradients

    def evidence(self) -> list[Tensor]:
        return [memory.statistics.energy() for memory in self._memories.values()] if self._measured else []

    # ---------------------------------------------------------------- the memories

    def synchronize(self) -> None:
        """Sum the statistics over processes, if they hold shares; all of them must call it, before a save for one."""
        if self._processes.count > 1:
            every = [memory.statistics for memory in self._memories.values()]
            self._sum([each for each in every if each.is_share])  # a layer at rest may be whole

    def _sum(self, shared: Sequence[Statistics]) -> None:
        if not shared:
            return
        # One flat collective over all layers: upper triangles of A, B, products with A, numbers of rows.
        parts = [each.packed() for each in shared]
        sums = torch.split(self._processes.sum(torch.cat(parts)), [part.numel() for part in parts])
        for each, whole in zip(shared, sums, strict=True):
            each.unpack(whole)

    def _save_to_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        self.synchronize()  # the statistics are children, and saved after this
        super()._save_to_state_dict(*arguments, **keywords)

    @torch.no_grad()
    def solve(self) -> None:
        """Set the weights of all layers to what their statistics ask for now: at the end of a stream, say.

        Raises:
            ValueError: Unless ``form="solve"``, and if nothing was seen.
        """
        if not isinstance(self._form, SolveForm):
            raise ValueError(f"form={self.form!r} keeps no targets to solve for; use form='solve'")
        self.synchronize()
        memories = {name: memory for name, memory in self._memories.items() if not memory.layer.is_frozen}
        if empty := [name for name, memory in memories.items() if float(memory.statistics.count()) == 0]:
            raise ValueError(f"the memories of stages {empty} have seen nothing to solve for; train on a batch first")
        for memory in memories.values():
            for parameter, value in memory.layer.split(self._form.solution(memory)):
                parameter.copy_(value)

    @torch.no_grad()
    def begin_task(self, stages: Sequence[str] | None = None) -> None:
        """Count what follows as a new task, and drop tasks that leave the window; the weights stay as they are.

        With several processes, all of them must call it.

        Args:
            stages: Names of the stages whose memories it is for; ``None`` for all.

        Raises:
            ValueError: If there is no ``window``.
        """
        if self.window is None:
            raise ValueError("begin_task drops tasks that leave the window, but no window was given; set window=...")
        self.synchronize()  # a task that is over is kept as a whole
        for name, memory in self._memories.items():
            if stages is None or name in stages:
                memory.statistics.begin_task()

    @torch.no_grad()
    def discount(self, factor: float, stages: Sequence[str] | None = None) -> None:
        """Give what was seen so far less weight, as at a switch of tasks; the weights stay as they are.

        Args:
            factor: What sums are multiplied by, in [0, 1]; 0 forgets.
            stages: Names of the stages whose memories it is for; ``None`` for all, and names without memory are
                passed over.

        Raises:
            ValueError: If ``factor`` is out of range.
        """
        check_number("factor", factor, least=0, most=1)
        for name, memory in self._memories.items():
            if stages is None or name in stages:
                memory.statistics.discount(factor)

    def explain(self) -> str:
        """What each memory holds, and what measuring a row (sample and position) and renewing it cost."""
        rows = [("memory", "statistics", "megabytes", "multiply-adds per row measured", "per renewal")]
        for memory in self._memories.values():
            statistics = memory.statistics
            held = sum(buffer.numel() * buffer.element_size() for buffer in statistics.buffers())
            per_row, renewal = statistics.products
            rows.append((memory.stage.name, statistics.shape, f"{held / 1e6:.2f}", f"{per_row:,}", f"{renewal:,}"))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in ({"form": self.form} | self._given).items())

    def _remember(self, stages: Sequence[Stage]) -> None:
        """Make a memory for each trained layer, once; the optimizer may be asked for again.

        Raises:
            ValueError: If there are memories of another network's layers.
        """
        if self._memories:
            known = {name: memory.layer.layer for name, memory in self._memories.items()}
            here = {stage.name: stage.affine[0] for stage in stages}
            if any(here.get(name) is not layer for name, layer in known.items()):
                raise ValueError("weights: this CoactivationMemory belongs to another model; make one for each")
            return
        for stage in stages:
            if not _is_for(stage):
                continue
            layer = least_squares_layer(stage)
            statistics = self._form.statistics(layer)
            memory: Memory[Any] = Memory(stage, layer, statistics)
            self._form.check(memory)
            self._memories[stage.name] = memory
            self._statistics.add_module(stage.name.replace(".", "/"), statistics)


def _is_for(stage: Stage) -> bool:
    """Whether the stage's layer is to have a memory: unless there is nothing to train, or its weight is frozen."""
    weight = getattr(stage.affine[0], "weight", None)
    return bool(trainable(stage)) and not (isinstance(weight, nn.Parameter) and not weight.requires_grad)


def _refuse_l1(objective: AltMinObjective) -> None:
    if objective.lambda_w > 0:
        raise ValueError(
            f"the objective has lambda_w={objective.lambda_w:g}, which a memory does not follow; use "
            "CoactivationMemory(form='solve', solver='bcd', lambda_w=...)"
        )


def _beside(stage: Stage, memory: Memory[Any] | None) -> list[nn.Parameter]:
    """Trained parameters of a stage that its memory does not hold."""
    own = set() if memory is None else {id(p) for p in memory.layer.parameters}
    return [p for p in trainable(stage) if id(p) not in own]


def _form(form: str, **settings: Any) -> MemoryForm[Any]:
    """The form with the settings that were given, those that are not ``None``.

    Raises:
        ValueError: If a setting belongs to the other form.
    """
    if form not in _FORMS:
        raise ValueError(f"form must be 'innovation' or 'solve', got {form!r}")
    given = {name: value for name, value in settings.items() if value is not None}
    if form == "innovation" and given.get("solver") == "cholesky":
        del given["solver"]  # which is how it inverts A
    for name, value in given.items():
        if name in _OWN and _OWN[name] != form:
            raise ValueError(f"{name}={value!r} belongs to form={_OWN[name]!r}, got form={form!r}; leave it out")
    return _FORMS[form](**given)
