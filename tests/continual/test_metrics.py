"""Numbers of a stream against matrices worked out by hand, and the matrix as a torchmetrics Metric."""

from __future__ import annotations

import copy
import math
import pickle
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_altmin.continual import TaskAccuracyMatrix, metrics
from lightning_altmin.continual.accuracy_matrix import count_correct

NAN = float("nan")

# Row i: after training on task i. The second column rises after its task, the first falls, recovers and falls.
R = [
    [0.9, 0.2, 0.1],
    [0.5, 0.8, 0.3],
    [0.6, 0.9, 0.7],
]
INITIAL = [0.1, 0.1, 0.2]


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (metrics.average_accuracy(R), (0.6 + 0.9 + 0.7) / 3),
        (metrics.average_incremental_accuracy(R), (0.9 + (0.5 + 0.8) / 2 + (0.6 + 0.9 + 0.7) / 3) / 3),
        (metrics.learning_accuracy(R), (0.9 + 0.8 + 0.7) / 3),
        (metrics.backward_transfer(R), ((0.6 - 0.9) + (0.9 - 0.8)) / 2),
        # task 0: best of rows 0 and 1 is 0.9; task 1: row 1 alone, 0.8 (row 0 is before it was learnt, row 2 is now)
        (metrics.forgetting(R), ((0.9 - 0.6) + (0.8 - 0.9)) / 2),
        (metrics.forgetting(R, "diagonal"), ((0.9 - 0.6) + (0.8 - 0.9)) / 2),
        (metrics.forward_transfer(R, INITIAL), ((0.2 - 0.1) + (0.3 - 0.2)) / 2),
    ],
    ids=["ACC", "AIA", "LA", "BWT", "F", "F diagonal", "FWT"],
)
def test_the_matrix_by_hand(number: torch.Tensor, expected: float) -> None:
    """Catches means over T where T - 1 differences exist, transposed matrices, and signs."""
    assert float(number) == pytest.approx(expected, abs=1e-12)


def test_the_maximum_of_forgetting_begins_with_the_task_and_leaves_out_the_last_row() -> None:
    """Catches a maximum over all rows: those before the task was learnt, or the last, which hides negative values."""
    rising = [[0.5, 0.99, 0.0], [0.7, 0.6, 0.0], [0.9, 0.5, 0.8]]
    # task 0: max(0.5, 0.7) - 0.9; task 1: 0.6 - 0.5, whatever stood above the diagonal
    assert float(metrics.forgetting(rising)) == pytest.approx(((0.7 - 0.9) + (0.6 - 0.5)) / 2)
    assert float(metrics.forgetting(rising, "diagonal")) == pytest.approx(((0.5 - 0.9) + (0.6 - 0.5)) / 2)


# Two evaluations per task and one before training; task 2 was not begun.
TASK = [-1, 0, 0, 1, 1]
TRAJECTORY = [
    [0.1, 0.2, 0.3],
    [0.6, 0.1, 0.1],
    [0.8, 0.2, 0.1],
    [0.3, 0.5, 0.1],
    [0.7, 0.9, 0.1],
]


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (metrics.average_anytime_accuracy(TRAJECTORY, TASK), (0.6 + 0.8 + (0.3 + 0.5) / 2 + (0.7 + 0.9) / 2) / 4),
        (metrics.min_accuracy(TRAJECTORY, TASK), 0.3),
        (metrics.worst_case_accuracy(TRAJECTORY, TASK), 0.9 / 2 + 0.3 / 2),
        (metrics.stability_gap(TRAJECTORY, TASK), 0.8 - 0.3),
    ],
    ids=["AAA", "min-ACC", "WC-ACC", "gap"],
)
def test_the_trajectory_by_hand(number: torch.Tensor, expected: float) -> None:
    """Catches rows before training that count, and minima over rows in which the task was still being learnt."""
    assert float(number) == pytest.approx(expected, abs=1e-12)


def test_three_tasks_of_a_trajectory() -> None:
    """Catches minima over the next task only, and a window that counts rows of the wrong task."""
    rows = [[0.9, 0.0, 0.0], [0.4, 0.8, 0.0], [0.6, 0.9, 0.0], [0.5, 0.6, 0.3], [0.1, 0.7, 0.9]]
    task = [0, 1, 1, 2, 2]
    assert float(metrics.min_accuracy(rows, task)) == pytest.approx((0.1 + 0.6) / 2)
    assert float(metrics.worst_case_accuracy(rows, task)) == pytest.approx(0.9 / 3 + 2 / 3 * (0.1 + 0.6) / 2)
    # after task 0: 0.9 - 0.4; after task 1: 0.9 - 0.6
    assert float(metrics.stability_gap(rows, task)) == pytest.approx((0.5 + 0.3) / 2)
    rows[1][0], rows[2][0] = 0.6, 0.4
    assert float(metrics.stability_gap(rows, task, window=1)) == pytest.approx((0.3 + 0.3) / 2)


def test_one_task_forgets_nothing_that_could_be_measured() -> None:
    """Catches 0 where a number is not defined."""
    one = [[0.7]]
    assert float(metrics.average_accuracy(one)) == 0.7
    for number in (
        metrics.forgetting(one),
        metrics.forgetting(one, "diagonal"),
        metrics.backward_transfer(one),
        metrics.forward_transfer(one, [0.1]),
        metrics.min_accuracy(one, [0]),
        metrics.stability_gap(one, [0]),
        metrics.average_anytime_accuracy(one, [-1]),
    ):
        assert math.isnan(number)
    assert float(metrics.worst_case_accuracy(one, [0])) == 0.7


def test_a_cell_that_was_not_measured_makes_what_needs_it_undefined() -> None:
    """Catches NaN skipped in a mean, which would then be over other tasks than it says."""
    holed = torch.tensor(R, dtype=torch.float64)
    holed[0, 1] = NAN  # above the diagonal: only forward transfer reads it
    assert math.isnan(metrics.forward_transfer(holed, INITIAL))
    assert float(metrics.forgetting(holed)) == pytest.approx(0.1)
    holed[2, 0] = NAN
    for number in (metrics.average_accuracy(holed), metrics.forgetting(holed), metrics.backward_transfer(holed)):
        assert math.isnan(number)


@given(st.integers(2, 6), st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_identities(tasks: int, seed: int) -> None:
    """Catches formulas that disagree with each other: BWT is minus diagonal forgetting, which is at most F."""
    matrix = torch.rand(tasks, tasks, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    diagonal = metrics.forgetting(matrix, "diagonal")
    assert float(metrics.backward_transfer(matrix)) == pytest.approx(-float(diagonal))
    assert float(metrics.forgetting(matrix)) >= float(diagonal) - 1e-12
    kept = matrix[-1].expand(tasks, -1)  # nothing ever changes
    assert float(metrics.forgetting(kept)) == pytest.approx(0)
    # One evaluation per task: the anytime mean is the incremental mean.
    every = torch.arange(tasks)
    assert float(metrics.average_anytime_accuracy(matrix, every)) == pytest.approx(
        float(metrics.average_incremental_accuracy(matrix))
    )


def test_summary_names_every_number() -> None:
    """Catches a summary whose entries are mixed up."""
    numbers = metrics.summary(R, INITIAL)
    assert numbers["average_accuracy"] == pytest.approx(2.2 / 3)
    assert numbers["learning_accuracy"] == pytest.approx(0.8)
    assert numbers["forgetting"] == pytest.approx(0.1)
    assert numbers["forward_transfer"] == pytest.approx(0.1)
    assert "forward_transfer" not in metrics.summary(R)


def test_wrong_shapes_are_errors() -> None:
    """Catches a trajectory passed for a matrix, and a reference that does not exist."""
    with pytest.raises(ValueError, match="square"):
        metrics.average_accuracy(TRAJECTORY)
    with pytest.raises(ValueError, match="initial must have one entry per task"):
        metrics.forward_transfer(R, [0.1])
    with pytest.raises(ValueError, match="reference"):
        metrics.forgetting(R, "best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one entry per evaluation"):
        metrics.min_accuracy(TRAJECTORY, [0])
    with pytest.raises(ValueError, match="window"):
        metrics.stability_gap(TRAJECTORY, TASK, window=0)


# -------------------------------------------------------------------- the Metric


def test_the_matrix_counts_and_leaves_what_was_not_measured_nan() -> None:
    """Catches means of batch means (the last batch is short), and rows off by one."""
    matrix = TaskAccuracyMatrix(2)
    right, wrong = torch.tensor([2.0, 1.0]), torch.tensor([1.0, 2.0])
    matrix.update(torch.stack([right, right, wrong]), torch.zeros(3).long(), task=0, after=0)
    matrix.update(wrong[None], torch.zeros(1).long(), task=0, after=0)
    matrix.update(right[None], torch.zeros(1).long(), task=1, after=-1)
    torch.testing.assert_close(matrix.compute(), torch.tensor([[0.5, NAN], [NAN, NAN]]).double(), equal_nan=True)
    torch.testing.assert_close(matrix.initial(), torch.tensor([NAN, 1.0]).double(), equal_nan=True)


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_matrix_of_one_task_is_a_matrix(copied: Any) -> None:
    """Catches torchmetrics' scalar in place of a single entry, in the value, its cache, copies and the figure.

    Two of four samples are right, 1/2, after none of them was: 0.
    """
    matrix = TaskAccuracyMatrix(1)
    logits = torch.tensor([[2.0, 1.0]]).expand(4, 2)
    matrix.update(logits, torch.tensor([0, 1, 0, 1]), task=0, after=0)
    matrix.update(logits[:1], torch.tensor([1]), task=0, after=-1)
    matrix = copied(matrix)
    for _ in range(2):
        assert matrix.compute().tolist() == [[0.5]]
    assert matrix.initial().tolist() == [0.0]
    assert [(text.get_position(), text.get_text()) for text in matrix.plot().axes[0].texts] == [((0, 0), "50.0")]


def test_adding_counts_is_the_same_as_counting() -> None:
    """Catches a row added in the wrong place."""
    g = torch.Generator().manual_seed(0)
    one, other = TaskAccuracyMatrix(3), TaskAccuracyMatrix(3)
    for after in (-1, 0, 2):
        correct, total = torch.zeros(3).long(), torch.zeros(3).long()
        for task in range(3):
            logits, target = torch.randn(7, 4, generator=g), torch.randint(4, (7,), generator=g)
            one.update(logits, target, task, after)
            correct[task], total[task] = (logits.argmax(1) == target).sum(), 7
        other.add_counts(correct, total, after)
    torch.testing.assert_close(one.compute(), other.compute(), equal_nan=True)
    torch.testing.assert_close(one.initial(), other.initial(), equal_nan=True)


def test_states_are_saved_and_added() -> None:
    """Catches states left out of checkpoints, and anything but sums over processes."""
    matrix = TaskAccuracyMatrix(2)
    matrix.update(torch.eye(2), torch.tensor([0, 0]), task=1, after=1)
    other = TaskAccuracyMatrix(2)
    other.load_state_dict(matrix.state_dict())
    assert torch.equal(other.correct, matrix.correct)
    assert torch.equal(other.total, matrix.total)
    matrix.merge_state(other)
    assert matrix.total.sum() == 4
    assert float(matrix.compute()[1, 1]) == 0.5


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_knowing_the_task_never_hurts(seed: int) -> None:
    """Catches labels or masks in disorder: among fewer outputs, a right answer stays right."""
    g = torch.Generator().manual_seed(seed)
    groups = [(0, 3), (1, 2, 5), (4,)]
    class_incremental, task_incremental = TaskAccuracyMatrix(3), TaskAccuracyMatrix(3, groups)
    for task, labels in enumerate(groups):
        logits = torch.randn(20, 6, generator=g)
        target = torch.tensor(labels)[torch.randint(len(labels), (20,), generator=g)]
        for matrix in (class_incremental, task_incremental):
            matrix.update(logits, target, task, after=2)
    assert bool((task_incremental.compute()[2] >= class_incremental.compute()[2]).all())
    assert task_incremental.compute()[2, 2] == 1  # one class: nothing competes


def test_masked_outputs_by_hand() -> None:
    """Catches a mask that leaves an output of another task in, or maps places back to the wrong labels."""
    logits = torch.tensor([[9.0, 1.0, 8.0, 2.0], [9.0, 3.0, 8.0, 2.0]])
    assert int(count_correct(logits, torch.tensor([3, 3]))) == 0
    assert int(count_correct(logits, torch.tensor([3, 3]), (1, 3))) == 1


def test_matrix_errors() -> None:
    """Catches indices out of range that would land in another cell, as -2 would in the last row."""
    matrix = TaskAccuracyMatrix(2)
    logits, target = torch.eye(2), torch.tensor([0, 1])
    for task, after, message in ((2, 0, "task must be"), (-1, 0, "task must be"), (0, 2, "after"), (0, -2, "after")):
        with pytest.raises(ValueError, match=message):
            matrix.update(logits, target, task, after)
    with pytest.raises(ValueError, match="num_tasks"):
        TaskAccuracyMatrix(0)
    with pytest.raises(ValueError, match="one entry per task"):
        TaskAccuracyMatrix(2, [(0,)])
    with pytest.raises(ValueError, match="shape"):
        matrix.update(logits[0], target, 0, 0)
    # Class 2 has no third output, and -1 would be the last one.
    for classes, message in (((1, 2), r"2 outputs, so none for \[2\].*with 3 outputs"), ((0, -1), r"none for \[-1\]")):
        with pytest.raises(ValueError, match=message):
            count_correct(logits, target, classes)


@pytest.mark.parametrize("tasks", [1, 2, 5])
@pytest.mark.parametrize("name", ["task", ", ".join(map(str, range(100)))], ids=["short", "long"])
def test_figures_have_room_for_names(tasks: int, name: str) -> None:
    """Catches a figure so small that its names leave nothing for the matrix, or for the lines.

    Matplotlib then warns that axes collapsed, and warnings are errors here. Of 24 characters, 3 are the gap's, which
    leaves 10 for either end: of "0, 1, ..., 99", "0, 1, 2, 3" and "97, 98, 99".
    """
    from matplotlib.figure import Figure

    from lightning_altmin.continual.plots import plot_matrix, plot_stream

    figures: list[Figure] = [
        plot_matrix(torch.eye(tasks), [name] * tasks),
        plot_stream(torch.ones(1, tasks), torch.tensor([0]), torch.tensor([1]), [name] * tasks),
    ]
    for figure in figures:
        figure.canvas.draw()
        assert min(figure.axes[0].get_window_extent().size) > 30
    shown = "task" if name == "task" else "0, 1, 2, 3 … 97, 98, 99"
    assert [label.get_text() for label in figures[0].axes[0].get_xticklabels()] == [shown] * tasks


def test_plots_show_the_numbers_and_the_boundaries() -> None:
    """Catches a heat map with transposed or missing cells, and boundaries at the wrong batch."""
    from lightning_altmin.continual.plots import boundaries, plot_stream

    matrix = TaskAccuracyMatrix(2)
    matrix.update(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), task=0, after=1)
    figure = matrix.plot(["first", "second"])
    texts = [(text.get_position(), text.get_text()) for text in figure.axes[0].texts]
    assert texts == [((0, 1), "100.0")]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["first", "second"]
    task, step = torch.tensor(TASK), torch.tensor([0, 5, 10, 15, 20])
    assert boundaries(task, step) == [10.0]
    stream = plot_stream(torch.tensor(TRAJECTORY), task, step)
    lines = {line.get_label(): line for line in stream.axes[0].lines}
    assert list(lines["mean of tasks seen"].get_ydata()) == pytest.approx([0.6, 0.8, 0.4, 0.8])
    assert list(lines["task 1"].get_ydata()) == pytest.approx([row[1] for row in TRAJECTORY])
    assert [list(line.get_xdata()) for line in stream.axes[0].lines if line.get_linestyle() == "--"] == [[10.0, 10.0]]
    assert all(a < b for a, b in pairwise(step.tolist()))


def test_of_no_evaluation_there_is_nothing_to_say() -> None:
    """Catches a number, or a figure, made of nothing."""
    nothing: tuple[Any, Any] = (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    assert math.isnan(metrics.worst_case_accuracy(*nothing))
    pytest.importorskip("matplotlib")
    from lightning_altmin.continual.plots import plot_stream

    with pytest.raises(ValueError, match="no evaluation to draw"):
        plot_stream(*nothing, torch.zeros(0, dtype=torch.long))
