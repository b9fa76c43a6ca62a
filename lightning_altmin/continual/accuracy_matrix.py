"""The accuracy matrix of a stream as a torchmetrics Metric."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_altmin.arguments import check_count

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class TaskAccuracyMatrix(Metric):
    """Accuracy on every task after training on every task.

    States are counts of correct and of all samples, summed over processes, so the result is exact for batches and
    shards of any size. One row more than there are tasks: the first is the one before training.

    Args:
        num_tasks: Number of tasks ``T``, >= 1.
        classes: Classes of each task. If given, only outputs of the sample's task compete (task-incremental accuracy,
            the task being told); otherwise all do (class- or domain-incremental).
        **kwargs: See ``torchmetrics.Metric``.

    Raises:
        ValueError: If ``num_tasks`` is not positive or ``classes`` has another length.

    Example:
        >>> matrix = TaskAccuracyMatrix(2)
        >>> matrix.update(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]), task=0, after=0)
        >>> matrix.compute()
        tensor([[0.5000,    nan],
                [   nan,    nan]], dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    correct: Tensor
    total: Tensor

    def __init__(self, num_tasks: int, classes: Sequence[Sequence[int]] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_count("num_tasks", num_tasks)
        if classes is not None and len(classes) != num_tasks:
            raise ValueError(f"classes must have one entry per task, {num_tasks}, got {len(classes)}")
        self.num_tasks = num_tasks
        self.classes = None if classes is None else [tuple(labels) for labels in classes]
        for name in ("correct", "total"):
            counts = torch.zeros(num_tasks + 1, num_tasks, dtype=torch.int64)
            self.add_state(name, counts, dist_reduce_fx="sum", persistent=True)

    def update(self, preds: Tensor, target: Tensor, task: int, after: int) -> None:
        """Count a batch.

        Args:
            preds: Outputs per class, shape ``(n, classes)``.
            target: Labels, shape ``(n,)``.
            task: Task that the samples are from.
            after: Task trained last; -1 before training.

        Raises:
            ValueError: If ``task`` or ``after`` is out of range, the shapes do not fit, or a class of the task has no
                output.
        """
        correct = count_correct(preds, target, None if self.classes is None else self.classes[self._task(task)])
        self._add(self._task(task), after, correct, torch.tensor(len(target), device=correct.device))

    def add_counts(self, correct: Tensor, total: Tensor, after: int) -> None:
        """Count a whole row, already counted elsewhere.

        Args:
            correct: Number of correct samples per task, shape ``(T,)``.
            total: Number of samples per task.
            after: Task trained last; -1 before training.
        """
        self._update_count += 1
        self._computed = None
        self._add(slice(None), after, correct, total)

    def compute(self) -> Tensor:
        """The matrix, shape ``(T, T)``, float64: row after training on a task, column of the task tested on."""
        return self._accuracy()[1:]

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        wrapped = super()._wrap_compute(compute)

        @functools.wraps(compute)
        def shaped() -> Tensor:
            matrix: Tensor = wrapped()  # torchmetrics makes a scalar of a matrix of one task
            return matrix.reshape(self.num_tasks, self.num_tasks)

        return shaped

    def initial(self) -> Tensor:
        """The row before training, shape ``(T,)``, float64."""
        with self.sync_context(should_sync=self._to_sync, should_unsync=self._should_unsync):
            return self._accuracy()[0]

    def plot(self, names: Sequence[str] | None = None) -> Figure:
        """Draw the matrix as a heat map.

        Args:
            names: Names of the tasks.

        Returns:
            A matplotlib figure.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        from lightning_altmin.continual.plots import plot_matrix

        return plot_matrix(self.compute(), names)

    def _accuracy(self) -> Tensor:
        return self.correct.double() / self.total.double()  # 0 / 0 is NaN: not measured

    def _add(self, columns: int | slice, after: int, correct: Tensor, total: Tensor) -> None:
        if not -1 <= after < self.num_tasks:
            raise ValueError(f"after must be a task from 0 to {self.num_tasks - 1}, or -1, got {after}")
        self.correct[after + 1, columns] += correct.to(self.correct.device)
        self.total[after + 1, columns] += total.to(self.total.device)

    def _task(self, task: int) -> int:
        if not 0 <= task < self.num_tasks:
            raise ValueError(f"task must be from 0 to {self.num_tasks - 1}, got {task}")
        return task


def count_correct(logits: Tensor, target: Tensor, classes: Sequence[int] | None = None) -> Tensor:
    """Number of samples whose largest output is that of their label.

    Args:
        logits: Outputs per class, shape ``(n, classes)``.
        target: Labels, shape ``(n,)``.
        classes: The outputs that compete; ``None`` for all.

    Returns:
        A scalar, int64, on the device of ``logits``.

    Raises:
        ValueError: If the shapes do not fit, or there is no output for one of ``classes``.
    """
    if logits.dim() != 2 or target.shape != logits.shape[:1]:
        raise ValueError(
            f"outputs must have shape (n, classes) and labels (n,), got {tuple(logits.shape)} and {tuple(target.shape)}"
        )
    if classes is None:
        return (logits.argmax(1) == target).sum()
    if missing := [label for label in classes if not 0 <= label < logits.shape[1]]:
        raise ValueError(
            f"outputs must be one per class, got {logits.shape[1]} outputs, so none for {missing} of classes "
            f"{list(classes)}; number classes from 0 and make the network's last layer with {max(classes) + 1} outputs "
            "or more"
        )
    competing = torch.tensor(list(classes), device=logits.device)
    return (competing[logits[:, competing].argmax(1)] == target).sum()
