"""Methods to compare with, under the same Trainer, data and metrics."""

from lightning_altmin.baselines.backprop import BackpropModule

__all__ = ["BackpropModule"]
