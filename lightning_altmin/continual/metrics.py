"""How well a stream was learnt and how much of it was kept: functions of an accuracy matrix or a trajectory.

The **matrix** ``R`` has shape ``(T, T)``: ``R[i, j]`` is the accuracy on the test data of task ``j`` after training on
task ``i``, both from 0. The **trajectory** has one row per evaluation: ``accuracy`` of shape ``(n, T)``, and for each
row the ``task`` that was being trained (-1 before training).

Numbers are shares in [0, 1], or differences of such. What is not defined (a single task's forgetting, a cell that was
not measured) is NaN, never 0. The same names stand for other numbers in other libraries; the formulas here are those
of the papers that are named. `TaskAccuracyMatrix` measures ``R``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from lightning_altmin.arguments import check_count
from lightning_altmin.continual.accuracy_matrix import TaskAccuracyMatrix

__all__ = [
    "TaskAccuracyMatrix",
    "average_accuracy",
    "average_anytime_accuracy",
    "average_incremental_accuracy",
    "backward_transfer",
    "forgetting",
    "forward_transfer",
    "learning_accuracy",
    "min_accuracy",
    "stability_gap",
    "summary",
    "worst_case_accuracy",
]

Numbers: TypeAlias = Tensor | Sequence[Any]


def average_accuracy(R: Numbers) -> Tensor:
    """Mean accuracy over all tasks after the last one: ``1/T sum_j R[T-1, j]``.

    Lopez-Paz & Ranzato, "Gradient Episodic Memory", 2017; also called final average accuracy.
    """
    return _matrix(R)[-1].mean()


def average_incremental_accuracy(R: Numbers) -> Tensor:
    """Mean over the stream of the mean accuracy on the tasks seen so far: ``1/T sum_i 1/(i+1) sum_{j<=i} R[i, j]``.

    Rebuffi et al., "iCaRL", 2017 ("average incremental accuracy").
    """
    matrix = _matrix(R)
    return torch.stack([matrix[i, : i + 1].mean() for i in range(len(matrix))]).mean()


def learning_accuracy(R: Numbers) -> Tensor:
    """Mean accuracy on each task directly after training on it: ``1/T sum_i R[i, i]`` (plasticity).

    Riemer et al., "Learning to Learn without Forgetting", 2019.
    """
    return _matrix(R).diagonal().mean()


def backward_transfer(R: Numbers) -> Tensor:
    """What later tasks did to earlier ones: ``1/(T-1) sum_{j<T-1} (R[T-1, j] - R[j, j])``; NaN for one task.

    Lopez-Paz & Ranzato 2017, eq. 3; negative where tasks were forgotten.
    """
    matrix = _matrix(R)
    return (matrix[-1] - matrix.diagonal())[:-1].mean()


def forgetting(R: Numbers, reference: Literal["max", "diagonal"] = "max") -> Tensor:
    """How far accuracy fell from its best: ``1/(T-1) sum_{j<T-1} (max_{j<=l<T-1} R[l, j] - R[T-1, j])``.

    Chaudhry et al., "Riemannian Walk", 2018, eq. 3, whose maximum runs from the first row; here it runs over the rows
    from learning the task to the last but one, as a task cannot be forgotten before it is learnt. Negative where the
    last task helped. NaN for one task.

    Args:
        R: The matrix.
        reference: ``"max"`` as above; ``"diagonal"`` takes the accuracy directly after learning the task instead of the
            maximum, which gives minus the backward transfer.

    Raises:
        ValueError: If ``reference`` is something else.
    """
    if reference not in ("max", "diagonal"):
        raise ValueError(f"reference must be 'max' or 'diagonal', got {reference!r}")
    matrix = _matrix(R)
    last = len(matrix) - 1
    if reference == "diagonal":
        return -backward_transfer(matrix)
    drops = [matrix[j:last, j].max() - matrix[last, j] for j in range(last)]  # torch's max keeps NaN
    return torch.stack(drops).mean() if drops else matrix.new_tensor(float("nan"))


def forward_transfer(R: Numbers, initial: Numbers) -> Tensor:
    """What earlier tasks did for later ones: ``1/(T-1) sum_{j>=1} (R[j-1, j] - initial[j])``; NaN for one task.

    Lopez-Paz & Ranzato 2017, eq. 4. With one head and new classes in every task, ``R[j-1, j]`` is about 0 for every
    method, and this number says nothing.

    Args:
        R: The matrix.
        initial: Accuracy on every task before training, shape ``(T,)``.

    Raises:
        ValueError: If ``initial`` has another length.
    """
    matrix, start = _matrix(R), torch.as_tensor(initial, dtype=torch.float64)
    if start.shape != matrix.shape[1:]:
        raise ValueError(f"initial must have one entry per task, {len(matrix)}, got shape {tuple(start.shape)}")
    return (matrix.diagonal(1) - start[1:]).mean()


def average_anytime_accuracy(accuracy: Numbers, task: Numbers) -> Tensor:
    """Mean over all evaluations of the mean accuracy on the tasks seen by then.

    Caccia et al., "New Insights on Reducing Abrupt Representation Change in Online Continual Learning", 2022. Rows
    before training do not count.

    Args:
        accuracy: Trajectory, shape ``(n, T)``.
        task: Task being trained at each row, shape ``(n,)``.
    """
    rows, tasks = _trajectory(accuracy, task)
    means = [row[: int(t) + 1].mean() for row, t in zip(rows, tasks, strict=True) if t >= 0]
    return torch.stack(means).mean() if means else rows.new_tensor(float("nan"))


def min_accuracy(accuracy: Numbers, task: Numbers) -> Tensor:
    """How low accuracy on earlier tasks ever was: ``1/(k-1) sum_{j<k-1} min_{n: task[n]>j} accuracy[n, j]``.

    De Lange et al., "Continual evaluation for lifelong learning: identifying the stability gap", 2023 (min-ACC). ``k``
    tasks were trained; the minimum over the evaluations after task ``j`` was over. NaN if fewer than two were.

    Args:
        accuracy: Trajectory, shape ``(n, T)``.
        task: Task being trained at each row, shape ``(n,)``.
    """
    rows, tasks = _trajectory(accuracy, task)
    lowest = [rows[tasks > j, j].min() for j in range(int(tasks.max()) if len(tasks) else 0)]
    return torch.stack(lowest).mean() if lowest else rows.new_tensor(float("nan"))


def worst_case_accuracy(accuracy: Numbers, task: Numbers) -> Tensor:
    """Trade-off of the last task's accuracy and `min_accuracy`: ``1/k accuracy[-1, k-1] + (1 - 1/k) min_accuracy``.

    De Lange et al. 2023 (WC-ACC), at the last evaluation, with ``k`` tasks trained. For one task its accuracy.

    Args:
        accuracy: Trajectory, shape ``(n, T)``.
        task: Task being trained at each row, shape ``(n,)``.
    """
    rows, tasks = _trajectory(accuracy, task)
    trained = int(tasks.max()) + 1 if len(tasks) else 0
    if trained == 0:
        return rows.new_tensor(float("nan"))
    newest = rows[-1, trained - 1]
    return newest if trained == 1 else newest / trained + (1 - 1 / trained) * min_accuracy(rows, tasks)


def stability_gap(accuracy: Numbers, task: Numbers, window: int | None = None) -> Tensor:
    """Depth of the drop at a switch: accuracy on the task before it, minus its lowest during the new task.

    ``1/(k-1) sum_{j<k-1} (accuracy[last row of task j, j] - min_{first window rows of task j+1} accuracy[n, j])``.
    After De Lange et al. 2023, who see it recover where nothing is forgotten for good: compare it with `forgetting`.
    It needs evaluations inside tasks; with one per task it is the loss at the next task's end. NaN for one task.

    Args:
        accuracy: Trajectory, shape ``(n, T)``.
        task: Task being trained at each row, shape ``(n,)``, ascending.
        window: Evaluations of the new task that are looked at, >= 1; ``None`` for all.

    Raises:
        ValueError: If ``window`` is not an integer >= 1.
    """
    if window is not None:
        check_count("window", window, otherwise="None for the whole task")
    rows, tasks = _trajectory(accuracy, task)
    gaps = []
    for j in range(int(tasks.max()) if len(tasks) else 0):
        own, next_rows = rows[tasks == j, j], rows[tasks == j + 1, j][:window]
        known = len(own) > 0 and len(next_rows) > 0
        gaps.append(own[-1] - next_rows.min() if known else rows.new_tensor(float("nan")))
    return torch.stack(gaps).mean() if gaps else rows.new_tensor(float("nan"))


def summary(R: Numbers, initial: Numbers | None = None) -> dict[str, float]:
    """Every number that the matrix alone gives, by name; ``forward_transfer`` only with the row before training."""
    numbers = {
        "average_accuracy": average_accuracy(R),
        "average_incremental_accuracy": average_incremental_accuracy(R),
        "learning_accuracy": learning_accuracy(R),
        "backward_transfer": backward_transfer(R),
        "forgetting": forgetting(R),
    }
    if initial is not None:
        numbers["forward_transfer"] = forward_transfer(R, initial)
    return {name: float(value) for name, value in numbers.items()}


def _matrix(R: Numbers) -> Tensor:
    matrix = torch.as_tensor(R, dtype=torch.float64)
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) == 0:
        raise ValueError(f"R must be a square matrix, tasks x tasks, got shape {tuple(matrix.shape)}")
    return matrix


def _trajectory(accuracy: Numbers, task: Numbers) -> tuple[Tensor, Tensor]:
    rows, tasks = torch.as_tensor(accuracy, dtype=torch.float64), torch.as_tensor(task, dtype=torch.int64)
    if rows.dim() != 2 or tasks.shape != rows.shape[:1]:
        raise ValueError(
            "accuracy must have shape (evaluations, tasks) and task one entry per evaluation, got shapes "
            f"{tuple(rows.shape)} and {tuple(tasks.shape)}"
        )
    return rows, tasks
