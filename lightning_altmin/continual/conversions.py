"""Streams made of other libraries' objects, which are recognised by what they offer; none of them is imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from lightning_altmin.continual.samples import SamplesLike, as_samples
from lightning_altmin.continual.streams import held_out
from lightning_altmin.continual.task import Task, TaskStream
from lightning_altmin.data.resumable_loader import BatchPreparation
from lightning_altmin.data.seeding import derived_generator


def from_datasets(
    train: Sequence[SamplesLike],
    test: Sequence[SamplesLike],
    val_split: int | float = 0.0,
    seed: int = 0,
    num_classes: int | None = None,
    prepare: BatchPreparation | None = None,
    disjoint_classes: bool = False,
    names: Sequence[str] | None = None,
    name: str = "data sets",
) -> TaskStream:
    """One task per data set.

    Args:
        train: Training data of each task, see `SamplesLike`.
        test: Test data of each task, in the same order.
        val_split: Part of each task's training samples held out for validation.
        seed: Of the held-out parts.
        num_classes: See `TaskStream`.
        prepare: See `TaskStream`.
        disjoint_classes: See `TaskStream`.
        names: Names of the tasks.
        name: See `TaskStream`.

    Raises:
        ValueError: If the lists differ in length, and as `Task` and `TaskStream` do.
    """
    names = [""] * len(train) if names is None else names
    if not len(train) == len(test) == len(names):
        raise ValueError(
            f"train, test and names must have one entry per task, got {len(train)}, {len(test)} and {len(names)}"
        )
    tasks = []
    for index, (own_train, own_test, own_name) in enumerate(zip(train, test, names, strict=True)):
        samples, tests = as_samples(own_train), as_samples(own_test)
        classes = samples.classes
        samples, val = held_out(samples, val_split, derived_generator(seed, index))
        tasks.append(Task(index, samples, tests, val, classes, own_name))
    return TaskStream(tasks, num_classes, prepare, disjoint_classes, name)


def from_avalanche(
    benchmark: Any, num_classes: int | None = None, prepare: BatchPreparation | None = None
) -> TaskStream:
    """The stream of an Avalanche benchmark: anything with ``train_stream`` and ``test_stream``.

    Each experience's ``dataset`` is read in its training and evaluation transformations (``.train()`` and ``.eval()``)
    if it has such; of its samples ``(x, y, task label)`` the label is dropped.

    Args:
        benchmark: The benchmark.
        num_classes: See `TaskStream`.
        prepare: See `TaskStream`.

    Raises:
        TypeError: If ``benchmark`` has not the two streams.
        ValueError: As `from_datasets`.
    """
    if not (hasattr(benchmark, "train_stream") and hasattr(benchmark, "test_stream")):
        raise TypeError(f"benchmark must have train_stream and test_stream, got {type(benchmark).__name__}")
    train = [_Pairs(_in_mode(experience.dataset, "train")) for experience in benchmark.train_stream]
    test = [_Pairs(_in_mode(experience.dataset, "eval")) for experience in benchmark.test_stream]
    return from_datasets(train, test, num_classes=num_classes, prepare=prepare, name="Avalanche benchmark")


def from_continuum(
    train_scenario: Any,
    test_scenario: Any,
    num_classes: int | None = None,
    prepare: BatchPreparation | None = None,
) -> TaskStream:
    """The stream of two continuum scenarios: sequences of task sets that yield ``(x, y, task)``.

    Args:
        train_scenario: Task sets to train on.
        test_scenario: Task sets to test on, as many.
        num_classes: See `TaskStream`.
        prepare: See `TaskStream`.

    Raises:
        ValueError: As `from_datasets`.
    """
    train = [_Pairs(tasks) for tasks in train_scenario]
    test = [_Pairs(tasks) for tasks in test_scenario]
    return from_datasets(train, test, num_classes=num_classes, prepare=prepare, name="continuum scenario")


class _Pairs(Dataset[tuple[torch.Tensor, int]]):
    """The first two fields of every sample."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        targets = getattr(dataset, "targets", None)
        if targets is None:
            targets = getattr(dataset, "_y", None)  # where continuum keeps them; reading every image would be slow
        self.targets = None if targets is None else torch.as_tensor([int(target) for target in targets])
        if self.targets is not None and len(self.targets) != len(dataset):
            self.targets = None

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        sample = self._dataset[index]
        return torch.as_tensor(sample[0]), int(sample[1])


def _in_mode(dataset: Any, mode: str) -> Any:
    switch = getattr(dataset, mode, None)
    return switch() if callable(switch) else dataset
