"""What AltMin and its backprop twin share as LightningModules: batches, metrics, logging, schedules, exact resume."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torchmetrics import MetricCollection

from lightning_altmin.arguments import check_count
from lightning_altmin.losses import local_loss
from lightning_altmin.metrics import Metrics, metric_collection
from lightning_altmin.trainer.checkpoint_files import check_checkpoints, damage_named, refuse_other_model
from lightning_altmin.trainer.exact_resume import ExactResume

if TYPE_CHECKING:
    from typing_extensions import Self

SchedulerFactory = Callable[[Optimizer], LRScheduler]
INPUT_KEYS = ("x", "input", "inputs", "image", "images", "img")
_TARGET_KEYS = ("y", "target", "targets", "label", "labels")
_SETTINGS = "lightning_altmin_settings"
_WATCHED = "lightning_altmin_watched_value"
_LOSS = "lightning_altmin_training_loss"  # of the batches since the last log point


class SupervisedModule(ExactResume):
    """Base of `AltMinModule` and `BackpropModule`; they differ in how a batch changes the weights and in nothing else.

    Logs ``train_loss`` (mean since the last log point), ``val_loss``, ``test_loss`` and every metric with the prefix
    ``val_`` or ``test_``. Checkpoints hold the state of the random number generators, so that a resumed run goes on
    exactly as the uninterrupted one.
    """

    def __init__(
        self,
        loss: nn.Module | Callable[[Tensor, Any], Tensor],
        metrics: Metrics | None,
        lr_scheduler: SchedulerFactory | None,
        lr_interval: Literal["epoch", "step"],
        lr_frequency: int,
        lr_monitor: str | None,
    ) -> None:
        super().__init__()
        if lr_scheduler is not None and not callable(lr_scheduler):
            raise TypeError(
                "lr_scheduler must be a function that makes a scheduler from the optimizer, such as "
                f"lambda optimizer: StepLR(optimizer, 10), got {lr_scheduler!r}"
            )
        if lr_interval not in ("epoch", "step"):
            raise ValueError(f"lr_interval must be 'epoch' or 'step', got {lr_interval!r}")
        check_count("lr_frequency", lr_frequency)
        self._local_loss = local_loss(loss)
        self._loss_name = _describe_loss(loss)
        collection = metric_collection(metrics, loss)
        self.val_metrics = collection.clone(prefix="val_")
        self.test_metrics = collection.clone(prefix="test_")
        self._further = _no_metrics()  # of the loaders after the first of a run
        self._scheduler_factory = lr_scheduler
        self._lr_interval = lr_interval
        self._lr_frequency = lr_frequency
        self._lr_monitor = lr_monitor
        self._loss_sum: Tensor | None = None
        self._loss_count: Tensor | int = 0
        self._watched: float | None = None
        self._watched_epoch: int | None = None

    skips_nonfinite = False
    """Whether a bad batch is left out; its loss then is left out of the mean that is logged."""

    # ---------------------------------------------------------------- to override

    def unpack(self, batch: Any) -> tuple[Tensor, Any]:
        """Inputs and targets of a batch: a pair, or a dictionary with keys like ``x``/``y`` or ``image``/``label``.

        Raises:
            TypeError: If the batch is neither; override this method for another layout.
        """
        if isinstance(batch, Mapping):
            x = [batch[key] for key in INPUT_KEYS if key in batch]
            y = [batch[key] for key in _TARGET_KEYS if key in batch]
            if len(x) == 1 and len(y) == 1:
                return x[0], y[0]
            raise TypeError(
                f"batch is a dictionary with keys {list(batch)}; one of {INPUT_KEYS} and one of {_TARGET_KEYS} are "
                "needed. Override unpack(batch) for other names"
            )
        if isinstance(batch, tuple | list) and len(batch) == 2:
            return batch[0], batch[1]
        raise TypeError(
            f"batch must be a pair (x, y) or a dictionary, got {type(batch).__name__}; override unpack(batch) "
            "for another layout"
        )

    def inputs_of(self, batch: Any) -> Tensor:
        """Inputs of a batch to predict, which may have no targets.

        A tensor is the inputs, alone or in a tuple or list as ``TensorDataset(x)`` yields it. Everything else is read
        by `unpack`, so that a prediction is what was tested; but a dictionary without targets only while `unpack` is
        not overridden. Override this method beside `unpack` to predict for batches that `unpack` cannot read.

        Raises:
            TypeError: If the batch cannot be read.
        """
        if isinstance(batch, tuple | list) and len(batch) == 1:
            batch = batch[0]
        if isinstance(batch, Tensor):
            return batch
        if not has_no_targets(batch):
            return self.unpack(batch)[0]
        if self.unpacks_as(SupervisedModule):
            x: Tensor = named_inputs(batch)
            return x
        try:
            return self.unpack(batch)[0]
        except (KeyError, TypeError) as error:
            raise TypeError(
                f"unpack of {type(self).__name__} cannot read a batch without targets, a dictionary with keys "
                f"{list(batch)}: {error!r}. Override inputs_of(batch), too, to return its inputs"
            ) from error

    def unpacks_as(self, kind: type[SupervisedModule]) -> bool:
        """Whether `unpack` is that of a class, not overridden since."""
        return getattr(self.unpack, "__func__", None) is kind.unpack

    def batch_loss(self, output: Tensor, y: Any) -> Tensor:
        """The loss of an output, a mean over the batch.

        Raises:
            ValueError: If the targets do not fit the output.
        """
        self._local_loss.check(output, y)
        return self._local_loss.mean(output, y)

    def batch_weight(self, output: Tensor, y: Any) -> Tensor:
        """How much a batch's loss counts for in the mean over batches that validation and test log.

        What `batch_loss` has divided by: the number of samples, or the sum of the weights of their classes. Where
        `batch_loss` is overridden, the number of samples; override this, too, if that mean is of another kind.
        """
        if type(self).batch_loss is SupervisedModule.batch_loss:
            return self._local_loss.weight(output, y)
        return output.new_full((), float(output.shape[0]))

    def settings(self) -> dict[str, str]:
        """What a checkpoint is compared by when it is loaded: settings that change the meaning of its weights."""
        return {"loss": self._loss_name}

    # ---------------------------------------------------------------- evaluation

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Log ``val_loss`` and the metrics, those of each loader by themselves; returns the loss."""
        return self._evaluate(batch, "val", dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Log ``test_loss`` and the metrics, those of each loader by themselves; returns the loss."""
        return self._evaluate(batch, "test", dataloader_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """The network's output for what `inputs_of` finds in the batch."""
        output: Tensor = self(self.inputs_of(batch))
        return output

    def on_validation_epoch_start(self) -> None:
        """Have metrics for every loader."""
        self._have_metrics("val", len(self.trainer.num_val_batches))

    def on_test_epoch_start(self) -> None:
        """Have metrics for every loader."""
        self._have_metrics("test", len(self.trainer.num_test_batches))

    def _have_metrics(self, stage: str, loaders: int) -> None:
        further: Any = self._further[stage]
        while len(further) < loaders - 1:
            further.append(self._metrics_of(stage, 0).clone())

    def _metrics_of(self, stage: str, loader: int) -> MetricCollection:
        further: Any = self._further[stage]
        first = self.val_metrics if stage == "val" else self.test_metrics
        return further[loader - 1] if loader else first

    def _evaluate(self, batch: Any, stage: str, loader: int) -> Tensor:
        metrics = self._metrics_of(stage, loader)
        x, y = self.unpack(batch)
        output = self(x)
        loss = self.batch_loss(output, y)
        weight: Any = self.batch_weight(output, y)
        self.log(
            f"{stage}_loss",
            loss.where(weight > 0, 0.0),  # NaN where all labels are ignored, and the weight is 0
            batch_size=weight,
            on_epoch=True,
            on_step=False,
            prog_bar=stage == "val",
            sync_dist=True,  # schedules and checkpoints that watch it must see the same number on all processes
        )
        if len(metrics):
            metrics.update(output, y)
            self.log_dict(metrics, on_epoch=True, on_step=False, prog_bar=stage == "val", batch_size=x.shape[0])
        return loss

    # ---------------------------------------------------------------- training log

    @property
    def at_log_point(self) -> bool:
        """Whether loggers are written after the current batch."""
        connector: Any = self.trainer._logger_connector
        return bool(connector.should_update_logs)  # Lightning's own count: it differs from ours after some resumes

    def log_training_loss(self, loss: Tensor) -> None:
        """Add a batch's loss to a sum on the device; log its mean at log points only (`self.log` is not free)."""
        value = loss.detach()
        counted: Tensor | int = 1
        if self.skips_nonfinite:
            counted = value.isfinite()
            value = value.where(counted, 0.0)
        # A copy: a CUDA graph writes the next batch's loss to the same place.
        self._loss_sum = value.clone() if self._loss_sum is None else self._loss_sum.to(value.device) + value
        self._loss_count = self._loss_count + counted
        if self.at_log_point:
            self.log("train_loss", self._loss_sum / self._loss_count, prog_bar=True, batch_size=1)
            self._loss_sum, self._loss_count = None, 0

    # ---------------------------------------------------------------- optimizer and schedule

    def optimizer_configuration(self, optimizer: Optimizer) -> Any:
        """What ``configure_optimizers`` returns for one optimizer and the schedule asked for.

        Raises:
            ValueError: If the schedule reduces on a plateau and ``lr_monitor`` is not given.
            TypeError: If ``lr_scheduler`` makes something that cannot be stepped.
        """
        if self._scheduler_factory is None:
            return optimizer
        scheduler = self._scheduler_factory(optimizer)
        if not callable(getattr(scheduler, "step", None)):
            raise TypeError(f"lr_scheduler must return a scheduler when it is called, it returned {scheduler!r}")
        if isinstance(scheduler, ReduceLROnPlateau) and self._lr_monitor is None:
            raise ValueError("lr_scheduler reduces on a plateau: name the watched value, as lr_monitor='val_loss'")
        schedule = {"scheduler": scheduler, "interval": self._lr_interval, "frequency": self._lr_frequency}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def step_schedule(self, scheduler: Any, interval: str, frequency: int) -> None:
        """Step a schedule if its turn has come; steps and epochs are counted over the whole run.

        Raises:
            MisconfigurationException: If the value that a plateau schedule watches was never logged.
        """
        done = self.trainer.global_step if interval == "step" else self.trainer.current_epoch + 1
        if done % frequency:
            return
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(self._watched_value())
        else:
            scheduler.step()

    def _watched_value(self) -> float:
        value = self.trainer.callback_metrics.get(str(self._lr_monitor), self._watched)
        if value is None:
            raise MisconfigurationException(
                f"lr_monitor={self._lr_monitor!r} has not been logged when the schedule is stepped; logged are "
                f"{sorted(self.trainer.callback_metrics)}"
            )
        return float(value)

    # ---------------------------------------------------------------- fit start and end, checkpoints

    def setup(self, stage: str) -> None:
        """From here on a damaged checkpoint, or a disk that is full, is an error in plain words."""
        check_checkpoints(self.trainer)
        self._further = _no_metrics()

    @_restricted_classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:  # noqa: N805
        """As Lightning's.

        Raises:
            CheckpointError: If the file is cut off or damaged.
        """
        with damage_named(checkpoint_path):
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def on_fit_start(self) -> None:
        """Forget what belongs to an earlier run."""
        super().on_fit_start()
        if not self.resuming:
            self._watched_epoch, self._watched = None, None
            self._loss_sum, self._loss_count = None, 0

    def on_train_epoch_end(self) -> None:
        """Step a schedule that watches a value of the epoch, before a checkpoint of the epoch is written."""
        if self.trainer.current_epoch == self._watched_epoch:
            return  # Lightning calls this again when it resumes from that checkpoint under max_steps
        self._watched_epoch = self.trainer.current_epoch
        for config in self.trainer.lr_scheduler_configs:
            if config.interval == "epoch" and isinstance(config.scheduler, ReduceLROnPlateau):
                self.step_schedule(config.scheduler, "epoch", self._lr_frequency)

    def on_fit_end(self) -> None:
        """A run over no batches is an error, not a success.

        Raises:
            MisconfigurationException: If the training loader is empty.
        """
        # A loader without a length may turn out to be empty only when it is iterated over.
        empty = self.trainer.num_training_batches == 0 or self.trainer.fit_loop.total_batch_idx < 0
        finished_before = self.trainer.max_epochs == 0 or self.trainer.max_steps == 0
        if empty and self.trainer.limit_train_batches != 0 and not finished_before:
            raise MisconfigurationException(
                "train_dataloader is empty: it yields no batch (with drop_last=True a data set smaller than batch_size "
                "leaves none). Nothing was trained."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the random state, settings to compare, the value a schedule watches, and the loss since a log point."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[_SETTINGS] = self.settings()
        watched = self.trainer.callback_metrics.get(str(self._lr_monitor))
        if self._loss_sum is not None:
            checkpoint[_LOSS] = (self._loss_sum.cpu(), int(self._loss_count))
        checkpoint[_WATCHED] = (self._watched_epoch, None if watched is None else float(watched))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of other settings, before anything is loaded.

        Raises:
            ValueError: If a setting differs.
        """
        for name, saved in checkpoint.get(_SETTINGS, {}).items():
            here = self.settings().get(name)
            if here != saved:
                raise ValueError(
                    f"the checkpoint was trained with {name}={saved}, this module has {name}={here}: pass the same "
                    f"{name}"
                )
        super().on_load_checkpoint(checkpoint)
        self._watched_epoch, self._watched = checkpoint.get(_WATCHED, (None, None))
        self._loss_sum, self._loss_count = checkpoint.get(_LOSS, (None, 0))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As PyTorch's.

        Raises:
            ValueError: If ``strict``, and parameters or buffers differ in name or shape: before any is changed.
        """
        if strict:
            refuse_other_model(self.state_dict(), state_dict)
        return super().load_state_dict(state_dict, strict, assign)


def _no_metrics() -> nn.ModuleDict:
    return nn.ModuleDict({"val": nn.ModuleList(), "test": nn.ModuleList()})


def has_no_targets(batch: Any) -> bool:
    """Whether a batch is a dictionary without any of the keys of targets."""
    return isinstance(batch, Mapping) and not any(key in batch for key in _TARGET_KEYS)


def named_inputs(batch: Mapping[str, Any]) -> Any:
    """The inputs of a dictionary.

    Raises:
        TypeError: If it has none of the keys of inputs, or several.
    """
    x = [batch[key] for key in INPUT_KEYS if key in batch]
    if len(x) != 1:
        raise TypeError(
            f"batch is a dictionary with keys {list(batch)}; one of {INPUT_KEYS} is needed to predict. Override "
            "inputs_of(batch) for other names"
        )
    return x[0]


def _describe_loss(loss: object) -> str:
    """Its type and settings, for a module's ``repr`` leaves out what it has no ``extra_repr`` for."""
    if not isinstance(loss, nn.Module):
        return getattr(loss, "__name__", type(loss).__name__)
    settings = {k: v for k, v in sorted(vars(loss).items()) if k[0] != "_" and k != "training"}
    scalars = ", ".join(f"{k}={v!r}" for k, v in settings.items() if isinstance(v, int | float | str | bool))
    return f"{type(loss).__name__}({scalars})"
