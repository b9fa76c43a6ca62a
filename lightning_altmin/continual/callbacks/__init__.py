"""Callbacks of continual learning; they work with any LightningModule and the data modules of streams."""

from lightning_altmin.continual.callbacks.evaluation import ContinualEvaluation
from lightning_altmin.continual.callbacks.ewc import OnlineEWC
from lightning_altmin.continual.callbacks.memory_policy import MemoryPolicy
from lightning_altmin.continual.callbacks.optimizer_state import ResetOptimizerState
from lightning_altmin.continual.callbacks.orthogonal_weights import OrthogonalWeights
from lightning_altmin.continual.callbacks.prequential import PrequentialAccuracy
from lightning_altmin.continual.callbacks.synaptic_intelligence import SynapticIntelligence
from lightning_altmin.continual.callbacks.task_checkpoint import TaskCheckpoint
from lightning_altmin.continual.callbacks.task_early_stopping import TaskEarlyStopping
from lightning_altmin.continual.callbacks.task_learning_rates import TaskLearningRates

__all__ = [
    "ContinualEvaluation",
    "MemoryPolicy",
    "OnlineEWC",
    "OrthogonalWeights",
    "PrequentialAccuracy",
    "ResetOptimizerState",
    "SynapticIntelligence",
    "TaskCheckpoint",
    "TaskEarlyStopping",
    "TaskLearningRates",
]
