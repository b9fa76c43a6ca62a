"""A task, and the sequence of tasks that a learner meets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from lightning_altmin.continual.samples import Samples, SamplesLike, as_samples
from lightning_altmin.data.resumable_loader import BatchPreparation


@dataclass(frozen=True)
class Task:
    """One chunk of a stream: data that is trained on before the next chunk comes.

    ``train``, ``test`` and ``val`` may be given as anything that `SamplesLike` names.

    Attributes:
        index: Place in the stream, from 0.
        train: Training samples.
        test: Test samples.
        val: Validation samples, for early stopping; ``None`` for none.
        classes: Labels of the task, ascending; those of its training samples if not given.
        name: For tables and plots; ``task <index>`` if not given.

    Raises:
        ValueError: If there are no training or test samples, if ``val`` is empty, or if a sample's label is not in
            ``classes``.
    """

    index: int
    train: Samples
    test: Samples
    val: Samples | None = None
    classes: tuple[int, ...] = ()
    name: str = ""

    def __post_init__(self) -> None:
        for part in ("train", "test", "val"):
            data: SamplesLike | None = getattr(self, part)
            if data is not None:
                object.__setattr__(self, part, as_samples(data))
        object.__setattr__(self, "name", self.name or f"task {self.index}")
        object.__setattr__(self, "classes", tuple(sorted(self.classes)) or self.train.classes)
        for part, samples in self.parts().items():
            if len(samples) == 0:
                raise ValueError(f"task {self.index} ({self.name!r}) has no samples in its {part} data")
            unknown = sorted(set(samples.classes) - set(self.classes))
            if unknown:
                raise ValueError(
                    f"task {self.index} ({self.name!r}): its {part} data has labels {unknown}, which are not among the "
                    f"task's classes {list(self.classes)}"
                )

    def parts(self) -> dict[str, Samples]:
        """The samples by part: ``train``, ``test`` and, where there are such, ``val``."""
        parts = {"train": self.train, "test": self.test}
        return parts if self.val is None else {**parts, "val": self.val}


class TaskStream(Sequence[Task]):
    """A sequence of tasks with what they have in common.

    Args:
        tasks: The tasks in order, numbered from 0.
        num_classes: Outputs that a classifier needs; one more than the largest label if not given.
        prepare: Deterministic last step of every batch of every task, such as normalisation. Replay buffers hold
            samples as they are before it: bytes, where images are bytes.
        disjoint_classes: Whether two tasks with a class in common are an error.
        name: For tables and plots.

    Raises:
        ValueError: If there is no task, the tasks are not numbered in order, a label is outside
            ``0 .. num_classes - 1``, or ``disjoint_classes`` is set and a class is in two tasks.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        num_classes: int | None = None,
        prepare: BatchPreparation | None = None,
        disjoint_classes: bool = False,
        name: str = "",
    ) -> None:
        self._tasks = tuple(tasks)
        if not self._tasks:
            raise ValueError("tasks must have at least one task, got none")
        numbers = [task.index for task in self._tasks]
        if numbers != list(range(len(numbers))):
            raise ValueError(f"tasks must be numbered 0, 1, 2, ... in order, got {numbers}")
        labels = {label for task in self._tasks for label in task.classes}
        self.num_classes = max(labels) + 1 if num_classes is None else num_classes
        unknown = sorted(label for label in labels if not 0 <= label < self.num_classes)
        if unknown:
            raise ValueError(f"labels {unknown} are unknown: num_classes={self.num_classes} allows 0 to one less")
        if disjoint_classes:
            _check_disjoint([task.classes for task in self._tasks])
        self.prepare = prepare
        self.name = name or "stream"

    @overload
    def __getitem__(self, index: int) -> Task: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Task, ...]: ...

    def __getitem__(self, index: int | slice) -> Task | tuple[Task, ...]:
        return self._tasks[index]

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self._tasks)

    def __repr__(self) -> str:
        return f"TaskStream({self.name!r}, {len(self)} tasks, {self.num_classes} classes)"

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input as the network sees it, without the batch dimension."""
        x, _ = self._tasks[0].test.read(torch.tensor([0]))
        return tuple(self.prepared(x).shape[1:])

    def prepared(self, x: Tensor) -> Tensor:
        """A batch of inputs after the last step, ``prepare``."""
        return x if self.prepare is None else self.prepare(x)

    def first(self, number: int) -> TaskStream:
        """The stream of the first tasks only.

        Raises:
            ValueError: If the stream is shorter, or ``number`` is not positive.
        """
        if not 1 <= number <= len(self):
            raise ValueError(f"{number} tasks were asked for, but {self.name} has {len(self)}")
        return self._copy(self._tasks[:number])

    def joint(self) -> TaskStream:
        """One task with the training (and validation) samples of all, the usual upper reference of a stream.

        Its test samples are those of all tasks as well; evaluate on the tasks of the original stream to fill a row of
        its matrix.
        """
        whole: dict[str, Any] = {}
        for part in ("train", "test", "val"):
            found = [task.parts()[part] for task in self._tasks if part in task.parts()]
            whole[part] = sum(found[1:], found[0]) if found else None
        return self._copy([Task(0, classes=tuple(range(self.num_classes)), name="joint", **whole)])

    def _copy(self, tasks: Sequence[Task]) -> TaskStream:
        return TaskStream(tasks, self.num_classes, self.prepare, name=self.name)


def _check_disjoint(classes: Sequence[tuple[int, ...]]) -> None:
    owner: dict[int, int] = {}
    for index, labels in enumerate(classes):
        for label in labels:
            if label in owner:
                raise ValueError(
                    f"class {label} is in task {owner[label]} and in task {index}: the tasks' classes must not overlap"
                )
            owner[label] = index
