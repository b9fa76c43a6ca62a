"""What the code step and the weight step do to each layer, while training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_altmin.altmin import AltMin
from lightning_altmin.arguments import check_number
from lightning_altmin.callbacks.altmin_access import altmin_module, refuse_dealt_out
from lightning_altmin.callbacks.dead_units import alive_units
from lightning_altmin.callbacks.layer_watch import LayerWatch
from lightning_altmin.module import AltMinModule
from lightning_altmin.network import CodedNetwork
from lightning_altmin.objective import ReferenceObjective
from lightning_altmin.step import Step


class CodeMonitor(LayerWatch):
    """Logs what the code step and the weight step do, at every n-th batch.

    For every hidden layer:

    - ``codes/<layer>/displacement``: ``||c - c_forward|| / ||c_forward||`` over the whole batch;
    - ``codes/<layer>/residual_before`` and ``residual_after``: ``||f_l(input) - c_l||^2``, features summed, averaged
      over the batch, at the weights before and after the optimizer step (when gradients are accumulated, most batches
      take no step and the two are equal). ``input`` is what the weight solver reads: moved or forward codes;
    - ``codes/<layer>/dead_units``: share of units whose activation has no slope at any sample of the batch, at the
      forward codes (see `alive_units`); not logged for a layer that is not read by an elementwise activation of torch;

    - ``codes/<layer>/steps``: how many steps a sample's code took, averaged over the batch; logged for code solvers
      that stop by themselves (``GradientCodes(tol=...)``).

    And for the network ``codes/objective_before`` and ``codes/objective_after``: the objective J of one sample,
    averaged over the batch, before and after the code step, at the weights before the weight step. Under the reference
    objective it is that objective's own value, which is a mean already.

    A measured batch keeps all its codes and a copy of the network, and evaluates the layers three times more. Others
    cost nothing. Of several processes all log the numbers of the whole batch, which takes one more all-reduce.

    Args:
        every_n_steps: Measure at every n-th batch, >= 1.
        dead_slope: Largest absolute slope of an activation that counts as none, >= 0.

    Raises:
        ValueError: If an argument is out of its range.
        MisconfigurationException: At the start of fit, if the module is not an `AltMinModule`.
    """

    def __init__(self, every_n_steps: int = 50, dead_slope: float = 1e-3) -> None:
        super().__init__(every_n_steps)
        check_number("dead_slope", dead_slope, least=0)
        self.dead_slope = dead_slope
        self._before: CodedNetwork | None = None  # a copy at the weights before the weight step of a measured batch
        self._asked = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the module."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            altmin_module(pl_module, self)
            refuse_dealt_out(trainer, self)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Ask for the codes of this batch, if it is to be measured."""
        module = altmin_module(pl_module, self)
        self._take_back(module)  # where somebody left the batch before out, after it had been asked for
        self._before = copy.deepcopy(module.core.coded) if self.is_due(trainer) else None
        # Who asked takes the request back; somebody else, or the user, may want the codes of every batch.
        self._asked = self._before is not None and not module.keep_codes
        if self._asked:
            module.keep_codes = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure the batch.

        Raises:
            MisconfigurationException: If an overridden ``training_step`` does not hand out the batch's codes.
        """
        if self._before is None:
            return
        module = altmin_module(pl_module, self)
        self._take_back(module)
        if not (isinstance(outputs, dict) and isinstance(outputs.get("step"), Step)):
            raise MisconfigurationException(
                f"{type(module).__name__}.training_step must return {{'loss': step.loss, 'step': step}} while "
                "keep_codes is set, as AltMinModule's does"
            )
        self.record(trainer, module, self._measure(module.core, self._before, outputs["step"]))
        self._before = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the request back: the batch that was to be measured has failed."""
        self._take_back(altmin_module(pl_module, self))
        self._before = None

    def _take_back(self, module: AltMinModule) -> None:
        if self._asked:
            module.keep_codes = self._asked = False

    @torch.no_grad()
    def _measure(self, core: AltMin, before: CodedNetwork, step: Step) -> dict[str, Tensor]:
        found = _summed(self._sums(core, before, step), core.processes.sum)
        samples = found.pop("samples")
        values: dict[str, Tensor] = {}
        for layer in before.stages[:-1]:
            group = f"codes/{layer.name}"
            values[f"{group}/displacement"] = (found[f"{group}/moved"] / found[f"{group}/size"]).sqrt()
            for name in (f"{group}/residual_before", f"{group}/residual_after"):
                values[name] = found[name] / samples
            if f"{group}/steps" in found:
                values[f"{group}/steps"] = found[f"{group}/steps"] / samples
            if f"{group}/alive" in found:
                values[f"{group}/dead_units"] = (found[f"{group}/alive"] == 0).to(samples.dtype).mean()
        for name in ("codes/objective_before", "codes/objective_after"):
            values[name] = found[name] if isinstance(core.objective, ReferenceObjective) else found[name] / samples
        return values

    def _sums(self, core: AltMin, before: CodedNetwork, step: Step) -> dict[str, Tensor]:
        """What is measured, as sums over the samples of this process."""
        sums = {"samples": step.loss.new_full((), float(step.x.shape[0]))}
        residuals_before, residuals_after = _residuals(core, before, step), _residuals(core, core.coded, step)
        makers = before.makers(len(step.codes_forward))
        for index, layer in enumerate(before.stages[:-1]):
            own = [level for level, maker in enumerate(makers) if maker == index]  # of a recurrent layer, one per step
            forward, move = (
                torch.stack([tensors[level] for level in own]) for tensors in (step.codes_forward, step.moves)
            )
            group = f"codes/{layer.name}"
            sums[f"{group}/moved"] = move.square().sum()
            sums[f"{group}/size"] = forward.square().sum()
            sums[f"{group}/residual_before"] = residuals_before[index]
            sums[f"{group}/residual_after"] = residuals_after[index]
            taken = [steps for level in own if (steps := step.code_steps[level]) is not None]
            if taken:
                sums[f"{group}/steps"] = torch.stack(taken).mean() * len(step.x)
            above = before.stages[makers[own[-1] + 1]]
            alive = alive_units(layer, above, step.codes_forward[own[-1]], self.dead_slope)
            if alive is not None:
                sums[f"{group}/alive"] = alive
        sums["codes/objective_before"] = _objective(core, before, step, step.codes_forward)
        sums["codes/objective_after"] = _objective(core, before, step, step.codes)
        return sums


def _summed(own: dict[str, Tensor], over_processes: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The sums of all processes, in one exchange."""
    dtype = torch.float32
    for value in own.values():
        dtype = torch.promote_types(dtype, value.dtype)
    flat = over_processes(torch.cat([value.reshape(-1).to(dtype) for value in own.values()]))
    parts = torch.split(flat, [value.numel() for value in own.values()])
    return {name: part.view_as(value) for (name, value), part in zip(own.items(), parts, strict=True)}


def _residuals(core: AltMin, network: CodedNetwork, step: Step) -> list[Tensor]:
    """``||f_l(input) - c_l||^2`` of every hidden layer of ``network``, summed over the batch."""
    residuals = []
    for stage, problem in zip(network.stages, core.weight_problems(step), strict=True):
        if problem.move is not None:
            residual = stage.live(problem.input, problem.state).output() - problem.forward_output - problem.move
            residuals.append(residual.square().sum())
    return residuals


def _objective(core: AltMin, network: CodedNetwork, step: Step, codes: list[Tensor]) -> Tensor:
    """J at ``codes``, summed over the batch (the reference objective is a mean); held as the code step sees it."""
    objective = core.objective
    inputs = [network.first_input(step.x), *codes[:-1], network.output_input(codes)]
    stages = [network.stages[maker] for maker in network.makers(len(codes))]
    outputs = [s.fixed(x, state).output() for s, x, state in zip(stages, inputs, step.states, strict=True)]
    value = objective.code_loss_value(step.loss_at.elsewhere(outputs[-1]))
    for output, code in zip(outputs[:-1], codes, strict=True):
        value = value + objective.code_coupling_value(output - code) + objective.code_sparsity_value(code)
    return value
