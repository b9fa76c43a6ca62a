"""A schedule of mu, the weight of the coupling between codes and layers."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_altmin.arguments import check_number
from lightning_altmin.callbacks.altmin_access import core_of


class MuSchedule(Callback):
    """Changes mu between epochs or optimizer steps: ``mu <- min((mu + add) * multiply, maximum)``.

    Epoch (or step) number ``k``, counted from 0, runs with the initial mu updated ``k`` times. mu itself is a buffer
    of the objective and is changed in place on its device, so nothing waits for the device; a checkpoint holds mu
    and the number of updates, and a resumed run goes on as the uninterrupted one.

    Args:
        add: Added at every update, >= 0; 0 for a multiplicative schedule.
        multiply: Factor at every update, >= 1; 1 for an additive schedule. With both at their defaults mu is constant.
        maximum: Cap of mu, > 0 and at least the initial mu; ``None`` for no cap.
        every: Update before each ``"epoch"`` or each optimizer ``"step"`` but the first.

    Raises:
        ValueError: If an argument is out of its range.
        MisconfigurationException: At the start of fit, if the module has no AltMin core or mu is above ``maximum``.
    """

    def __init__(
        self,
        add: float = 0.0,
        multiply: float = 1.0,
        maximum: float | None = None,
        every: Literal["epoch", "step"] = "epoch",
    ) -> None:
        check_number("add", add, least=0)
        check_number("multiply", multiply, least=1)
        if maximum is not None:
            check_number("maximum", maximum, above=0, otherwise="None for no cap")
        if every not in ("epoch", "step"):
            raise ValueError(f"every must be 'epoch' or 'step', got {every!r}")
        self.add = add
        self.multiply = multiply
        self.maximum = maximum
        self.every = every
        self._updates: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the module; forget an earlier run."""
        if stage != "fit":
            return
        core_of(pl_module, self)
        # A second fit of the same Trainer goes on counting epochs and steps, so the updates go on too.
        if trainer.current_epoch == 0 and trainer.global_step == 0:
            self._updates = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the cap against mu as it is now, restored from a checkpoint if there is one."""
        mu = core_of(pl_module, self).objective.mu
        if self.maximum is not None and float(mu) > self.maximum * (1 + torch.finfo(mu.dtype).eps):
            raise MisconfigurationException(
                f"MuSchedule: maximum={self.maximum} is below the objective's mu={float(mu):g}; raise maximum or "
                "lower mu"
            )
        if self._updates is None:
            self._updates = self._due(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Make the updates that are due before this batch."""
        assert self._updates is not None
        while self._updates < self._due(trainer):
            self._update(core_of(pl_module, self).objective.mu)
            self._updates += 1

    def state_dict(self) -> dict[str, Any]:
        """The number of updates made; mu is saved with the model."""
        return {} if self._updates is None else {"updates": self._updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting updates."""
        self._updates = state_dict.get("updates")

    def _due(self, trainer: Trainer) -> int:
        return trainer.current_epoch if self.every == "epoch" else trainer.global_step

    @torch.no_grad()
    def _update(self, mu: torch.Tensor) -> None:
        if self.add > 0:
            mu.add_(self.add)
        if self.multiply > 1:
            mu.mul_(self.multiply)
        if self.maximum is not None:
            mu.clamp_(max=self.maximum)
