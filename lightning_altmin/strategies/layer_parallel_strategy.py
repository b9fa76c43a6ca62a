"""Layer parallelism in the Trainer: every process reads the same batches and holds its own layers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import _get_default_process_group_backend_for_device, _init_dist_connection
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, WeightAveraging
from lightning.pytorch.strategies import ParallelStrategy, StrategyRegistry
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer
from torchmetrics import Metric

from lightning_altmin.guard import NonFiniteError
from lightning_altmin.module import AltMinModule
from lightning_altmin.parallel.data_parallel import DataParallel
from lightning_altmin.parallel.dealing import stage_costs
from lightning_altmin.parallel.layer_parallel import LayerParallel
from lightning_altmin.random_state import random_state, set_random_state

_T = TypeVar("_T")


class LayerParallelStrategy(ParallelStrategy):
    """Deals out the layers of an `AltMinModule` among processes for the time of a run; see `LayerParallel`.

    ``Trainer(strategy="altmin_layer_parallel", devices=n)`` uses it with its defaults. Validation, test and prediction
    send each batch up through the processes, and all of them get the output: they log the same values and decide alike.
    Checkpoints are those of one process: written by the first, loadable anywhere. After a run every process holds the
    whole module again.

    Args:
        micro_batches: Parts that a batch is cut into, >= 1.
        costs: Relative cost of each stage, to balance the processes by. If not given, operations on the module's
            ``example_input_array`` are counted, or parameters if it has none; see `stage_costs`.
        timeout: How long a process waits for another.
        process_group_backend: Of torch.distributed; the device's own if not given.
        start_method: How processes are started where nobody else has done so, as of Lightning's ``DDPStrategy``.
        **kwargs: What Lightning passes to every ``ParallelStrategy``.

    Raises:
        MisconfigurationException: At the start of a run, if the module or a callback cannot work with it.
    """

    deals_out_layers = True
    """By this `AltMinModule`, which knows no strategy of ours, tells that it can be trained here."""

    def __init__(
        self,
        micro_batches: int = 4,
        costs: Sequence[float] | None = None,
        timeout: timedelta | None = default_pg_timeout,
        process_group_backend: str | None = None,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._micro_batches, self._costs = micro_batches, costs
        self._timeout, self._backend, self._start_method = timeout, process_group_backend, start_method
        self._layers: LayerParallel | None = None
        self._metrics: list[tuple[Metric, Any]] = []
        self._failed = False
        self.num_nodes = 1

    @property
    def layers(self) -> LayerParallel:
        """The layers dealt out, during a run."""
        assert self._layers is not None
        return self._layers

    # ---------------------------------------------------------------- processes

    @property
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def num_processes(self) -> int:
        """Processes on this node."""
        return 0 if self.parallel_devices is None else len(self.parallel_devices)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Every process reads the whole of every batch."""
        return {"num_replicas": 1, "rank": 0}

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        if self._start_method == "popen":
            self._launcher = _SubprocessScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes)
        else:
            self._launcher = _MultiProcessingLauncher(self, start_method=self._start_method)

    def set_world_ranks(self) -> None:
        """Tell the environment, and whatever is done by the first process only."""
        assert self.cluster_environment is not None
        self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
        self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        first_only: Any = rank_zero_only
        first_only.rank = self.global_rank

    def setup_environment(self) -> None:
        """Join the process group."""
        super().setup_environment()
        self.set_world_ranks()
        assert self.cluster_environment is not None
        backend = self._backend or _get_default_process_group_backend_for_device(self.root_device)
        device = self.root_device if self.root_device.type != "cpu" else None
        _init_dist_connection(self.cluster_environment, backend, timeout=self._timeout, device_id=device)

    def barrier(self, name: str | None = None) -> None:
        if dist.is_initialized():
            dist.barrier()

    def broadcast(self, obj: _T, src: int = 0) -> _T:
        if not dist.is_initialized():
            return obj
        objects: list[Any] = [obj]
        dist.broadcast_object_list(objects, src)
        return objects[0]

    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        """What one process would have: every process has seen every sample, so its own value is the whole one."""
        return tensor

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether all processes, or any of them, decided so: clocks and signals may differ."""
        votes = torch.tensor(int(decision), device=self.root_device)
        dist.all_reduce(votes)
        return bool(votes == self.world_size) if all else bool(votes)

    # ---------------------------------------------------------------- a run

    def setup(self, trainer: Trainer) -> None:
        """Deal out the layers, then make the optimizer."""
        _refuse_callbacks(trainer)
        # Every process logs the same values, so there is nothing to accumulate over processes.
        warnings.filterwarnings("ignore", "It is recommended to use `self.log")
        self._failed = False
        super().setup(trainer)

    def model_to_device(self) -> None:
        assert self.model is not None
        self.model.to(self.root_device)

    def _setup_model(self, model: nn.Module) -> nn.Module:
        if not isinstance(model, AltMinModule):
            raise MisconfigurationException(
                f"strategy {type(self).__name__} deals out the layers of an AltMinModule, got {type(model).__name__}: "
                "backprop has no independent layers; use strategy='ddp'"
            )
        DataParallel().broadcast(model.core)
        set_random_state(self.broadcast(random_state()))  # whatever was seeded: all draw the same order of samples
        costs = self._costs
        if costs is None and isinstance(model.example_input_array, Tensor):
            costs = stage_costs(model.core, model.example_input_array.to(self.root_device))
        self._layers = LayerParallel(model.core, self._micro_batches, costs)
        model.dealt_out = self._layers
        for metric in model.modules():
            if isinstance(metric, Metric):  # every process counts every sample: there is nothing to be summed
                self._metrics.append((metric, metric.distributed_available_fn))
                metric.distributed_available_fn = _not_distributed
        return model

    def on_exception(self, exception: BaseException) -> None:
        """Other processes may be gone: layers are then not brought back."""
        self._failed = not isinstance(exception, NonFiniteError)  # which all processes raise together

    def teardown(self) -> None:
        """Bring all layers back to every process."""
        module: Any = self.lightning_module
        for metric, available in self._metrics:
            metric.distributed_available_fn = available
        self._metrics.clear()
        if self._layers is not None:
            if not self._failed:
                self._layers.bring_back()
            self._layers = module.dealt_out = None
        super().teardown()

    # ---------------------------------------------------------------- checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole module's, on the first process."""
        with self.layers.whole():
            return super().lightning_module_state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of one process, on the first one."""
        return self.layers.optimizer_state()

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each process takes the part of its own layers."""
        (state,) = checkpoint["optimizer_states"]
        self.layers.load_optimizer_state(state)


def _not_distributed() -> bool:
    return False


def _refuse_callbacks(trainer: Trainer) -> None:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging | BatchSizeFinder):
            raise MisconfigurationException(
                f"{type(callback).__name__} works on the whole model, whose layers are dealt out among processes by "
                "strategy 'altmin_layer_parallel': remove the callback, or use strategy='ddp' or one process"
            )


StrategyRegistry.register(
    "altmin_layer_parallel",
    LayerParallelStrategy,
    description="Deals out the layers of an AltMinModule among processes",
)
