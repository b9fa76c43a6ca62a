"""Weight solvers: one algorithm, one file."""

from lightning_altmin.weights.base import WeightProblem, WeightSolver
from lightning_altmin.weights.bcd import bcd
from lightning_altmin.weights.layerwise import LayerwiseWeights
from lightning_altmin.weights.local_gradient import LocalGradient
from lightning_altmin.weights.memory import CoactivationMemory
from lightning_altmin.weights.proximal import ProximalAdam, ProximalSGD, ProximalWeights
from lightning_altmin.weights.ridge import SingularStatisticsWarning, ridge_solution

__all__ = [
    "CoactivationMemory",
    "LayerwiseWeights",
    "LocalGradient",
    "ProximalAdam",
    "ProximalSGD",
    "ProximalWeights",
    "SingularStatisticsWarning",
    "WeightProblem",
    "WeightSolver",
    "bcd",
    "ridge_solution",
]
