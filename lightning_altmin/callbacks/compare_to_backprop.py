"""How the local gradients of alternating minimization compare with those of backpropagation, while training."""

from __future__ import annotations

import copy
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_altmin.callbacks.altmin_access import (
    altmin_module,
    refuse_other_processes,
    refuse_synchronised_batch_norm,
)
from lightning_altmin.callbacks.layer_watch import LayerWatch
from lightning_altmin.module import AltMinModule
from lightning_altmin.processes import Processes
from lightning_altmin.random_state import random_state, set_random_state
from lightning_altmin.weights.local_gradient import trainable


class CompareToBackprop(LayerWatch):
    """Logs how the local gradients compare with backprop's, for every layer at every n-th batch.

    - ``backprop/<layer>/angle``: angle between the two in degrees, 0 (same direction) to 180;
    - ``backprop/<layer>/cosine``: its cosine;
    - ``backprop/<layer>/relative_size``: norm of the local gradient divided by that of backprop's.

    The local gradient is the one that is about to enter the optimizer (clipped, and with the l1 term of the weights,
    where these are set). Backprop's gradient of the loss is that of the same batch at the same weights, with the same
    dropout masks and batch statistics, by autograd on a copy: the model, its buffers, its gradients and the random
    state stay as they are, and training goes on exactly as without this callback. Of several processes each computes
    backprop's gradient of its own samples, and one all-reduce averages them, as DDP would.

    Args:
        every_n_steps: Compare at every n-th batch, >= 1.

    Raises:
        ValueError: If ``every_n_steps`` is below 1.
        MisconfigurationException: At the start of fit, if the module is not an `AltMinModule` or accumulates batches.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        super().__init__(every_n_steps)
        self._batch: Any = None
        self._random: dict[str, Any] | None = None  # random state the watched batch starts from; None if not watched
        self._values: dict[str, Tensor] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the module and the Trainer."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            refuse_other_processes(trainer, self)
            refuse_synchronised_batch_norm(trainer, pl_module, self)
        if stage == "fit" and altmin_module(pl_module, self).accumulate_batches > 1:
            raise MisconfigurationException(
                "CompareToBackprop compares the gradients of one batch, but accumulate_batches mixes those of several; "
                "remove the callback, or set accumulate_batches=1"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember the batch and the random state its dropout masks come from."""
        if self.is_due(trainer):
            self._batch = batch
            self._random = random_state()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Compare, before the weights move."""
        if self._random is None:
            return
        module = altmin_module(pl_module, self)
        expected = _backprop(module, self._batch, self._random)
        for stage in module.core.coded.stages:
            pairs = [(p.grad, expected[p]) for p in trainable(stage) if p.grad is not None]
            if pairs:
                self._values |= _comparison(
                    f"backprop/{stage.name}",
                    *(torch.cat([g.flatten() for g in side]) for side in zip(*pairs, strict=True)),
                )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the comparison."""
        if self._values:
            self.record(trainer, pl_module, self._values)
        self._batch, self._random, self._values = None, None, {}


def _backprop(module: AltMinModule, batch: Any, random: dict[str, Any]) -> dict[nn.Parameter, Tensor]:
    """Backprop's gradient for every trainable parameter of the module's network, zero where none flows.

    Over the samples of all processes: a mean of theirs, weighted by what the loss divides by.
    """
    x, y = module.unpack(batch)
    network = copy.deepcopy(module.network)
    now = random_state()
    set_random_state(random)
    try:
        with torch.enable_grad():
            output = network(x)
            loss = module.batch_loss(output, y)
    finally:
        set_random_state(now)
    copies = zip(module.network.parameters(), network.parameters(), strict=True)
    pairs = [(original, mine) for original, mine in copies if mine.requires_grad]
    gradients = torch.autograd.grad(loss, [mine for _, mine in pairs], allow_unused=True)
    found = [torch.zeros_like(p) if g is None else g for (p, _), g in zip(pairs, gradients, strict=True)]
    if module.core.processes.count > 1:
        found = _averaged(found, module.core.local_loss.weight(output.detach(), y), module.core.processes)
    return {p: gradient for (p, _), gradient in zip(pairs, found, strict=True)}


def _averaged(gradients: list[Tensor], weight: Tensor, processes: Processes) -> list[Tensor]:
    """The weighted mean over processes, in one exchange."""
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    total = processes.sum(torch.cat([flat * weight, weight.reshape(1).to(flat.dtype)]))
    parts = torch.split(total[:-1] / total[-1], [gradient.numel() for gradient in gradients])
    return [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]


def _comparison(group: str, local: Tensor, backprop: Tensor) -> dict[str, Tensor]:
    size, reference = local.norm(), backprop.norm()
    u, v = local / size, backprop / reference
    # Not arccos of the cosine, which cannot tell angles below the square root of the rounding error from 0.
    angle = 2 * torch.atan2((u - v).norm(), (u + v).norm())
    return {
        f"{group}/angle": torch.rad2deg(angle),
        f"{group}/cosine": torch.cos(angle),
        f"{group}/relative_size": size / reference,
    }
