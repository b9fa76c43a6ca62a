"""The loss of the output stage, in the two forms the algorithm needs: as the user gave it, and summed over samples."""

from lightning_altmin.losses.base import LocalLoss, Loss, LossAt
from lightning_altmin.losses.by_autograd import CallableLoss, ModuleLoss
from lightning_altmin.losses.cross_entropy import CrossEntropy
from lightning_altmin.losses.mean_squared_error import MeanSquaredError
from lightning_altmin.losses.wrapping import local_loss

__all__ = [
    "CallableLoss",
    "CrossEntropy",
    "LocalLoss",
    "Loss",
    "LossAt",
    "MeanSquaredError",
    "ModuleLoss",
    "local_loss",
]
