"""Builders that make a stream of tasks from one data set.

Whatever is drawn comes from generators of their own: the global ones are not touched, and the same seed gives the same
stream in every process.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_altmin.arguments import check_count, check_number
from lightning_altmin.continual.samples import Samples, SamplesLike, as_samples
from lightning_altmin.continual.task import Task, TaskStream
from lightning_altmin.data.resumable_loader import BatchPreparation
from lightning_altmin.data.seeding import derived_generator
from lightning_altmin.data.val_split import hold_out
from lightning_altmin.optional_imports import import_extra

Labels = Literal["global", "local"]

# Numbers of derived generators; a task's own has the task's number.
_CLASS_ORDER, _TRAIN_DEAL, _TEST_DEAL, _EXCHANGE = -1, -2, -3, -4


def split_classes(
    train: SamplesLike,
    test: SamplesLike,
    num_tasks: int | None = None,
    groups: Sequence[Sequence[int]] | None = None,
    labels: Labels = "global",
    val_split: int | float = 0.0,
    seed: int = 0,
    shuffle_classes: bool = False,
    prepare: BatchPreparation | None = None,
    name: str = "split classes",
) -> TaskStream:
    """New classes in every task (class-incremental; task-incremental if the task is told at test time).

    Args:
        train: Training data, see `SamplesLike`.
        test: Test data.
        num_tasks: Number of tasks; the classes are dealt out in order, as evenly as they can be.
        groups: The classes of each task, instead of ``num_tasks``; every class must be in exactly one.
        labels: ``"global"`` keeps labels. ``"local"`` numbers the classes of each task from 0, so that all tasks share
            their outputs (domain-incremental).
        val_split: Part of each task's training samples held out for validation: a share in [0, 1) or a number.
        seed: Of the held-out parts and of ``shuffle_classes``.
        shuffle_classes: Whether the classes are dealt out in random order instead of ascending.
        prepare: See `TaskStream`.
        name: See `TaskStream`.

    Raises:
        ValueError: If not exactly one of ``num_tasks`` and ``groups`` is given, there are fewer classes than tasks,
            groups overlap or leave out a class, or a group's class has no sample.
    """
    samples, tests = as_samples(train), as_samples(test)
    if (num_tasks is None) == (groups is None):
        raise ValueError(f"give num_tasks or groups, and not both; got num_tasks={num_tasks}, groups={groups}")
    if labels not in ("global", "local"):
        raise ValueError(f"labels must be 'global' or 'local', got {labels!r}")
    if groups is None:
        order = list(samples.classes)
        if shuffle_classes:
            order = [order[i] for i in torch.randperm(len(order), generator=derived_generator(seed, _CLASS_ORDER))]
        groups = _dealt(order, num_tasks)
    else:
        _check_groups(groups, samples.classes)
    tasks = []
    for index, group in enumerate(groups):
        parts = {part: _of_classes(data, group) for part, data in (("train", samples), ("test", tests))}
        _check_present(index, group, parts)
        if labels == "local":
            local = {label: place for place, label in enumerate(group)}
            parts = {part: data.with_labels(local) for part, data in parts.items()}
        classes = tuple(group) if labels == "global" else tuple(range(len(group)))
        described = f"classes {', '.join(map(str, group))}"
        tasks.append(_task(index, parts["train"], parts["test"], val_split, seed, classes, described))
    stray = sorted(set(tests.classes) - set(samples.classes))
    if stray:
        raise ValueError(f"test has labels {stray} that train does not have, so no task could teach them")
    return TaskStream(tasks, prepare=prepare, disjoint_classes=labels == "global", name=name)


def permuted_pixels(
    train: SamplesLike,
    test: SamplesLike,
    num_tasks: int = 10,
    val_split: int | float = 0.0,
    seed: int = 0,
    prepare: BatchPreparation | None = None,
    name: str = "permuted pixels",
) -> TaskStream:
    """The same samples in every task, under a fixed permutation of the pixels per task (domain-incremental).

    The first task is not permuted. Positions are permuted, channels stay together.

    Args:
        train: Training data with inputs of one shape.
        test: Test data.
        num_tasks: Number of tasks, >= 1.
        val_split: Part of the training samples held out for validation, the same samples in every task.
        seed: Of the permutations and the held-out part.
        prepare: See `TaskStream`.
        name: See `TaskStream`.

    Raises:
        ValueError: If ``num_tasks`` is not positive.
    """
    check_count("num_tasks", num_tasks)
    samples, tests = as_samples(train), as_samples(test)
    shape = samples.read(torch.tensor([0]))[0].shape[1:]
    positions = math.prod(shape[1:]) if len(shape) == 3 else math.prod(shape)
    mappings: list[BatchPreparation | None] = [None]
    for index in range(1, num_tasks):
        mappings.append(_Permute(torch.randperm(positions, generator=derived_generator(seed, index))))
    names = ["as it is", *(f"permutation {index}" for index in range(1, num_tasks))]
    return _mapped_tasks(samples, tests, mappings, names, val_split, seed, prepare, name)


def rotated(
    train: SamplesLike,
    test: SamplesLike,
    angles: Sequence[float],
    val_split: int | float = 0.0,
    seed: int = 0,
    prepare: BatchPreparation | None = None,
    name: str = "rotated",
) -> TaskStream:
    """The same images in every task, turned by an angle per task (domain-incremental).

    Args:
        train: Training images, inputs of shape (channels, height, width).
        test: Test images.
        angles: One angle per task, in degrees, counter-clockwise; bilinear, corners filled with 0.
        val_split: Part of the training samples held out for validation, the same samples in every task.
        seed: Of the held-out part.
        prepare: See `TaskStream`.
        name: See `TaskStream`.

    Raises:
        ValueError: If there are no angles, or inputs are not images.
        ImportError: If torchvision is not installed.
    """
    if not angles:
        raise ValueError("angles must name at least one angle, got none")
    samples, tests = as_samples(train), as_samples(test)
    shape = tuple(samples.read(torch.tensor([0]))[0].shape[1:])
    if len(shape) != 3:
        raise ValueError(f"rotated needs images of shape (channels, height, width), got inputs of shape {shape}")
    mappings: list[BatchPreparation | None] = [_Rotate(angle) if angle else None for angle in angles]
    names = [f"{angle:g} degrees" for angle in angles]
    return _mapped_tasks(samples, tests, mappings, names, val_split, seed, prepare, name)


def new_instances(
    train: SamplesLike,
    test: SamplesLike,
    num_tasks: int,
    val_split: int | float = 0.0,
    seed: int = 0,
    prepare: BatchPreparation | None = None,
    name: str = "new instances",
) -> TaskStream:
    """New samples of the same classes in every task: training and test samples are dealt out at random.

    Args:
        train: Training data.
        test: Test data; dealt out too, so that every sample is in exactly one task.
        num_tasks: Number of tasks, >= 1.
        val_split: Part of each task's training samples held out for validation.
        seed: Of the deal and of the held-out parts.
        prepare: See `TaskStream`.
        name: See `TaskStream`.

    Raises:
        ValueError: If there are fewer training or test samples than tasks.
    """
    samples, tests = as_samples(train), as_samples(test)
    classes = samples.classes
    dealt = []
    for data, number in ((samples, _TRAIN_DEAL), (tests, _TEST_DEAL)):
        order = torch.randperm(len(data), generator=derived_generator(seed, number))
        dealt.append([data.take(rows) for rows in _dealt(order, num_tasks)])
    tasks = [
        _task(index, own_train, own_test, val_split, seed, classes, f"instances {index}")
        for index, (own_train, own_test) in enumerate(zip(*dealt, strict=True))
    ]
    return TaskStream(tasks, prepare=prepare, name=name)


def fuzzy(stream: TaskStream, mix: float = 0.1, seed: int = 0) -> TaskStream:
    """Blurred boundaries: at each boundary, training samples of the task before and the one after change places.

    No sample is lost or doubled, tasks keep their sizes, and test data is left alone.

    Args:
        stream: The stream to blur.
        mix: Share of the smaller of two neighbours that crosses their boundary in each direction, in [0, 0.5]; rounded,
            but never more than half of its samples.
        seed: Of the choice of samples.

    Raises:
        ValueError: If ``mix`` is out of range.
    """
    check_number("mix", mix, least=0, most=0.5)
    trains = [task.train for task in stream]
    generator = derived_generator(seed, _EXCHANGE)
    orders = [torch.randperm(len(train), generator=generator) for train in trains]
    # Two boundaries take from one task: with more than half of it each, they would take a sample twice.
    smaller = [min(len(a), len(b)) for a, b in pairwise(trains)]
    crossing = [min(round(mix * size), size // 2) for size in smaller]
    blurred = []
    for index, (train, order) in enumerate(zip(trains, orders, strict=True)):
        # Of a task's random order, the first samples go to the task before and the last ones to the task after.
        to_before = crossing[index - 1] if index > 0 else 0
        to_after = crossing[index] if index < len(crossing) else 0
        mixed = train.take(order[to_before : len(order) - to_after])
        if to_before:
            mixed = trains[index - 1].take(orders[index - 1][-to_before:]) + mixed
        if to_after:
            mixed = mixed + trains[index + 1].take(orders[index + 1][:to_after])
        blurred.append(mixed)
    tasks = []
    for task, train in zip(stream, blurred, strict=True):
        classes = tuple(set(task.classes) | set(train.classes))
        tasks.append(Task(task.index, train, task.test, task.val, classes, task.name))
    return TaskStream(tasks, stream.num_classes, stream.prepare, name=f"{stream.name}, fuzzy")


class _Permute:
    """Permutes the positions of a batch of images ``(n, channels, height, width)`` or vectors ``(n, features)``."""

    def __init__(self, order: Tensor) -> None:
        self._order = order

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.flatten(2) if x.dim() == 4 else x.flatten(1)
        return flat.index_select(-1, self._order.to(x.device)).view_as(x)


class _Rotate:
    """Turns a batch of images."""

    def __init__(self, angle: float) -> None:
        self._angle = angle

    def __call__(self, x: Tensor) -> Tensor:
        functional = import_extra("torchvision.transforms.v2.functional")
        bilinear = import_extra("torchvision.transforms.v2").InterpolationMode.BILINEAR
        turned: Tensor = functional.rotate(x, self._angle, interpolation=bilinear)
        return turned


def held_out(samples: Samples, val_split: int | float, generator: torch.Generator) -> tuple[Samples, Samples | None]:
    """Training and validation part of a task's training samples.

    Raises:
        ValueError: If ``val_split`` is out of range, leaves no training sample or holds out none.
    """
    parts = hold_out(len(samples), val_split, generator)
    return (samples, None) if parts is None else (samples.take(parts[0]), samples.take(parts[1]))


def _task(
    index: int,
    train: Samples,
    test: Samples,
    val_split: int | float,
    seed: int,
    classes: tuple[int, ...],
    name: str,
) -> Task:
    train, val = held_out(train, val_split, derived_generator(seed, index))
    return Task(index, train, test, val, classes, name)


def _mapped_tasks(
    train: Samples,
    test: Samples,
    mappings: Sequence[BatchPreparation | None],
    names: Sequence[str],
    val_split: int | float,
    seed: int,
    prepare: BatchPreparation | None,
    name: str,
) -> TaskStream:
    classes = train.classes
    train, val = held_out(train, val_split, derived_generator(seed, 0))
    tasks = []
    for index, (mapping, task_name) in enumerate(zip(mappings, names, strict=True)):
        parts = [data if data is None or mapping is None else data.with_inputs(mapping) for data in (train, test, val)]
        tasks.append(Task(index, parts[0], parts[1], parts[2], classes, task_name))  # type: ignore[arg-type]
    return TaskStream(tasks, prepare=prepare, name=name)


def _of_classes(samples: Samples, classes: Sequence[int]) -> Samples:
    return samples.take(torch.isin(samples.labels, torch.tensor(list(classes))).nonzero().squeeze(1))


def _dealt(items: Any, num_tasks: int | None) -> list[Any]:
    """Consecutive pieces whose lengths differ by at most one."""
    check_count("num_tasks", num_tasks)
    assert num_tasks is not None
    if len(items) < num_tasks:
        raise ValueError(f"num_tasks={num_tasks} is more than there is to deal out: {len(items)} classes or samples")
    size, rest = divmod(len(items), num_tasks)
    bounds = [index * size + min(index, rest) for index in range(num_tasks + 1)]
    return [items[low:high] for low, high in pairwise(bounds)]


def _check_groups(groups: Sequence[Sequence[int]], classes: tuple[int, ...]) -> None:
    named = [label for group in groups for label in group]
    double = sorted({label for label in named if named.count(label) > 1})
    if double:
        raise ValueError(f"groups overlap: classes {double} are named more than once")
    if unknown := sorted(set(named) - set(classes)):
        raise ValueError(f"groups name unknown classes {unknown}; the training data has {list(classes)}")
    if left := sorted(set(classes) - set(named)):
        raise ValueError(f"groups leave out classes {left}: every class must be in exactly one group")
    if empty := [index for index, group in enumerate(groups) if not group]:
        raise ValueError(f"groups {empty} are empty: a task needs at least one class")


def _check_present(index: int, group: Sequence[int], parts: dict[str, Samples]) -> None:
    for part, samples in parts.items():
        if missing := sorted(set(group) - set(samples.classes)):
            raise ValueError(f"the {part} data has no samples of classes {missing}, which task {index} is made of")
