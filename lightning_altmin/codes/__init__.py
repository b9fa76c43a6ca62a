"""Code solvers: one algorithm, one file."""

from lightning_altmin.codes.base import CodeProblem, CodeSolver
from lightning_altmin.codes.curvature import CurvatureCodes
from lightning_altmin.codes.discrete import DiscreteCodes
from lightning_altmin.codes.gradient import GradientCodes
from lightning_altmin.codes.least_squares import LeastSquaresCodes
from lightning_altmin.codes.line_search import LineSearchCodes
from lightning_altmin.codes.proximal import ProximalCodes

__all__ = [
    "CodeProblem",
    "CodeSolver",
    "CurvatureCodes",
    "DiscreteCodes",
    "GradientCodes",
    "LeastSquaresCodes",
    "LineSearchCodes",
    "ProximalCodes",
]
