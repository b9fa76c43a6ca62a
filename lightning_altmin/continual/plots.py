"""Figures of a stream: the accuracy matrix, and accuracy over the stream with the boundaries of tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_altmin.optional_imports import import_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LONGEST = 24  # characters of a name in a figure: a task of many classes names them all


def plot_matrix(R: Tensor, names: Sequence[str] | None = None) -> Figure:
    """A heat map of an accuracy matrix, each measured cell with its number in per cent.

    Args:
        R: The matrix, shape ``(T, T)``; NaN cells stay empty.
        names: Names of the tasks; long ones lose their middle.

    Returns:
        A matplotlib figure; save it with ``figure.savefig(path)``.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    size = len(R)
    names = [f"task {i}" for i in range(size)] if names is None else _shortened(names)
    longest = max(map(len, names))  # a small matrix must leave room for its names, beside and, slanted, below it
    figure, axes = _figure(max(1.4 + 0.75 * size, 2.4 + 0.09 * longest), max(1.2 + 0.65 * size, 1.6 + 0.07 * longest))
    image = axes.imshow(R.numpy(), vmin=0, vmax=1, cmap="viridis")
    for i in range(size):
        for j in range(size):
            if not torch.isnan(R[i, j]):
                colour = "white" if R[i, j] < 0.6 else "black"
                axes.text(j, i, f"{100 * float(R[i, j]):.1f}", ha="center", va="center", color=colour, fontsize="small")
    axes.set_xticks(range(size), names, rotation=45, ha="right")
    axes.set_yticks(range(size), names)
    axes.set_xlabel("tested on")
    axes.set_ylabel("after training on")
    figure.colorbar(image, label="accuracy")
    return figure


def plot_stream(accuracy: Tensor, task: Tensor, step: Tensor, names: Sequence[str] | None = None) -> Figure:
    """Accuracy on every task over the stream, with a line at every boundary, and the mean over the tasks seen.

    Args:
        accuracy: Trajectory, shape ``(n, T)``.
        task: Task being trained at each row, shape ``(n,)``; -1 before training.
        step: Batches trained at each row, shape ``(n,)``.
        names: Names of the tasks; long ones lose their middle.

    Returns:
        A matplotlib figure.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is no row.
    """
    if len(step) == 0:
        raise ValueError("the trajectory has no evaluation to draw")
    names = [f"task {i}" for i in range(accuracy.shape[1])] if names is None else _shortened(names)
    figure, axes = _figure(7.2, 3.6)
    for j, name in enumerate(names):
        axes.plot(step.numpy(), accuracy[:, j].numpy(), marker=".", label=name)
    seen = task >= 0
    means = [float(row[: int(t) + 1].mean()) for row, t in zip(accuracy[seen], task[seen], strict=True)]
    axes.plot(step[seen].numpy(), means, color="black", linewidth=2, label="mean of tasks seen")
    for boundary in boundaries(task, step):
        axes.axvline(boundary, color="grey", linestyle="--", linewidth=0.8)
    axes.set_xlabel("batches trained")
    axes.set_ylabel("accuracy")
    axes.set_ylim(-0.02, 1.02)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def boundaries(task: Tensor, step: Tensor) -> list[float]:
    """Batches trained when a task was over: the last row's of every task but the last."""
    last = int(task.max())
    return [float(step[task == t].max()) for t in range(last) if bool((task == t).any())]


def _shortened(names: Sequence[str]) -> list[str]:
    half = (_LONGEST - 3) // 2
    return [name if len(name) <= _LONGEST else f"{name[:half]} … {name[-half:]}" for name in names]


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure: Figure = import_extra("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()
