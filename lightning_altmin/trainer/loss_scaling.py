"""Lightning's loss scaling, which AltMin does without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer


@contextmanager
def without_loss_scaling(trainer: Trainer) -> Iterator[None]:
    """Step an optimizer inside this context: Lightning's gradient scaler for float16 is left out.

    Backprop multiplies its loss so that no gradient on the way down is too small for float16. AltMin has no such way:
    each product scales its own factor (`lightning_altmin.engines.rule.product`), and gradients arrive unscaled.
    """
    plugin: Any = trainer.precision_plugin
    scaler = getattr(plugin, "scaler", None)
    if scaler is None:
        yield
        return
    plugin.scaler = None
    try:
        yield
    finally:
        plugin.scaler = scaler
