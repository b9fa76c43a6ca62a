"""Train neural networks by online alternating minimization instead of backpropagation, in PyTorch Lightning."""

from lightning_altmin.__about__ import __version__
from lightning_altmin.altmin import AltMin
from lightning_altmin.baselines import BackpropModule
from lightning_altmin.codes import (
    CodeSolver,
    CurvatureCodes,
    DiscreteCodes,
    GradientCodes,
    LeastSquaresCodes,
    LineSearchCodes,
    ProximalCodes,
)
from lightning_altmin.module import AltMinModule
from lightning_altmin.network import CodedNetwork
from lightning_altmin.objective import AltMinObjective
from lightning_altmin.recurrent import CodedRecurrentNetwork
from lightning_altmin.sequence_classifier import SequenceClassifier
from lightning_altmin.step import Step
from lightning_altmin.strategies import LayerParallelStrategy
from lightning_altmin.weights import (
    CoactivationMemory,
    LayerwiseWeights,
    LocalGradient,
    ProximalWeights,
    WeightSolver,
)

__all__ = [
    "AltMin",
    "AltMinModule",
    "AltMinObjective",
    "BackpropModule",
    "CoactivationMemory",
    "CodeSolver",
    "CodedNetwork",
    "CodedRecurrentNetwork",
    "CurvatureCodes",
    "DiscreteCodes",
    "GradientCodes",
    "LayerParallelStrategy",
    "LayerwiseWeights",
    "LeastSquaresCodes",
    "LineSearchCodes",
    "LocalGradient",
    "ProximalCodes",
    "ProximalWeights",
    "SequenceClassifier",
    "Step",
    "WeightSolver",
    "__version__",
]
