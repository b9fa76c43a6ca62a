"""What callbacks that measure every n-th batch share: when, where the numbers go, and how they are drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_altmin.arguments import check_count
from lightning_altmin.optional_imports import import_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class LayerWatch(Callback):
    """Base of callbacks that measure something at every n-th training batch.

    Names are ``<group>/<layer>/<quantity>``, or ``<group>/<quantity>`` for what belongs to the whole network. Numbers
    go to every logger of the Trainer at the very batch they were measured at, whatever ``log_every_n_steps`` is, to
    ``trainer.callback_metrics``, and to `history`, which checkpoints keep.

    Args:
        every_n_steps: Measure at every n-th batch, >= 1, the n-th being the first.

    Attributes:
        history: One row per measured batch: ``{"step": ..., name: value, ...}``; the step is that of the loggers.

    Raises:
        ValueError: If ``every_n_steps`` is below 1.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        check_count("every_n_steps", every_n_steps)
        self.every_n_steps = every_n_steps
        self.history: list[dict[str, float]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier run."""
        # A second fit of the same Trainer goes on counting steps, so its history goes on too.
        if stage == "fit" and trainer.global_step == 0:
            self.history = []

    def is_due(self, trainer: Trainer) -> bool:
        """Whether the batch that is beginning is to be measured."""
        batch: int = trainer.fit_loop.total_batch_idx
        return (batch + 1) % self.every_n_steps == 0

    def record(self, trainer: Trainer, pl_module: LightningModule, values: Mapping[str, Tensor]) -> None:
        """Log and keep scalars of the current batch; they are fetched from the device together, once."""
        dtype = torch.float32
        for value in values.values():
            dtype = torch.promote_types(dtype, value.dtype)
        numbers = torch.stack([value.detach().to(dtype) for value in values.values()]).tolist()
        row = dict(zip(values, numbers, strict=True))
        step = trainer.fit_loop.epoch_loop._batches_that_stepped  # the x axis of everything else that is logged
        for logger in trainer.loggers:
            logger.log_metrics(row, step=step)
        pl_module.log_dict(row, logger=False, on_step=True, on_epoch=False)
        self.history.append({"step": step, **row})

    def state_dict(self) -> dict[str, Any]:
        """The history."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the history of the run that is resumed."""
        self.history = list(state_dict["history"])

    def plot(self) -> Figure:
        """Draw the history: one panel per quantity, one line per layer.

        Returns:
            A matplotlib figure; save it with ``figure.savefig(path)``.

        Raises:
            ImportError: If matplotlib is not installed.
            RuntimeError: If nothing was measured yet.
        """
        if not self.history:
            raise RuntimeError(
                f"{type(self).__name__} has measured nothing yet: train for at least "
                f"every_n_steps={self.every_n_steps} batches"
            )
        panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for row in self.history:
            for name, value in row.items():
                if name != "step":
                    _, *layer, quantity = name.split("/")
                    line = panels.setdefault(quantity, {}).setdefault("/".join(layer), [])
                    line.append((row["step"], value))
        figure: Figure = import_extra("matplotlib.figure").Figure(
            figsize=(6.4, 2.4 * len(panels)), layout="constrained"
        )
        for axes, (quantity, lines) in zip(
            figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True
        ):
            for layer_name, points in lines.items():
                axes.plot(*zip(*points, strict=True), label=layer_name or None, marker=".")
            axes.set_ylabel(quantity.replace("_", " "))
            axes.set_xlabel("step")
            if any(lines):
                axes.legend(title="layer", fontsize="small")
        return figure
