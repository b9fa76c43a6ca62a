"""Synaptic intelligence."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from lightning_altmin.arguments import check_number
from lightning_altmin.continual.callbacks.penalty import QuadraticPenalty, Tensors, copies, placed, trained
from lightning_altmin.continual.task import Task


class SynapticIntelligence(QuadraticPenalty):
    r"""Synaptic intelligence: weights whose changes lowered the loss are held near their values.

    Along the path, :math:`\omega_i \leftarrow \omega_i - g_i \Delta\theta_i`, with ``g`` the gradient without the
    penalty; after a task, :math:`\Omega_i \leftarrow \Omega_i + \max(\omega_i, 0) / (\Delta_i^2 + damping)`, with
    :math:`\Delta_i` the change over the task, and :math:`\omega` begins at 0 again (Zenke et al., "Continual Learning
    Through Synaptic Intelligence", 2017). Under alternating minimization ``g`` is the layers' local gradient.

    Args:
        strength: Weight of the penalty, >= 0. The gradient is that of ``strength/2 sum Omega (theta - theta*)^2``, so
            it is twice the paper's ``c``.
        damping: The paper's xi, > 0.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, strength: float = 1.0, damping: float = 0.1) -> None:
        super().__init__(strength)
        check_number("damping", damping, above=0)
        self.damping = damping
        self._path: Tensors = {}
        self._start: Tensors = {}
        self._step: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # gradient and weights before a step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin with no path."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._path, self._start, self._step = {}, {}, {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same for the path so far."""
        super().on_train_start(trainer, pl_module)
        self._path, self._start = placed(self._path, pl_module), placed(self._start, pl_module)

    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        """The path of a task begins at the weights as they are."""
        self._start = copies(pl_module)
        self._path = {name: torch.zeros_like(value) for name, value in self._start.items()}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Keep the loss's own gradient, then edit it."""
        for name, parameter in trained(pl_module).items():
            if parameter.grad is not None:
                self._step[name] = parameter.grad.detach().clone(), parameter.detach().clone()
        super().on_before_optimizer_step(trainer, pl_module, optimizer)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """What the step did to the loss, to first order."""
        parameters = trained(pl_module)
        for name, (gradient, before) in self._step.items():
            self._path[name] -= gradient * (parameters[name] - before)
        self._step = {}

    @torch.no_grad()
    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        """Turn the path into importance."""
        self.anchor = copies(pl_module)
        for name, path in self._path.items():
            change = self.anchor[name] - self._start[name]
            added = path.clamp_min(0) / (change.square() + self.damping)
            before = self.importance.get(name)
            self.importance[name] = added if before is None else before + added

    @property
    def state_bytes(self) -> int:
        """Bytes of what is kept, the path included."""
        path = [*self._path.values(), *self._start.values()]
        return super().state_bytes + sum(t.numel() * t.element_size() for t in path)

    def state_dict(self) -> dict[str, Any]:
        """Importances, anchors and the path so far."""
        return {**super().state_dict(), "path": dict(self._path), "start": dict(self._start)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them over."""
        super().load_state_dict(state_dict)
        self._path, self._start = dict(state_dict["path"]), dict(state_dict["start"])
