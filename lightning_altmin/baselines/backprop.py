"""The twin: the same network, loss, data, metrics and schedule, trained by backpropagation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_altmin.guard import Buffers, buffer_owners
from lightning_altmin.metrics import Metrics
from lightning_altmin.supervised import SchedulerFactory, SupervisedModule
from lightning_altmin.weights.local_gradient import OptimizerFactory, adam


class BackpropModule(SupervisedModule):
    """Trains a network by backprop with Lightning's automatic optimization, beside `AltMinModule`.

    Args:
        network: Any module.
        loss: ``loss(output, target)``, a mean over the batch; cross-entropy if not given.
        optimizer: Factory of the optimizer; fused Adam at rate 0.002 if not given, as for AltMin.
        metrics: As for `AltMinModule`.
        lr_scheduler: As for `AltMinModule`; stepped by Lightning.
        lr_interval: As for `AltMinModule`.
        lr_frequency: As for `AltMinModule`.
        lr_monitor: As for `AltMinModule`.

    Raises:
        TypeError: If ``network`` is no module or ``optimizer`` no function.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: nn.Module | Callable[[Tensor, Any], Tensor] | None = None,
        optimizer: OptimizerFactory = adam,
        metrics: Metrics | None = None,
        lr_scheduler: SchedulerFactory | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        lr_frequency: int = 1,
        lr_monitor: str | None = None,
    ) -> None:
        loss = nn.CrossEntropyLoss() if loss is None else loss
        super().__init__(loss, metrics, lr_scheduler, lr_interval, lr_frequency, lr_monitor)
        if not isinstance(network, nn.Module):
            raise TypeError(f"network must be an nn.Module, an instance and not its class, got {network!r}")
        if not callable(optimizer):
            raise TypeError(f"optimizer must be a function of parameters, got {optimizer!r}")
        self.network = network
        self._buffer_owners = buffer_owners(network)
        self.loss = loss
        self._optimizer_factory = optimizer

    def forward(self, x: Tensor) -> Tensor:
        """The network's output."""
        output: Tensor = self.network(x)
        return output

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch; Lightning differentiates it and steps the optimizer."""
        x, y = self.unpack(batch)
        with Buffers(self._buffer_owners).restored_on_error():
            loss = self.batch_loss(self(x), y)
        self.log_training_loss(loss)
        return loss

    def configure_optimizers(self) -> Any:
        """The optimizer and the schedule."""
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        configuration = self.optimizer_configuration(self._optimizer_factory(parameters))
        if isinstance(configuration, dict):
            # Lightning counts batches anew in each epoch and reads a plateau's value after the epoch's checkpoint is
            # written. It is told to call lr_scheduler_step every time, which does what AltMinModule does.
            configuration["lr_scheduler"] |= {"frequency": 1, "reduce_on_plateau": False}
        return configuration

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Called by Lightning after each step or epoch."""
        if isinstance(scheduler, ReduceLROnPlateau) and self._lr_interval == "epoch":
            return  # waits for the epoch's validation: stepped in on_train_epoch_end
        self.step_schedule(scheduler, self._lr_interval, self._lr_frequency)
