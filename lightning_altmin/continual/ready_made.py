"""Streams that continual learning is usually measured on, ready to train on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from lightning_altmin.continual.samples import Samples, as_samples
from lightning_altmin.continual.streams import Labels, held_out, permuted_pixels, rotated, split_classes
from lightning_altmin.continual.task import Task, TaskStream
from lightning_altmin.data.base import IndexedDataModule
from lightning_altmin.data.digits import DigitsDataModule
from lightning_altmin.data.image_folder import ImageFolderDataModule
from lightning_altmin.data.image_preparation import ImagePreparation
from lightning_altmin.data.resumable_loader import BatchPreparation
from lightning_altmin.data.seeding import derived_generator
from lightning_altmin.data.vision import VisionDataModule

_MAX_BYTE = 255


def split_digits(
    num_tasks: int = 5,
    labels: Labels = "global",
    val_split: int | float = 0.0,
    seed: int = 0,
    flatten: bool = True,
    shuffle_classes: bool = False,
) -> TaskStream:
    """scikit-learn's 1797 handwritten digits, a few classes per task; needs no download.

    Args:
        num_tasks: Number of tasks, 1 to 10.
        labels: See `split_classes`.
        val_split: See `split_classes`.
        seed: See `split_classes`.
        flatten: Whether inputs are vectors of 64 pixels; otherwise images of shape (1, 8, 8).
        shuffle_classes: See `split_classes`.

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: See `split_classes`.
    """
    train, test, prepare = _read(DigitsDataModule(flatten=flatten))
    return split_classes(
        train,
        test,
        num_tasks,
        labels=labels,
        val_split=val_split,
        seed=seed,
        shuffle_classes=shuffle_classes,
        prepare=prepare,
        name="Split-Digits",
    )


def split_mnist(
    root: str | Path = "data",
    num_tasks: int = 5,
    labels: Labels = "global",
    val_split: int | float = 0.0,
    seed: int = 0,
    flatten: bool = False,
    shuffle_classes: bool = False,
    download: bool = False,
) -> TaskStream:
    """MNIST, a few classes per task: Split-MNIST 5 x 2 by default.

    Args:
        root: Folder of torchvision's files.
        num_tasks: Number of tasks, 1 to 10.
        labels: See `split_classes`.
        val_split: See `split_classes`.
        seed: See `split_classes`.
        flatten: Whether inputs are vectors; otherwise images of shape (1, 28, 28).
        shuffle_classes: See `split_classes`.
        download: Whether missing files are downloaded.

    Raises:
        FileNotFoundError: If the files are not in ``root``.
        ImportError: If torchvision is not installed.
        ValueError: See `split_classes`.
    """
    train, test, prepare = _read(VisionDataModule("MNIST", root, download, flatten=flatten))
    return split_classes(
        train,
        test,
        num_tasks,
        labels=labels,
        val_split=val_split,
        seed=seed,
        shuffle_classes=shuffle_classes,
        prepare=prepare,
        name="Split-MNIST",
    )


def permuted_mnist(
    root: str | Path = "data",
    num_tasks: int = 10,
    val_split: int | float = 0.0,
    seed: int = 0,
    flatten: bool = False,
    download: bool = False,
) -> TaskStream:
    """MNIST under another permutation of the pixels in every task; the first task is MNIST itself.

    Args:
        root: Folder of torchvision's files.
        num_tasks: Number of tasks.
        val_split: See `permuted_pixels`.
        seed: See `permuted_pixels`.
        flatten: Whether inputs are vectors; otherwise images of shape (1, 28, 28).
        download: Whether missing files are downloaded.

    Raises:
        FileNotFoundError: If the files are not in ``root``.
        ImportError: If torchvision is not installed.
        ValueError: See `permuted_pixels`.
    """
    train, test, prepare = _read(VisionDataModule("MNIST", root, download, flatten=flatten))
    return permuted_pixels(train, test, num_tasks, val_split, seed, prepare, "Permuted-MNIST")


def rotated_mnist(
    root: str | Path = "data",
    angles: Sequence[float] = (0, 36, 72, 108, 144),
    val_split: int | float = 0.0,
    seed: int = 0,
    flatten: bool = False,
    download: bool = False,
) -> TaskStream:
    """MNIST turned by another angle in every task.

    Args:
        root: Folder of torchvision's files.
        angles: One angle per task, in degrees.
        val_split: See `rotated`.
        seed: See `rotated`.
        flatten: Whether inputs are vectors; otherwise images of shape (1, 28, 28).
        download: Whether missing files are downloaded.

    Raises:
        FileNotFoundError: If the files are not in ``root``.
        ImportError: If torchvision is not installed.
        ValueError: See `rotated`.
    """
    train, test, prepare = _read(VisionDataModule("MNIST", root, download, flatten=flatten))
    return rotated(train, test, angles, val_split, seed, prepare, "Rotated-MNIST")


def split_cifar10(
    root: str | Path = "data",
    num_tasks: int = 5,
    labels: Labels = "global",
    val_split: int | float = 0.0,
    seed: int = 0,
    flatten: bool = False,
    shuffle_classes: bool = False,
    download: bool = False,
) -> TaskStream:
    """CIFAR-10, a few classes per task.

    Args:
        root: Folder of torchvision's files, or one with image folders ``train/<class>`` and ``test/<class>``.
        num_tasks: Number of tasks, 1 to 10.
        labels: See `split_classes`.
        val_split: See `split_classes`.
        seed: See `split_classes`.
        flatten: Whether inputs are vectors; otherwise images of shape (3, 32, 32).
        shuffle_classes: See `split_classes`.
        download: Whether torchvision's files are downloaded if they are missing.

    Raises:
        FileNotFoundError: If there is neither in ``root``.
        ImportError: If torchvision is not installed.
        ValueError: See `split_classes`.
    """
    data: IndexedDataModule
    if (Path(root) / "train").is_dir():
        data = ImageFolderDataModule(root, flatten=flatten)
    else:
        data = VisionDataModule("CIFAR10", root, download, flatten=flatten)
    train, test, prepare = _read(data)
    return split_classes(
        train,
        test,
        num_tasks,
        labels=labels,
        val_split=val_split,
        seed=seed,
        shuffle_classes=shuffle_classes,
        prepare=prepare,
        name="Split-CIFAR-10",
    )


def mnist_to_fashion(
    root: str | Path = "data",
    labels: Labels = "global",
    val_split: int | float = 0.0,
    seed: int = 0,
    flatten: bool = False,
    download: bool = False,
) -> TaskStream:
    """A drift from one data set to another: MNIST, then FashionMNIST.

    Args:
        root: Folder of torchvision's files.
        labels: ``"global"`` gives the second task labels 10 to 19, ``"local"`` 0 to 9 to both.
        val_split: Part of each task's training samples held out for validation.
        seed: Of the held-out parts.
        flatten: Whether inputs are vectors; otherwise images of shape (1, 28, 28).
        download: Whether missing files are downloaded.

    Raises:
        FileNotFoundError: If the files are not in ``root``.
        ImportError: If torchvision is not installed.
        ValueError: If an argument is out of range.
    """
    if labels not in ("global", "local"):
        raise ValueError(f"labels must be 'global' or 'local', got {labels!r}")
    tasks = []
    for index, name in enumerate(("MNIST", "FashionMNIST")):
        train, test, _ = _read(VisionDataModule(name, root, download, flatten=flatten))  # type: ignore[arg-type]
        if labels == "global":
            shift = {label: label + 10 * index for label in range(10)}
            train, test = train.with_labels(shift), test.with_labels(shift)
        train, val = held_out(train, val_split, derived_generator(seed, index))
        tasks.append(Task(index, train, test, val, name=name))
    # One scale for both: how bright a data set is must not be told apart by how it was normalised.
    prepare = ImagePreparation(_MAX_BYTE, flatten=flatten)
    return TaskStream(tasks, prepare=prepare, disjoint_classes=labels == "global", name="MNIST to FashionMNIST")


def _read(data: IndexedDataModule) -> tuple[Samples, Samples, BatchPreparation | None]:
    """Training and test samples as they are stored, and the last step that makes network input of them."""
    data.prepare_data()
    sources = data.load_sources()
    assert sources.test is not None
    prepare = data.make_preparation(sources.train, None)
    return as_samples(cast(Any, sources.train)), as_samples(cast(Any, sources.test)), prepare
