"""Different weight solvers for different layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_altmin.engines import Gradients
from lightning_altmin.losses import LocalLoss
from lightning_altmin.objective import AltMinObjective
from lightning_altmin.optim import LayerwiseOptimizer
from lightning_altmin.stage import Stage
from lightning_altmin.weights.base import Inputs, WeightProblem, WeightSolver
from lightning_altmin.weights.local_gradient import DEFAULT

OUTPUT = "output"
"""Key for the output stage, whatever its name is."""


class LayerwiseWeights(WeightSolver):
    """A weight solver for each layer, all stepped together in the one optimizer step of a batch.

    Args:
        solvers: Weight solvers by stage name (see ``core.explain()``), with the key ``"output"`` for the last stage
            and ``"default"`` for those not named: ``{"output": LocalGradient(), "default": CoactivationMemory()}``.

    Raises:
        TypeError: If a solver is none.
        ValueError: If there is no solver, or one takes several weight steps per batch and another does not.
    """

    def __init__(self, solvers: Mapping[str, WeightSolver]) -> None:
        super().__init__()
        if not solvers:
            raise ValueError("solvers must name at least one weight solver, got none")
        for name, solver in solvers.items():
            if not isinstance(solver, WeightSolver):
                raise TypeError(f"solvers[{name!r}] must be a WeightSolver, got {solver!r}")
        if len(set(map(id, solvers.values()))) < len(solvers):
            raise ValueError("solvers has one solver under two names; make one for each")
        steps = {name: solver.steps for name, solver in solvers.items()}
        if len(set(steps.values())) > 1:
            raise ValueError(f"solvers must take the same number of weight steps per batch, got {steps}")
        self.steps = next(iter(steps.values()))
        self.sets_weights = any(solver.sets_weights for solver in solvers.values())
        self.traceable = all(solver.traceable for solver in solvers.values())
        self._names = list(solvers)
        self._solvers = nn.ModuleList(solvers.values())

    def _solver(self, stage: Stage) -> WeightSolver:
        solvers: dict[str, WeightSolver] = dict(zip(self._names, self._solvers, strict=True))  # type: ignore[arg-type]
        for name in (stage.name, OUTPUT if stage.is_output else DEFAULT, DEFAULT):
            if name in solvers:
                return solvers[name]
        raise ValueError(f"solvers gives nothing for stage {stage.name!r}; add it or {DEFAULT!r}")

    def check(self, stages: Sequence[Stage], objective: AltMinObjective, loss: LocalLoss) -> None:
        for solver in self._solvers:
            solver.check([s for s in stages if self._solver(s) is solver], objective, loss)  # type: ignore[operator]

    def inputs_of(self, stage: Stage) -> Inputs:
        return self._solver(stage).inputs_of(stage)

    def optimizer(self, stages: Sequence[Stage]) -> Optimizer:
        names = {stage.name for stage in stages}
        if unknown := set(self._names) - names - {OUTPUT, DEFAULT}:
            raise ValueError(f"solvers names unknown stages {sorted(unknown)}; the network has {sorted(names)}")
        served = {id(self._solver(stage)) for stage in stages}
        idle = [n for n, solver in zip(self._names, self._solvers, strict=True) if id(solver) not in served]
        if OUTPUT in idle:
            raise ValueError(
                f"solvers names the last stage twice, as {stages[-1].name!r} and as {OUTPUT!r}; leave one of them out"
            )
        children = {}
        for name, solver in zip(self._names, self._solvers, strict=True):
            own = [stage for stage in stages if self._solver(stage) is solver]
            if any(p.requires_grad for stage in own for p in stage.parameters()):
                children[name] = solver.optimizer(own)  # type: ignore[operator]
        if not children:
            raise ValueError("network has no trainable parameter")
        return LayerwiseOptimizer(_flat(children))

    def kept_for(self, stage: Stage) -> Sequence[nn.Module]:
        return self._solver(stage).kept_for(stage)

    def gradients(self, problem: WeightProblem) -> Gradients:
        return self._solver(problem.stage).gradients(problem)

    def complete(self, gradients: Gradients) -> Gradients:
        for solver in self._solvers:
            gradients = solver.complete(gradients)  # type: ignore[operator]
        return gradients

    def measured(self) -> list[Tensor]:
        return [value for solver in self._solvers for value in solver.measured()]  # type: ignore[operator]

    def learn(self, sums: Sequence[Tensor]) -> None:
        for solver in self._solvers:
            count = len(solver.measured())  # type: ignore[operator]
            solver.learn(sums[:count])  # type: ignore[operator]
            sums = sums[count:]

    def evidence(self) -> list[Tensor]:
        return [scalar for solver in self._solvers for scalar in solver.evidence()]  # type: ignore[operator]

    def discount(self, factor: float, stages: Sequence[str] | None = None) -> None:
        """Give what memories have seen so far less weight; see ``CoactivationMemory.discount``."""
        for solver in self._solvers:
            if hasattr(solver, "discount"):
                solver.discount(factor, stages)  # type: ignore[operator]

    def begin_task(self, stages: Sequence[str] | None = None) -> None:
        """Count what follows as a new task in memories with a window; see ``CoactivationMemory.begin_task``.

        Raises:
            ValueError: If there is no such memory.
        """
        windowed = [solver for solver in self._solvers if getattr(solver, "window", None) is not None]
        if not windowed:
            raise ValueError("begin_task is for memories with a window, there is none: CoactivationMemory(window=...)")
        for solver in windowed:
            solver.begin_task(stages)  # type: ignore[operator]

    def explain(self) -> str:
        return "\n\n".join(text for solver in self._solvers if (text := solver.explain()))  # type: ignore[operator]


def _flat(children: Mapping[str, Optimizer]) -> dict[str, Optimizer]:
    """Composites opened, so that the guard and merging find the optimizers themselves."""
    flat: dict[str, Optimizer] = {}
    for name, child in children.items():
        if isinstance(child, LayerwiseOptimizer):
            flat |= {f"{name}/{inner}": grandchild for inner, grandchild in child.children.items()}
        else:
            flat[name] = child
    return flat
