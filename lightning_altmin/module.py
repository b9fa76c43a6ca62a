"""AltMin in the Lightning Trainer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_altmin.altmin import AltMin
from lightning_altmin.arguments import check_count, check_number
from lightning_altmin.codes import CodeSolver
from lightning_altmin.guard import NonFiniteError, Policy
from lightning_altmin.metrics import Metrics
from lightning_altmin.network import CodedNetwork
from lightning_altmin.objective import AltMinObjective
from lightning_altmin.optim import clip_per_group, equal_groups_merged
from lightning_altmin.parallel import LayerParallel
from lightning_altmin.step import Step
from lightning_altmin.supervised import SchedulerFactory, SupervisedModule
from lightning_altmin.trainer.checks import (
    refuse_replaced,
    refuse_skipping_in_groups,
    refuse_unsupported,
)
from lightning_altmin.trainer.layer_sync import keep_modules
from lightning_altmin.trainer.loss_scaling import without_loss_scaling
from lightning_altmin.trainer.sharing import processes_of, refuse_strategy
from lightning_altmin.trainer.sigterm import end_together_on_sigterm
from lightning_altmin.weights import LocalGradient, WeightSolver
from lightning_altmin.weights.local_gradient import OptimizerFactory

_PENDING = "lightning_altmin_pending_gradients"
_HOPELESS = 10  # bad batches in an epoch that are half of it: the model's fault, not the data's
_NOTHING_PENDING: dict[str, Any] = {"batches": 0, "admitted": 0, "gradients": {}}


class AltMinModule(SupervisedModule):
    """A LightningModule trained by online alternating minimization; use it as it is, or subclass it.

    Args:
        network: The network, or a list of blocks, trained in place; see `CodedNetwork` for what can be split. ``None``
            calls `build_network`, which a subclass overrides.
        loss: ``loss(output, target)``, a mean over the batch; cross-entropy if not given.
        codes: How codes are moved; `CurvatureCodes` if not given.
        weights: How weights are changed; `LocalGradient` with its defaults if not given.
        objective: Constants of the objective; `AltMinObjective` with its defaults if not given.
        metrics: torchmetrics to log in validation and test; accuracy for class and binary targets if not given.
        lr_scheduler: Makes a scheduler from the optimizer. Stepped by this module.
        lr_interval: Step the scheduler per ``"epoch"`` or per optimizer ``"step"``.
        lr_frequency: Step it at every n-th of these, >= 1.
        lr_monitor: Logged value that a ``ReduceLROnPlateau`` watches.
        gradient_clip_norm: Bound on each layer's gradient norm, > 0; one number, or numbers by layer name.
        accumulate_batches: Average the gradients of this many batches per optimizer step, >= 1.
        nonfinite: What a batch does whose data, loss or gradients are NaN, inf or of squares that overflow: ``"raise"``
            or ``"skip"``. Neither changes parameters, optimizer state or buffers, but by good weight steps before the
            bad one. An epoch with ten bad batches or more that make up over half of it raises in any case.
        compile: Run a batch's phases as one compiled function: ``True`` or a mode of ``torch.compile``; see `AltMin`.

    Raises:
        ValueError: If a setting is out of range or names an unknown layer.
        TypeError: If an argument is of the wrong kind.

    There is one optimizer towards Lightning: a batch is one ``global_step`` (``accumulate_batches`` batches are).
    """

    def __init__(
        self,
        network: nn.Module | CodedNetwork | Sequence[nn.Module] | None = None,
        loss: nn.Module | Callable[[Tensor, Any], Tensor] | None = None,
        codes: CodeSolver | None = None,
        weights: WeightSolver | None = None,
        objective: AltMinObjective | None = None,
        metrics: Metrics | None = None,
        lr_scheduler: SchedulerFactory | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        lr_frequency: int = 1,
        lr_monitor: str | None = None,
        gradient_clip_norm: float | dict[str, float] | None = None,
        accumulate_batches: int = 1,
        nonfinite: Policy = "raise",
        compile: bool | str = False,
    ) -> None:
        loss = nn.CrossEntropyLoss() if loss is None else loss
        super().__init__(loss, metrics, lr_scheduler, lr_interval, lr_frequency, lr_monitor)
        self.automatic_optimization = False
        self.core = AltMin(
            self.build_network() if network is None else network,
            loss,
            objective=self.build_objective() if objective is None else objective,
            codes=codes,
            weights=self._with_layer_optimizers(weights),
            nonfinite=nonfinite,
            compile=compile,
        )
        self._check_accumulation(accumulate_batches, compile, gradient_clip_norm)
        self.skips_nonfinite = nonfinite == "skip"
        self._check_clip(gradient_clip_norm)
        self.gradient_clip_norm = gradient_clip_norm
        self.accumulate_batches = accumulate_batches
        self._skipped_before = self._seen_before = 0  # bad batches, and all, of earlier epochs
        self._pending = 0  # batches since the last optimizer step
        self._admitted = 0  # how many of them were good
        self._steps_are_watched = False  # by a hook that sees, and may change, the optimizer's groups
        self._saved_pending: dict[str, Any] | None = None
        self.dealt_out: LayerParallel | None = None
        """Set by `LayerParallelStrategy` for the time of a run."""
        self.keep_codes = False
        """Set by a callback in ``on_train_batch_start`` to find the batch's `Step`, with codes, in its outputs."""

    # ---------------------------------------------------------------- to override

    def build_network(self) -> nn.Module:
        """The network of a subclass that is not given one.

        Raises:
            TypeError: Unless overridden.
        """
        raise TypeError("network must be given, or build_network overridden")

    def build_objective(self) -> AltMinObjective:
        """The objective when none is given. Subclass `AltMinObjective` for another local loss of hidden layers."""
        return AltMinObjective()

    def layer_optimizers(self) -> Mapping[str, OptimizerFactory]:
        """Optimizers of layers that are to have one of their own, by layer name (see ``core.explain()``)."""
        return {}

    def settings(self) -> dict[str, str]:
        """Also the weights of l1 terms, which are no buffers and would silently be those of the constructor."""
        terms = {name: repr(getattr(self.core.objective, name)) for name in ("lambda_w", "lambda_c")}
        return super().settings() | terms

    def _settings_in_words(self) -> str:
        own = {name: getattr(self, name) for name in ("gradient_clip_norm", "accumulate_batches")}
        return ", ".join(f"{name}={value}" for name, value in (self.settings() | own).items())

    # ---------------------------------------------------------------- training

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """One batch: encode, solve codes, update weights."""
        x, y = self.unpack(batch)
        step = self.stepper.encode(x, y, self.keep_codes)
        with step.undone_on_error():
            self.stepper.solve_codes(step)
            stepped = self.update_weights(step)
        self.log_training_loss(step.loss)
        self._step_schedules(stepped)
        if self.at_log_point:
            self.core.guard.check()
        return {"loss": step.loss, "step": step} if self.keep_codes else {"loss": step.loss}

    def update_weights(self, step: Step) -> bool:
        """The weight step; its last optimizer step goes through Lightning's wrapper, which counts a global step.

        Returns:
            Whether the optimizer stepped (``False`` while batches accumulate).
        """
        wrapped: Any = self.optimizers()
        last = self.core.weights.steps - 1
        for inner in range(last):
            self._admitted += self.stepper.fill_gradients(step, inner)
            self._apply_gradients(wrapped.optimizer, wrapped.optimizer.step)
        self._admitted += self.stepper.fill_gradients(step, last)
        self._pending += 1
        if self._pending < self.accumulate_batches and not self._epoch_is_over:
            return False
        self._apply_gradients(wrapped.optimizer, wrapped.step)
        self._pending = 0
        return True

    def _apply_gradients(self, optimizer: Optimizer, step: Callable[[], Any]) -> None:
        if self._admitted > 1:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            torch._foreach_div_(gradients, self._admitted)
        if self.gradient_clip_norm is not None:
            clip_per_group(optimizer, self.gradient_clip_norm)
        groups = nullcontext() if self._steps_are_watched else equal_groups_merged(optimizer)
        with self.core.guard.protect(optimizer), groups, without_loss_scaling(self.trainer):
            step()
        optimizer.zero_grad()
        self._admitted = 0

    def _step_schedules(self, stepped: bool) -> None:
        """Step schedules where Lightning would under automatic optimization, so that checkpoints hold the same."""
        for config in self.trainer.lr_scheduler_configs:
            if config.interval == "step":
                due = stepped
            else:  # a plateau waits for the epoch's validation
                due = self._epoch_is_over and not isinstance(config.scheduler, ReduceLROnPlateau)
            if due:
                self.step_schedule(config.scheduler, config.interval, config.frequency)

    @property
    def _epoch_is_over(self) -> bool:
        # A loader without a length does not know that limit_train_batches ends the epoch.
        return self.trainer.is_last_batch or self.trainer.fit_loop.batch_idx + 1 >= self.trainer.num_training_batches

    # ---------------------------------------------------------------- Lightning's hooks

    def forward(self, x: Tensor) -> Tensor:
        """The ordinary forward pass of the network."""
        output: Tensor = self.stepper(x)
        return output

    @property
    def stepper(self) -> AltMin | LayerParallel:
        """Who runs the phases of a batch: the core, or its layers dealt out among processes."""
        return self.core if self.dealt_out is None else self.dealt_out

    @property
    def network(self) -> nn.Module:
        """The user's network."""
        return self.core.network

    def configure_callbacks(self) -> Any:
        """The first hook of a run, before Lightning checks its arguments: refuse those that ours replace."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            refuse_strategy(self.trainer)
            keep_modules(self.trainer)
            refuse_replaced(self.trainer)
        return super().configure_callbacks()

    def setup(self, stage: str) -> None:
        """Refuse Trainer features that cannot work, before anything else happens."""
        super().setup(stage)
        if stage == "fit":
            refuse_unsupported(self.trainer, self.core.coded)
            self.core.processes = processes_of(self.trainer, self._settings_in_words())
            if self.skips_nonfinite and self.accumulate_batches > 1:
                refuse_skipping_in_groups(self.trainer)
            # Lightning warns that the checkpoint holds the state *after* the step, as every checkpoint should.
            warnings.filterwarnings("ignore", "Using ModelCheckpoint with manual optimization")

    def configure_optimizers(self) -> Any:
        """One optimizer over all layers, with a named parameter group per layer, and the schedule."""
        return self.optimizer_configuration(self.stepper.make_optimizer())

    def on_train_start(self) -> None:
        """Begin with the gradients that were being accumulated when the checkpoint was written, if there is one."""
        super().on_train_start()
        end_together_on_sigterm(self.trainer)
        hook, callbacks = "on_before_optimizer_step", self.trainer.callbacks  # type: ignore[attr-defined]
        self._steps_are_watched = is_overridden(hook, self) or any(is_overridden(hook, c, Callback) for c in callbacks)
        self.core.split_verified = not self.core.coded.split_found  # what a forward reads may have changed since
        if not self.resuming:
            self.core.batches_seen = 0
        pending = self._saved_pending if self.resuming and self._saved_pending else _NOTHING_PENDING
        self._pending, self._admitted = pending["batches"], pending["admitted"]
        self._saved_pending = None
        self.stepper.restore_gradients(pending["gradients"])
        self._seen_before, self._skipped_before = self.core.batches_seen, self.core.guard.skipped

    def on_train_epoch_end(self) -> None:
        """Report bad batches; step a schedule that watches a value of the epoch."""
        self.core.guard.check()
        if (skipped := self.core.guard.skipped) > self._skipped_before:
            new, seen = skipped - self._skipped_before, self.core.batches_seen - self._seen_before
            self._skipped_before = skipped
            if new >= _HOPELESS and 2 * new > seen:  # single bad batches are the data's fault, most of them are not
                raise NonFiniteError(
                    f"epoch {self.current_epoch}: {new} of {seen} batches were bad. With so many the model itself has "
                    "probably diverged in a step before: lower the learning rates, or go on from an older checkpoint"
                )
            rank_zero_info(
                f"epoch {self.current_epoch}: {new} bad batches were left out (NaN or inf in the data, or gradients "
                "that diverged)"
            )
        self._seen_before = self.core.batches_seen
        super().on_train_epoch_end()

    def on_validation_model_zero_grad(self) -> None:
        """Keep gradients that are being accumulated across a validation in mid-epoch."""
        self.hold_random_state()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Report bad batches first; add gradients that are being accumulated."""
        self.core.guard.check()
        super().on_save_checkpoint(checkpoint)
        if self._pending:
            checkpoint[_PENDING] = {
                "batches": self._pending,
                "admitted": self._admitted,
                "gradients": self.stepper.pending_gradients(),
            }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._saved_pending = checkpoint.get(_PENDING)

    def _with_layer_optimizers(self, weights: WeightSolver | None) -> WeightSolver | None:
        factories = self.layer_optimizers()
        if not factories:
            return weights
        weights = LocalGradient() if weights is None else weights
        if not isinstance(weights, LocalGradient):
            raise TypeError(f"layer_optimizers needs weights=LocalGradient(...), got {type(weights).__name__}")
        return weights.with_layers(factories)

    def _check_accumulation(self, accumulate_batches: int, compile: bool | str, clip: object) -> None:
        check_count("accumulate_batches", accumulate_batches)
        if accumulate_batches > 1 and self.core.weights.steps > 1:
            raise ValueError(
                f"accumulate_batches={accumulate_batches} needs one weight step per batch, weights.steps is "
                f"{self.core.weights.steps}"
            )
        if accumulate_batches > 1 and isinstance(compile, str):
            raise ValueError(
                f"accumulate_batches={accumulate_batches} needs compile=True or False, got compile={compile!r}: a CUDA "
                "graph would overwrite the gradients that are being accumulated"
            )
        if self.core.weights.sets_weights and (accumulate_batches > 1 or clip is not None):
            raise ValueError(
                "weights: these solve for the weights of some layers, which cannot be averaged or clipped on the way; "
                f"leave out accumulate_batches={accumulate_batches} and gradient_clip_norm={clip}"
            )

    def _check_clip(self, clip: float | dict[str, float] | None) -> None:
        names = {stage.name for stage in self.core.coded.stages}
        bounds = clip if isinstance(clip, Mapping) else {"": clip}
        if isinstance(clip, Mapping) and (unknown := set(clip) - names):
            raise ValueError(
                f"gradient_clip_norm names unknown layers {sorted(unknown)}; the network has {sorted(names)}"
            )
        for name, bound in bounds.items():
            if bound is not None and bound != math.inf:
                if isinstance(clip, Mapping):
                    check_number(f"gradient_clip_norm[{name!r}]", bound, above=0)
                else:
                    check_number("gradient_clip_norm", bound, above=0, otherwise="numbers by layer name")
