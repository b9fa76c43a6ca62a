"""The comparison that settles it: train the same network by backprop, from the same start, and test both."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_altmin.baselines import BackpropModule
from lightning_altmin.callbacks.altmin_access import (
    altmin_module,
    refuse_other_processes,
    refuse_synchronised_batch_norm,
)
from lightning_altmin.callbacks.training_clock import TrainingClock
from lightning_altmin.module import AltMinModule
from lightning_altmin.random_state import random_state, set_random_state
from lightning_altmin.trainer.exact_resume import of_all_processes
from lightning_altmin.weights import LocalGradient
from lightning_altmin.weights.local_gradient import OptimizerFactory, adam

_SECONDS, _PARAMETERS = "training seconds", "parameters"


class CompareWithTwin(Callback):
    """After training, trains the network's twin by backprop, tests both, and prints a table.

    The twin is a `BackpropModule` with the initial weights of this run and the same loss, metrics and learning-rate
    schedule. It is trained on the same data module for as many optimizer steps, from the same random state: batches
    and their order, augmentation and dropout masks are the same. Validation runs as in this run and is not counted
    in the seconds. A run resumed from a checkpoint is compared as a whole: the checkpoint holds its start. Under
    ``strategy="ddp"`` the twin is trained by DDP in the same processes, which averages gradients of unequal parts of a
    batch without weighting them; the seconds are those of each process.

    Args:
        optimizer: Factory of the twin's optimizer. If not given, that of the compared run's `LocalGradient`, or fused
            Adam at rate 0.002 where its layers have different ones or its weight solver is another.

    Attributes:
        results: After fit, ``{"AltMin": {...}, "backprop": {...}}`` with every test metric, ``test_loss``,
            ``"training seconds"`` and ``"parameters"`` (trainable ones); also logged under ``twin/``.
        twin: After fit, the trained `BackpropModule`.

    Raises:
        TypeError: If ``optimizer`` is not callable.
        MisconfigurationException: At the start of fit, if the module is not an `AltMinModule`, there is no data module
            with a ``test_dataloader``, or the run goes on from a checkpoint that does not hold its start.
    """

    def __init__(self, optimizer: OptimizerFactory | None = None) -> None:
        if optimizer is not None and not callable(optimizer):
            raise TypeError(f"optimizer must be a function of parameters, got {optimizer!r}")
        self._optimizer = optimizer
        self._steppers: dict[str, str] = {}  # the optimizers of both, in words
        self.results: dict[str, dict[str, float]] = {}
        self.twin: BackpropModule | None = None
        self._start: dict[str, Any] | None = None
        self._start_is_restored = False
        self._earlier_seconds = 0.0
        self._clock: TrainingClock | None = None

    # ---------------------------------------------------------------- the start and the seconds of this run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that a comparison will be possible, before anything is trained."""
        if stage != "fit":
            return
        refuse_other_processes(trainer, self)
        refuse_synchronised_batch_norm(trainer, pl_module, self)
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            raise MisconfigurationException(
                "CompareWithTwin trains a second network in the same processes, but spawned ones cannot start a second "
                "run: use Trainer(strategy='ddp'), or torchrun"
            )
        altmin_module(pl_module, self)
        data = _data_module(trainer)
        if data is None or not is_overridden("test_dataloader", data, LightningDataModule):
            raise MisconfigurationException(
                "CompareWithTwin needs test data: pass trainer.fit a datamodule that has a test_dataloader"
            )
        self._start, self._start_is_restored, self._earlier_seconds, self._clock = None, False, 0.0, None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the initial weights, and the random state that loaders are made from."""
        if self._start is None:
            network = altmin_module(pl_module, self).network
            weights = {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}
            self._start = {"weights": weights, "before_loaders": random_state()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the random state that the first epoch starts from."""
        assert self._start is not None
        if not self._start_is_restored:
            if trainer.global_step > 0:
                raise MisconfigurationException(
                    "CompareWithTwin does not know how this run began: it goes on from a checkpoint written without "
                    "this callback, or from an earlier fit. Start afresh, or remove the callback"
                )
            self._start["before_training"] = random_state()
            own = {name: self._start.pop(name) for name in ("before_loaders", "before_training")}
            self._start["generators"] = of_all_processes(trainer, own)
        self._clock = TrainingClock(pl_module.device, self._earlier_seconds)
        self._clock.start()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation is not training time."""
        if self._clock is not None:
            self._clock.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Back to training."""
        if self._clock is not None:
            self._clock.resume()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training is over."""
        if self._clock is not None:
            self._clock.stop()

    def state_dict(self) -> dict[str, Any]:
        """How the run began, and the seconds so far."""
        if self._start is None:
            return {}
        return {"start": self._start, "seconds": 0.0 if self._clock is None else self._clock.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the start of the run that is resumed."""
        if state_dict:
            self._start, self._earlier_seconds = state_dict["start"], state_dict["seconds"]
            self._start_is_restored = True

    # ---------------------------------------------------------------- the twin

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Test this run, train and test the twin, print and log the table.

        Not in ``on_fit_end``: the module's own check that there was anything to train comes after that of callbacks.
        """
        if stage != "fit" or self._clock is None or trainer.global_step == 0:
            return
        module, data, clock = altmin_module(pl_module, self), _data_module(trainer), self._clock
        assert self._start is not None
        assert data is not None
        self._clock = None
        if trainer.progress_bar_callback is not None:
            trainer.progress_bar_callback.teardown(trainer, module, stage)  # the terminal has room for one live bar
        rank_zero_info("CompareWithTwin: training the same network by backprop")
        self.twin = _make_twin(module, self._start["weights"], self._optimizer or _optimizer_of(module))
        generators = self._start["generators"]
        replay = _Replay(generators[trainer.global_rank % len(generators)])
        with _left_alone(trainer, module, data):
            runner = _small_trainer(trainer, module.accumulate_batches, replay)
            tested = runner.test(module, datamodule=data, verbose=False)
            runner.fit(self.twin, datamodule=data)
            self._steppers = {"AltMin": _in_words(trainer.optimizers), "backprop": _in_words(runner.optimizers)}
            twin_tested = runner.test(self.twin, datamodule=data, verbose=False)
        assert replay.clock is not None
        self.results = {
            "AltMin": _result(tested, clock, module.network),
            "backprop": _result(twin_tested, replay.clock, self.twin.network),
        }
        for logger in trainer.loggers:
            values = {f"twin/{who}/{name}": v for who, row in self.results.items() for name, v in row.items()}
            logger.log_metrics(values, step=trainer.global_step)
        if trainer.is_global_zero:
            sys.stdout.write(f"\n{self._table(module)}\n")

    def _table(self, module: AltMinModule) -> str:
        solver = module.core.weights
        # With forward inputs the weight step can be backprop by another route, and must not pass for anything else.
        forward = any(solver.inputs_of(stage) == "forward" for stage in module.core.coded.stages)
        names = {"AltMin": "AltMin (forward inputs)" if forward else "AltMin", "backprop": "backprop"}
        labels = {who: f"{name}, {self._steppers[who]}" for who, name in names.items()}
        columns = list(self.results["AltMin"])
        rows = [["", *(column.replace("_", " ") for column in columns)]]
        for who, row in self.results.items():
            rows.append([labels[who], *(_cell(column, row[column]) for column in columns)])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in rows
        ]
        rule = "-" * len(lines[0])
        return "\n".join([rule, lines[0], rule, *lines[1:], rule])


class _Twin(BackpropModule):
    """The twin of a module reads batches as that module does, also where ``unpack`` is overridden."""

    def __init__(self, original: AltMinModule, network: nn.Module, optimizer: OptimizerFactory) -> None:
        metrics = original.test_metrics.clone()
        metrics.reset()
        super().__init__(
            network,
            copy.deepcopy(original.core.loss),
            optimizer,
            metrics,
            original._scheduler_factory,
            original._lr_interval,
            original._lr_frequency,
            original._lr_monitor,
        )
        self._unpack, self._inputs_of = original.unpack, original.inputs_of
        self._clip = original.gradient_clip_norm
        # The original's own layers: another split would have other names, or be refused.
        mine = dict(zip(original.network.parameters(), network.parameters(), strict=True))
        self._layers = {s.name: [mine[p] for p in s.parameters() if p in mine] for s in original.core.coded.stages}

    def configure_gradient_clipping(self, optimizer: Optimizer, *_: Any, **__: Any) -> None:
        """As the compared module clips, layer by layer."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        # Optimizers that undo the scaling of float16 themselves, such as fused Adam, are given scaled gradients.
        undoes = getattr(optimizer, "_step_supports_amp_scaling", False)
        scale = 1.0 if scaler is None or not undoes else scaler.get_scale()
        for name, parameters in self._layers.items():
            bound = self._clip.get(name) if isinstance(self._clip, dict) else self._clip
            if bound is not None:
                torch.nn.utils.clip_grad_norm_(parameters, bound * scale)

    def unpack(self, batch: Any) -> tuple[Tensor, Any]:
        return self._unpack(batch)

    def inputs_of(self, batch: Any) -> Tensor:
        return self._inputs_of(batch)


class _Replay(Callback):
    """Puts the twin's run in the random states that the compared run had at the same points, and times it."""

    def __init__(self, start: Mapping[str, Any]) -> None:
        self._start = start
        self.clock: TrainingClock | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        set_random_state(self._start["before_loaders"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        set_random_state(self._start["before_training"])
        self.clock = TrainingClock(pl_module.device)
        self.clock.start()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.clock is not None:
            self.clock.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.clock is not None:
            self.clock.resume()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.clock is not None:
            self.clock.stop()


def _make_twin(module: AltMinModule, weights: Mapping[str, Tensor], optimizer: OptimizerFactory) -> BackpropModule:
    network = copy.deepcopy(module.network)
    network.zero_grad()
    network.load_state_dict(weights)
    return _Twin(module, network, optimizer)


def _optimizer_of(module: AltMinModule) -> OptimizerFactory:
    solver = module.core.weights
    # Not of its subclasses, whose optimizers may do more than follow gradients.
    own = solver.common_factory if type(solver) is LocalGradient else None
    return adam if own is None else own


def _in_words(optimizers: Sequence[Optimizer]) -> str:
    """Kinds of optimizers and the rates they began with."""
    (optimizer,) = optimizers
    children = getattr(optimizer, "children", {"": optimizer}).values()
    kinds = dict.fromkeys(
        f"{type(child).__name__} {float(group.get('initial_lr', group['lr'])):g}"
        for child in children
        for group in child.param_groups
    )
    return " and ".join(kinds)


def _small_trainer(trainer: Trainer, accumulate: int, replay: Callback) -> Trainer:
    """A Trainer for as many steps on the same devices and the same part of the data, that writes nothing."""
    settings: Any = trainer  # several of its attributes are set from elsewhere and not typed
    deterministic = torch.are_deterministic_algorithms_enabled()
    return Trainer(
        accelerator=trainer.accelerator,
        **_devices(trainer),
        precision=trainer.precision,
        max_epochs=trainer.max_epochs,
        max_steps=trainer.global_step,
        accumulate_grad_batches=accumulate,
        limit_train_batches=_limit(trainer.limit_train_batches),
        limit_val_batches=_limit(trainer.limit_val_batches),
        limit_test_batches=_limit(trainer.limit_test_batches),
        overfit_batches=settings.overfit_batches,
        check_val_every_n_epoch=trainer.check_val_every_n_epoch,
        val_check_interval=_limit(trainer.val_check_interval),
        num_sanity_val_steps=0,
        reload_dataloaders_every_n_epochs=settings.reload_dataloaders_every_n_epochs,
        log_every_n_steps=settings.log_every_n_steps,
        # Global switches, which the Trainer sets: to what they are.
        deterministic="warn"
        if deterministic and torch.is_deterministic_algorithms_warn_only_enabled()
        else deterministic,
        benchmark=torch.backends.cudnn.benchmark,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=trainer.progress_bar_callback is not None,
        default_root_dir=trainer.default_root_dir,
        callbacks=[replay],
    )


def _devices(trainer: Trainer) -> dict[str, Any]:
    strategy = trainer.strategy
    if trainer.world_size == 1:
        device = strategy.root_device
        return {"devices": [device.index or 0] if device.type == "cuda" else 1}
    assert isinstance(strategy, DDPStrategy)
    return {
        "devices": trainer.device_ids if strategy.root_device.type == "cuda" else trainer.num_devices,
        "num_nodes": trainer.num_nodes,
        "strategy": DDPStrategy(cluster_environment=strategy.cluster_environment),
        "use_distributed_sampler": trainer._accelerator_connector.use_distributed_sampler,
    }


def _limit(value: int | float) -> int | float | None:
    """A limit as it was given: a 1.0 that was given explicitly makes the Trainer explain what it means."""
    return None if isinstance(value, float) and value == 1.0 else value


@contextmanager
def _left_alone(trainer: Trainer, module: AltMinModule, data: LightningDataModule) -> Iterator[None]:
    """Give module and data module back to the outer Trainer as they were, and the random state."""
    attributes, random = dict(data.__dict__), random_state()
    try:
        yield
    finally:
        set_random_state(random)
        data.__dict__.clear()
        data.__dict__.update(attributes)
        module.trainer = trainer


def _data_module(trainer: Trainer) -> LightningDataModule | None:
    data: LightningDataModule | None = trainer.datamodule  # type: ignore[attr-defined]
    return data


def _result(tested: list[Mapping[str, float]], clock: TrainingClock, network: nn.Module) -> dict[str, float]:
    """Metrics first, then the loss, the seconds and the parameters."""
    metrics = {name: value for each in tested for name, value in each.items()}
    ordered = dict(sorted(metrics.items(), key=lambda item: item[0].startswith("test_loss")))
    parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return {**ordered, _SECONDS: clock.seconds, _PARAMETERS: float(parameters)}


def _cell(column: str, value: float) -> str:
    if column == _PARAMETERS:
        return f"{int(value):,}"
    return f"{value:.1f}" if column == _SECONDS else f"{value:.4f}"
