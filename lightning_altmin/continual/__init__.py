"""Continual learning: streams of tasks, their data modules, callbacks, metrics and replay."""

from lightning_altmin.continual import metrics
from lightning_altmin.continual.accuracy_matrix import TaskAccuracyMatrix
from lightning_altmin.continual.buffers import ClassBalancedBuffer, ReservoirBuffer, SampleBuffer
from lightning_altmin.continual.callbacks import (
    ContinualEvaluation,
    MemoryPolicy,
    OnlineEWC,
    OrthogonalWeights,
    PrequentialAccuracy,
    ResetOptimizerState,
    SynapticIntelligence,
    TaskCheckpoint,
    TaskEarlyStopping,
    TaskLearningRates,
)
from lightning_altmin.continual.conversions import from_avalanche, from_continuum, from_datasets
from lightning_altmin.continual.data_module import StreamDataModule, TaskStreamDataModule
from lightning_altmin.continual.online_data_module import OnlineTaskStreamDataModule
from lightning_altmin.continual.ready_made import (
    mnist_to_fashion,
    permuted_mnist,
    rotated_mnist,
    split_cifar10,
    split_digits,
    split_mnist,
)
from lightning_altmin.continual.replay import Replay
from lightning_altmin.continual.samples import Samples
from lightning_altmin.continual.streams import fuzzy, new_instances, permuted_pixels, rotated, split_classes
from lightning_altmin.continual.task import Task, TaskStream

__all__ = [
    "ClassBalancedBuffer",
    "ContinualEvaluation",
    "MemoryPolicy",
    "OnlineEWC",
    "OnlineTaskStreamDataModule",
    "OrthogonalWeights",
    "PrequentialAccuracy",
    "Replay",
    "ReservoirBuffer",
    "ResetOptimizerState",
    "SampleBuffer",
    "Samples",
    "StreamDataModule",
    "SynapticIntelligence",
    "Task",
    "TaskAccuracyMatrix",
    "TaskCheckpoint",
    "TaskEarlyStopping",
    "TaskLearningRates",
    "TaskStream",
    "TaskStreamDataModule",
    "from_avalanche",
    "from_continuum",
    "from_datasets",
    "fuzzy",
    "metrics",
    "mnist_to_fashion",
    "new_instances",
    "permuted_mnist",
    "permuted_pixels",
    "rotated",
    "rotated_mnist",
    "split_cifar10",
    "split_classes",
    "split_digits",
    "split_mnist",
]
