"""Streams: every sample in exactly one task, the same in every process, and errors that say what is wrong."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from lightning_altmin.continual import (
    Task,
    TaskStream,
    from_avalanche,
    from_continuum,
    from_datasets,
    fuzzy,
    new_instances,
    permuted_pixels,
    rotated,
    split_classes,
    split_digits,
)
from tests.continual.problems import numbered, numbers


def all_numbers(stream: TaskStream, part: str = "train") -> list[int]:
    return sorted(n for task in stream for n in numbers(task.parts()[part]))


@settings(max_examples=40, deadline=None)
@given(
    classes=st.integers(1, 11),
    tasks=st.integers(1, 11),
    count=st.integers(30, 60),
    seed=st.integers(0, 5),
    shuffle=st.booleans(),
    share=st.sampled_from([0.0, 0.4, 1]),
)
def test_split_classes_gives_every_sample_to_one_task(
    classes: int, tasks: int, count: int, seed: int, shuffle: bool, share: float
) -> None:
    """Catches the remainder of an uneven division being dropped (10 classes in 3 tasks), and samples that validation
    and training share.
    """
    train, test = numbered(count, classes), numbered(2 * classes, classes)
    if tasks > classes:
        with pytest.raises(ValueError, match="num_tasks"):
            split_classes(train, test, tasks)
        return
    stream = split_classes(train, test, tasks, val_split=share, seed=seed, shuffle_classes=shuffle)
    assert len(stream) == tasks
    held_out = all_numbers(stream, "val") if share else []
    assert sorted(all_numbers(stream) + held_out) == list(range(count))
    assert all_numbers(stream, "test") == list(range(2 * classes))
    assert sorted(c for task in stream for c in task.classes) == list(range(classes))
    assert max(len(t.classes) for t in stream) - min(len(t.classes) for t in stream) <= 1
    for task in stream:
        assert all(n % classes in task.classes for n in numbers(task.train) + numbers(task.test))


def test_groups_say_which_classes_a_task_has() -> None:
    """Catches groups that are sorted into another task, and local labels not following the group's own order."""
    stream = split_classes(numbered(20, 4), numbered(8, 4), groups=[[3, 0], [2, 1]])
    assert [task.classes for task in stream] == [(0, 3), (1, 2)]
    local = split_classes(numbered(20, 4), numbered(8, 4), groups=[[3, 0], [2, 1]], labels="local")
    assert local.num_classes == 2
    assert [task.classes for task in local] == [(0, 1), (0, 1)]
    for n, label in zip(numbers(local[0].train), local[0].train.labels.tolist(), strict=True):
        assert label == [3, 0].index(n % 4)


def test_new_instances_deals_out_everything_at_random() -> None:
    """Catches samples that are lost or doubled, and a deal in stored order, which would not be instances at random."""
    stream = new_instances(numbered(50, 5), numbered(20, 5), 3)
    assert all_numbers(stream) == list(range(50))
    assert all_numbers(stream, "test") == list(range(20))
    assert [len(task.train) for task in stream] == [17, 17, 16]
    assert numbers(stream[0].train) != list(range(17))


@pytest.mark.parametrize("mix", [0.0, 0.1, 0.5])
def test_fuzzy_exchanges_samples_at_boundaries(mix: float) -> None:
    """Catches samples lost, doubled or moved to a task that is no neighbour, and a share other than asked for."""
    sharp = split_classes(numbered(60, 6), numbered(12, 6), 3)
    blurred = fuzzy(sharp, mix)
    assert all_numbers(blurred) == list(range(60))
    assert [len(t.train) for t in blurred] == [20, 20, 20]
    crossing = round(20 * mix)
    for index, (task, before) in enumerate(zip(blurred, sharp, strict=True)):
        own = [n for n in numbers(task.train) if n % 6 in before.classes]
        neighbours = [i for i in (index - 1, index + 1) if 0 <= i < 3]
        assert len(own) == 20 - crossing * len(neighbours)
        for i in neighbours:
            assert sum(n % 6 in sharp[i].classes for n in numbers(task.train)) == crossing
        assert numbers(task.test) == numbers(before.test)


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5), mix=st.floats(0, 0.5), seed=st.integers(0, 5))
@example(sizes=[3, 3, 3], mix=0.5, seed=0)
def test_fuzzy_loses_and_doubles_nothing(sizes: list[int], mix: float, seed: int) -> None:
    """Catches two boundaries that take the same sample of the task between them, and sizes that change.

    At most half of the smaller neighbour crosses, so both boundaries together leave a task with none of its own at
    worst. Rounding a share of n samples to what is possible is off by 1/2 at most: 3 samples at 0.5 give 1 of 1.5.
    """
    data = [numbered(size, 1, start=sum(sizes[:index])) for index, size in enumerate(sizes)]
    home = [index for index, size in enumerate(sizes) for _ in range(size)]
    blurred = fuzzy(from_datasets(data, data), mix, seed)
    assert all_numbers(blurred) == list(range(sum(sizes)))
    assert [len(task.train) for task in blurred] == sizes
    guests = [[home[n] for n in numbers(task.train)] for task in blurred]
    for index in range(len(sizes) - 1):
        forward, backward = guests[index + 1].count(index), guests[index].count(index + 1)
        assert forward == backward
        assert abs(forward - mix * min(sizes[index : index + 2])) <= 0.5
    assert all(abs(guest - index) <= 1 for index, own in enumerate(guests) for guest in own)


def test_permutations_are_fixed_per_task_and_keep_channels_together() -> None:
    """Catches permutations that differ between samples, batches or parts, and channels permuted apart."""
    g = torch.Generator().manual_seed(0)
    image = torch.arange(2 * 3 * 3.0).view(1, 2, 3, 3) + 100 * torch.randn(6, 1, 1, 1, generator=g)
    y = torch.arange(6) % 2
    stream = permuted_pixels((image, y), (image[:2], y[:2]), 3)
    assert torch.equal(stream[0].train.read(torch.arange(6))[0], image)
    seen = []
    for task in list(stream)[1:]:
        x = task.train.read(torch.arange(6))[0]
        order = (x[0, 0] - image[0, 0, 0, 0]).flatten().round().long()
        assert sorted(order.tolist()) == list(range(9))
        assert torch.equal(x, image.flatten(2)[:, :, order].view_as(image))
        assert torch.equal(task.test.read(torch.tensor([1]))[0], x[1:2])
        seen.append(order.tolist())
    assert seen[0] != seen[1]


def test_rotation_turns_counter_clockwise() -> None:
    """Catches the wrong direction or angle: a quarter turn is ``torch.rot90`` exactly."""
    x = torch.rand(4, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(4, dtype=torch.int64)
    stream = rotated((x, y), (x, y), [0, 90])
    turned = stream[1].train.read(torch.arange(4))[0]
    torch.testing.assert_close(turned, torch.rot90(x, 1, (2, 3)), rtol=0, atol=1e-5)
    assert torch.equal(stream[0].train.read(torch.arange(4))[0], x)


def fingerprint() -> str:
    """A stream with everything that is drawn."""
    train, test = numbered(40, 6), numbered(12, 6)
    streams = [
        split_classes(train, test, 3, val_split=0.25, seed=7, shuffle_classes=True),
        fuzzy(split_classes(train, test, 3), 0.3, seed=5),
        new_instances(train, test, 4, seed=2),
    ]
    permuted = permuted_pixels((torch.arange(36.0).view(4, 9), torch.tensor([0, 1, 0, 1])), numbered(4, 2), 3)
    rows = [permuted[i].train.read(torch.tensor([2]))[0].tolist() for i in range(3)]
    return repr([[numbers(part) for task in s for part in task.parts().values()] for s in streams]) + repr(rows)


def test_same_seed_same_stream_in_another_process() -> None:
    """Catches draws that depend on the process (hash order, global generators)."""
    code = (
        "import torch; torch.manual_seed(12345); from tests.continual.test_streams import fingerprint as f; print(f())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == fingerprint()


def test_the_global_generator_is_left_alone() -> None:
    """Catches a builder that seeds or draws from torch's global generator."""
    before = torch.get_rng_state()
    fingerprint()
    list(split_digits(val_split=0.2, shuffle_classes=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_joint_has_all_samples_once_and_first_cuts_the_stream() -> None:
    """Catches a joint reference trained on a part, and `first` giving another number of tasks."""
    stream = split_classes(numbered(30, 5), numbered(10, 5), 3, val_split=2)
    joint = stream.joint()
    assert len(joint) == 1
    assert sorted(numbers(joint[0].train) + numbers(joint[0].val)) == list(range(30))
    assert [t.classes for t in stream.first(2)] == [t.classes for t in stream][:2]
    assert stream.first(2).num_classes == 5


# -------------------------------------------------------------------- bad input


def test_errors_of_tasks_name_what_is_wrong() -> None:
    """Catches a task without samples, an unknown label, or overlapping classes that are let through."""
    x, y = numbered(6, 3)
    with pytest.raises(ValueError, match="no samples in its train data"):
        Task(0, (x[:0], y[:0]), (x, y), classes=(0, 1, 2))
    with pytest.raises(ValueError, match=r"test data has labels \[2\]"):
        Task(0, (x[:2], y[:2]), (x, y))
    with pytest.raises(ValueError, match="numbered"):
        TaskStream([Task(1, (x, y), (x, y))])
    with pytest.raises(ValueError, match="at least one task"):
        TaskStream([])
    with pytest.raises(ValueError, match=r"labels \[2\] are unknown"):
        TaskStream([Task(0, (x, y), (x, y))], num_classes=2)
    with pytest.raises(ValueError, match="class 0 is in task 0 and in task 1"):
        TaskStream([Task(0, (x, y), (x, y)), Task(1, (x, y), (x, y))], disjoint_classes=True)
    with pytest.raises(ValueError, match=r"4 tasks were asked for, but .* has 1"):
        TaskStream([Task(0, (x, y), (x, y))]).first(4)
    with pytest.raises(ValueError, match="integers"):
        Task(0, (x, y.float()), (x, y))
    with pytest.raises(TypeError, match="data must be"):
        Task(0, 3, (x, y))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "num_tasks or groups"),
        ({"num_tasks": 2, "groups": [[0], [1, 2]]}, "num_tasks or groups"),
        ({"num_tasks": 0}, "integer >= 1"),
        ({"num_tasks": 4}, "more than there is"),
        ({"groups": [[0, 1], [1, 2]]}, r"classes \[1\] are named more than once"),
        ({"groups": [[0], [1]]}, r"leave out classes \[2\]"),
        ({"groups": [[0, 1, 2], [7]]}, r"unknown classes \[7\]"),
        ({"groups": [[0, 1, 2], []]}, "empty"),
        ({"num_tasks": 2, "labels": "locals"}, "labels"),
        ({"num_tasks": 2, "val_split": float("nan")}, "val_split"),
        ({"num_tasks": 2, "val_split": 1.0}, "val_split"),
        ({"num_tasks": 2, "val_split": "0.1"}, r"val_split must .* a float in \[0, 1\).* got '0.1' of type str"),
        ({"num_tasks": 2, "val_split": 100}, "val_split"),
        ({"num_tasks": 2, "val_split": 0.001}, "val_split"),
    ],
)
def test_errors_of_split_classes(arguments: dict[str, Any], message: str) -> None:
    """Catches arguments that cannot be meant being taken."""
    with pytest.raises(ValueError, match=message):
        split_classes(numbered(12, 3), numbered(6, 3), **arguments)


def test_test_labels_that_no_task_teaches_are_an_error() -> None:
    """Catches test samples that would silently be in no task."""
    with pytest.raises(ValueError, match=r"test has labels \[3\]"):
        split_classes(numbered(12, 3), numbered(8, 4), 3)
    with pytest.raises(ValueError, match=r"test data has no samples of classes \[2\]"):
        split_classes(numbered(12, 3), numbered(8, 2), 3)


@pytest.mark.parametrize("tasks", [1, 2])
@pytest.mark.parametrize("labels", ["global", "local"])
def test_negative_labels_are_refused_with_a_way_out(tasks: int, labels: Any) -> None:
    """Catches classes -1 and 1 that become one, as the place -1 of a table is its last.

    The way out numbers -1 and 1 as 0 and 1.
    """
    x, y = numbered(8, 2)
    signs = 2 * y - 1
    with pytest.raises(ValueError, match=r"labels must be .* 0 or more, got \[-1\].*searchsorted"):
        split_classes((x, signs), (x, signs), tasks, labels=labels)
    mended = torch.searchsorted(signs.unique(), signs)
    stream = split_classes((x, mended), (x, mended), tasks, labels=labels)
    second = (1,) if labels == "global" else (0,)
    assert [task.classes for task in stream] == ([(0, 1)] if tasks == 1 else [(0,), second])


def test_new_labels_must_be_given_for_all() -> None:
    """Catches a label left out of the mapping that becomes a label of its own, -1, or an index error."""
    samples = split_classes(numbered(9, 3), numbered(9, 3), 1)[0].train
    assert samples.with_labels({0: 5, 1: 0, 2: 1}).labels.tolist() == [5, 0, 1] * 3
    for new, missing in (({0: 0, 2: 1}, 1), ({0: 0, 1: 1}, 2)):
        with pytest.raises(ValueError, match=rf"none for \[{missing}\]"):
            samples.with_labels(new)


# -------------------------------------------------------------------- other libraries' objects


class Counted(Dataset[Any]):
    """Yields ``(x, y, task)``, as benchmarks of other libraries do, in a training or an evaluation mode."""

    def __init__(self, start: int, offset: float = 0.0) -> None:
        self.start, self.offset = start, offset

    def train(self) -> Counted:
        return Counted(self.start, 0.5)

    def eval(self) -> Counted:
        return Counted(self.start, 0.0)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        if index >= 4:
            raise IndexError
        return torch.tensor([self.start + index + self.offset]), self.start // 10 * 2 + index % 2, self.start // 10


def test_avalanche_benchmarks_are_read_by_what_they_offer() -> None:
    """Catches the evaluation transformations being used in training, lost labels, and tasks out of order."""
    experiences = [SimpleNamespace(dataset=Counted(0)), SimpleNamespace(dataset=Counted(10))]
    stream = from_avalanche(SimpleNamespace(train_stream=experiences, test_stream=experiences))
    assert [t.classes for t in stream] == [(0, 1), (2, 3)]
    assert stream[1].train.read(torch.tensor([0, 3]))[0].flatten().tolist() == [10.5, 13.5]
    assert stream[1].test.read(torch.tensor([0, 3]))[0].flatten().tolist() == [10.0, 13.0]
    with pytest.raises(TypeError, match="train_stream and test_stream"):
        from_avalanche(object())


def test_continuum_scenarios_are_read_by_what_they_offer() -> None:
    """Catches a scenario's task label being taken for the class."""
    stream = from_continuum([Counted(0), Counted(10)], [Counted(0), Counted(10)])
    assert [t.train.labels.tolist() for t in stream] == [[0, 1, 0, 1], [2, 3, 2, 3]]


def test_data_sets_of_any_kind_become_tasks() -> None:
    """Catches labels of subsets taken from the whole set, and samples of data sets that are not tensors."""
    x, y = numbered(12, 3)
    subset = Subset(TensorDataset(x, y), [7, 2, 4])
    stream = from_datasets([subset, (x, y)], [(x[1:3], y[1:3]), Counted(0)], names=["a", "b"])
    assert stream[0].train.labels.tolist() == [1, 2, 1]
    assert numbers(stream[0].train) == [7, 2, 4]
    assert [t.name for t in stream] == ["a", "b"]
    with pytest.raises(ValueError, match="one entry per task"):
        from_datasets([subset], [])


def test_errors_of_rotated_streams() -> None:
    """Catches a stream of no tasks, and vectors that would be turned as if they were images."""
    images = torch.zeros(4, 1, 3, 3), torch.arange(4)
    with pytest.raises(ValueError, match="angles must name at least one angle, got none"):
        rotated(images, images, angles=())
    with pytest.raises(ValueError, match=r"needs images of shape .*, got inputs of shape \(3,\)"):
        rotated(numbered(4, 2), numbered(4, 2), angles=(0, 90))
