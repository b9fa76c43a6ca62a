"""Weight solvers: one algorithm, one file."""

from lightning_altmin.weights.base import WeightProblem, WeightSolver
from lightning_altmin.weights.local_gradient import LocalGradient

__all__ = ["LocalGradient", "WeightProblem", "WeightSolver"]
