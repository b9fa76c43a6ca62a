"""Quadratic penalties on leaving the weights of earlier tasks, added to gradients."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_altmin.arguments import check_number
from lightning_altmin.continual.callbacks.stream_access import (
    refuse_layer_parallelism,
    refuse_several_weight_steps,
    refuse_solved_weights,
    stream_data,
)

Tensors = dict[str, Tensor]


class QuadraticPenalty(Callback):
    r"""Base: adds the gradient of a penalty before each step.

    It is :math:`\frac{strength}{2} \sum_i \Omega_i (\theta_i - \theta^*_i)^2`.
    Gradients are edited, not losses, so that it serves backprop and alternating minimization alike. Parameters that
    have no gradient in a batch are left alone.

    Args:
        strength: Weight of the penalty, >= 0.

    Attributes:
        importance: :math:`\Omega` by parameter name; empty before the first task is over.
        anchor: :math:`\theta^*` by parameter name.

    Raises:
        ValueError: If ``strength`` is out of range.
    """

    def __init__(self, strength: float) -> None:
        check_number("strength", strength, least=0)
        self.strength = strength
        self.importance: Tensors = {}
        self.anchor: Tensors = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is a stream, and that every step is seen."""
        if stage != "fit":
            return
        refuse_layer_parallelism(trainer, self)
        stream_data(trainer, self)
        refuse_several_weight_steps(pl_module, self)
        refuse_solved_weights(pl_module, self)
        self.importance, self.anchor = {}, {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put what a checkpoint brought, on the CPU, beside the parameters."""
        self.importance, self.anchor = placed(self.importance, pl_module), placed(self.anchor, pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Edit the gradients."""
        self.add_penalty(pl_module)

    @torch.no_grad()
    def add_penalty(self, pl_module: LightningModule) -> None:
        """Add the penalty's gradient to ``.grad``."""
        if not self.importance:
            return
        for name, parameter in trained(pl_module).items():
            if parameter.grad is None or name not in self.importance:
                continue
            parameter.grad.addcmul_(self.importance[name], parameter - self.anchor[name], value=self.strength)

    @property
    def state_bytes(self) -> int:
        """Bytes of what is kept from task to task."""
        return sum(t.numel() * t.element_size() for t in [*self.importance.values(), *self.anchor.values()])

    def state_dict(self) -> dict[str, Any]:
        """Importances and anchors."""
        return {"importance": dict(self.importance), "anchor": dict(self.anchor)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them over."""
        self.importance, self.anchor = dict(state_dict["importance"]), dict(state_dict["anchor"])


def placed(tensors: Tensors, pl_module: LightningModule) -> Tensors:
    """Tensors by parameter name, each on its parameter's device."""
    parameters = dict(pl_module.named_parameters())
    return {name: tensor.to(parameters[name].device) for name, tensor in tensors.items()}


def trained(pl_module: LightningModule) -> dict[str, nn.Parameter]:
    """Trainable parameters by name."""
    return {name: p for name, p in pl_module.named_parameters() if p.requires_grad}


def copies(pl_module: LightningModule) -> Tensors:
    """The trainable parameters as they are."""
    return {name: p.detach().clone() for name, p in trained(pl_module).items()}
