"""Methods to compare with, under the same Trainer, data and metrics."""

from lightning_altmin.baselines.admm import ADMMModule
from lightning_altmin.baselines.backprop import BackpropModule
from lightning_altmin.baselines.bcd import BCDModule, small_weights
from lightning_altmin.baselines.mac import MACModule
from lightning_altmin.baselines.output_losses import Hinge, OutputLoss, SquaredError

__all__ = [
    "ADMMModule",
    "BCDModule",
    "BackpropModule",
    "Hinge",
    "MACModule",
    "OutputLoss",
    "SquaredError",
    "small_weights",
]
