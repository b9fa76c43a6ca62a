"""Ready-made streams, the command line, and what AM-mem keeps of a stream."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torchvision
from torch.nn import functional

from lightning_altmin import AltMinModule
from lightning_altmin.cli import main
from lightning_altmin.continual import (
    ContinualEvaluation,
    MemoryPolicy,
    TaskStreamDataModule,
    mnist_to_fashion,
    permuted_mnist,
    rotated_mnist,
    split_cifar10,
    split_digits,
    split_mnist,
)
from lightning_altmin.weights import CoactivationMemory
from tests.continual.problems import fit, small_network
from tests.data.test_image_folder import write_images

EXAMPLES = Path(__file__).parents[2] / "examples"


class Fake:
    """Random bytes in the layout of torchvision's data sets."""

    size: ClassVar[tuple[int, ...]] = (28, 28)
    first: ClassVar[int] = 0

    def __init__(self, root: str, train: bool, download: bool) -> None:
        pixels = np.random.default_rng(self.first + train).integers(0, 256, (40, *self.size), dtype=np.uint8)
        self.data: Any = torch.from_numpy(pixels) if pixels.ndim == 3 else pixels
        labels = [i % 10 for i in range(40)]
        self.targets: Any = torch.tensor(labels) if pixels.ndim == 3 else labels


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets, "MNIST", type("MNIST", (Fake,), {}))
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", type("FashionMNIST", (Fake,), {"first": 7}))
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", type("CIFAR10", (Fake,), {"size": (32, 32, 3)}))


def pixels(name: str) -> torch.Tensor:
    return torch.as_tensor(getattr(torchvision.datasets, name)("", train=True, download=False).data)


@pytest.mark.parametrize("make", [split_digits, split_mnist, split_cifar10])
@pytest.mark.parametrize("labels", ["global", "local"])
def test_splits_have_two_classes_per_task(make: Any, labels: str) -> None:
    """Catches classes lost or in two tasks, and labels that do not share two outputs where they should."""
    stream = make(labels=labels)
    expected = [(2 * i, 2 * i + 1) for i in range(5)] if labels == "global" else [(0, 1)] * 5
    assert [task.classes for task in stream] == expected
    assert stream.num_classes == (10 if labels == "global" else 2)
    shape = stream.prepared(stream[0].train.read(torch.tensor([0, 1]))[0]).shape
    assert tuple(shape[1:]) == stream.input_shape


@pytest.mark.parametrize("flatten", [False, True])
def test_images_are_stored_as_bytes_and_prepared_in_batches(flatten: bool) -> None:
    """Catches floats in memory (four times the bytes of a buffer), and images of another shape than announced."""
    stream = split_mnist(flatten=flatten)
    x, y = stream[1].train.read(torch.arange(len(stream[1].train)))
    assert x.dtype == torch.uint8
    assert y.tolist() == [2, 3] * 4
    stored = pixels("MNIST")[torch.arange(40) % 10 // 2 == 1]
    assert torch.equal(x.reshape(8, 28, 28), stored)
    assert stream.prepared(x).shape == ((8, 784) if flatten else (8, 1, 28, 28))
    assert stream.prepared(x).dtype == torch.float32


def test_permuted_and_rotated_streams_keep_all_samples() -> None:
    """Catches permutations or angles missing in a task, or samples left out."""
    permuted, rotated = permuted_mnist(num_tasks=3), rotated_mnist(angles=(0, 180))
    assert [len(task.train) for task in permuted] == [40] * 3
    rows = torch.arange(40)
    original = permuted[0].train.read(rows)[0].flatten(1)
    for task in list(permuted)[1:]:
        x = task.train.read(rows)[0].flatten(1)
        assert not torch.equal(x, original)
        assert torch.equal(x.sort(1).values, original.sort(1).values)
    turned = rotated[1].train.read(rows)[0].reshape(40, 28, 28)
    upside_down = original.reshape(40, 28, 28).flip((1, 2))
    assert float((turned.int() - upside_down.int()).abs().float().mean()) < 1  # bilinear, in bytes


@pytest.mark.parametrize("labels", ["global", "local"])
def test_drift_from_one_data_set_to_another(labels: Any) -> None:
    """Catches labels of the second set that fall on the first's, and two scales for the two."""
    stream = mnist_to_fashion(labels=labels)
    assert stream[1].classes == (tuple(range(10, 20)) if labels == "global" else tuple(range(10)))
    for task, name in zip(stream, ("MNIST", "FashionMNIST"), strict=True):
        x = stream.prepared(task.train.read(torch.arange(40))[0])
        torch.testing.assert_close(x.reshape(40, 28, 28), pixels(name).float() / 255)
    with pytest.raises(ValueError, match="labels"):
        mnist_to_fashion(labels="both")  # type: ignore[arg-type]


def test_cifar_from_image_folders(tmp_path: Path) -> None:
    """Catches folders of JPEG or PNG files that are read as something else, or not found."""
    write_images(tmp_path / "train", 4, (32, 32), 1)
    write_images(tmp_path / "test", 2, (32, 32), 2)
    stream = split_cifar10(tmp_path, num_tasks=3)
    assert [task.classes for task in stream] == [(0,), (1,), (2,)]
    assert stream.input_shape == (3, 32, 32)


def test_the_command_line_learns_the_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a configuration that no longer runs offline, learns nothing, or saves and prints nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-altmin"])
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.logger=false"]
    main(["fit", "--config", str(EXAMPLES / "continual/split_digits.yaml"), *quiet])
    printed = capsys.readouterr().out
    [line] = [line for line in printed.splitlines() if line.startswith("average accuracy")]
    assert float(line.split()[-1]) > 90
    assert {p.name for p in (tmp_path / "continual_digits").iterdir()} == {
        "accuracy.png", "accuracy_matrix.csv", "accuracy_matrix.png",
    }  # fmt: skip


def test_a_memory_on_fixed_features_ends_at_the_joint_solution() -> None:
    """Catches samples lost or weighed by the order of tasks: the stream's last solution is ridge regression on all.

    The oracle solves the normal equations of all training samples at once, in double precision.
    """
    stream = split_digits(num_tasks=5)
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(64, 80), torch.nn.ReLU(), torch.nn.Linear(80, 10))
    for parameter in network[0].parameters():
        parameter.requires_grad_(False)
    memory = CoactivationMemory(form="solve", ridge=1e-2, inputs="forward", every=10**6)
    evaluation = ContinualEvaluation()
    fit(AltMinModule(network, weights=memory), TaskStreamDataModule(stream, 32), MemoryPolicy(), evaluation)
    joint = stream.joint()[0].train
    x, y = joint.read(torch.arange(len(joint)))
    with torch.no_grad():
        a = functional.pad(network[:2](stream.prepared(x)), (0, 1), value=1.0).double()
    A = a.t() @ a
    ridge = 1e-2 * A.diagonal().mean() * torch.eye(81, dtype=torch.float64)
    expected = torch.linalg.solve(A + ridge, a.t() @ functional.one_hot(y, 10).double())
    torch.testing.assert_close(network[2].weight, expected[:80].t().float(), rtol=1e-3, atol=1e-5)
    assert evaluation.summary()["average_accuracy"] > 0.9


def test_naive_training_forgets_what_memory_keeps() -> None:
    """Catches a harness in which nothing is ever forgotten, which would flatter every method."""
    from lightning_altmin import BackpropModule
    from tests.continual.problems import blob_stream

    evaluation = ContinualEvaluation()
    module = BackpropModule(small_network(), optimizer=lambda p: torch.optim.Adam(p, lr=0.02))
    fit(module, TaskStreamDataModule(blob_stream(), 8, epochs_per_task=3), evaluation)
    numbers = evaluation.summary()
    assert numbers["learning_accuracy"] > 0.9
    assert numbers["forgetting"] > 0.2
    assert numbers["task_incremental_accuracy"] > numbers["average_accuracy"] + 0.1
