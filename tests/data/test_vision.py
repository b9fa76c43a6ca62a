"""VisionDataModule on small stand-ins for torchvision's classes, and on the real MNIST where it is at hand."""

from pathlib import Path
from typing import Any, ClassVar, get_args

import numpy as np
import pytest
import torch
import torchvision

from lightning_altmin.data import VisionDataModule
from lightning_altmin.data.vision import VisionName

SIZES = {
    "MNIST": (28, 28),
    "FashionMNIST": (28, 28),
    "KMNIST": (28, 28),
    "CIFAR10": (32, 32, 3),
    "CIFAR100": (32, 32, 3),
}


class FakeDataset:
    """Random bytes in the layout of torchvision's data sets: tensors for the MNIST family, arrays and lists else."""

    downloads: ClassVar[list[bool]]
    size: ClassVar[tuple[int, ...]]

    def __init__(self, root: str, train: bool, download: bool) -> None:
        type(self).downloads += [train] if download else []
        pixels = np.random.default_rng(int(train)).integers(0, 256, (30, *self.size), dtype=np.uint8)  # type: ignore[attr-defined]
        self.data: Any = torch.from_numpy(pixels) if pixels.ndim == 3 else pixels
        labels = [i % 10 for i in range(30)]
        self.targets: Any = torch.tensor(labels) if pixels.ndim == 3 else labels


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, type[FakeDataset]]:
    """Replace torchvision's classes."""
    classes = {name: type(name, (FakeDataset,), {"size": size, "downloads": []}) for name, size in SIZES.items()}
    for name, cls in classes.items():
        monkeypatch.setattr(torchvision.datasets, name, cls)
    return classes


@pytest.mark.parametrize("name", get_args(VisionName))
@pytest.mark.parametrize("flatten", [False, True])
def test_batches_are_the_normalised_images(fakes: dict[str, type[FakeDataset]], name: Any, flatten: bool) -> None:
    """Catches channels in the wrong place, targets parted from images, and a shape other than announced."""
    data = VisionDataModule(name, batch_size=30, normalize=False, flatten=flatten)
    data.setup("fit")
    ((x, y),) = list(data.test_dataloader())
    stored = torch.as_tensor(fakes[name]("", train=False, download=False).data).double() / 255
    expected = stored[:, None] if stored.ndim == 3 else stored.permute(0, 3, 1, 2)
    assert torch.allclose(x.double(), expected.flatten(1) if flatten else expected, atol=1e-6)
    assert x.shape[1:] == data.input_shape
    assert y.tolist() == [i % 10 for i in range(30)]
    assert y.dtype == torch.int64


@pytest.mark.parametrize("name", get_args(VisionName))
def test_normalisation_constants(fakes: dict[str, type[FakeDataset]], name: Any) -> None:
    """Catches constants of another data set or of another channel, against the published ones."""
    published = {
        "MNIST": ([0.1307], [0.3081]),
        "FashionMNIST": ([0.2860], [0.3530]),
        "KMNIST": ([0.1918], [0.3483]),
        "CIFAR10": ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
        "CIFAR100": ([0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]),
    }[name]
    plain, normal = VisionDataModule(name, normalize=False), VisionDataModule(name)
    plain.setup()
    normal.setup()
    raw, scaled = next(iter(plain.test_dataloader()))[0], next(iter(normal.test_dataloader()))[0]
    for channel, (mean, std) in enumerate(zip(*published, strict=True)):
        assert torch.allclose(scaled[:, channel], (raw[:, channel] - mean) / std, atol=1e-5)


def test_augmentation_of_training_images_only(fakes: dict[str, type[FakeDataset]]) -> None:
    """Catches augmented evaluation, and training images that are not windows of the padded original or its mirror."""
    data = VisionDataModule("CIFAR10", batch_size=30, normalize=False, augment=True)
    data.setup("fit")
    assert torch.equal(next(iter(data.test_dataloader()))[0], next(iter(data.test_dataloader()))[0])
    images = torch.from_numpy(fakes["CIFAR10"]("", train=True, download=False).data).permute(0, 3, 1, 2)
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    windows = {
        tuple(side[n, 0, r + 14 : r + 18, c + 14 : c + 18].flatten().tolist())
        for side in (padded, padded.flip(-1))
        for n in range(30)
        for r in range(9)
        for c in range(9)
    }
    x, _ = next(iter(data.train_dataloader()))
    bytes_ = (x * 255).round().to(torch.uint8)
    assert all(tuple(image[0, 14:18, 14:18].flatten().tolist()) in windows for image in bytes_)


def test_digits_are_not_mirrored(fakes: dict[str, type[FakeDataset]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches mirrored digits: they are other signs, or none."""

    def refuse(*_: Any) -> torch.Tensor:
        raise AssertionError("mirrored")

    monkeypatch.setattr("lightning_altmin.data.augment.RandomHorizontalFlip.__call__", refuse)
    data = VisionDataModule("MNIST", augment=True)
    data.setup("fit")
    x, _ = next(iter(data.train_dataloader()))
    assert x.shape == (30, 1, 28, 28)


def test_download_only_if_asked_for(fakes: dict[str, type[FakeDataset]]) -> None:
    """Catches a download nobody asked for, and one that fetches a part only."""
    quiet = VisionDataModule("MNIST")
    quiet.prepare_data()
    quiet.setup()
    assert fakes["MNIST"].downloads == []
    VisionDataModule("MNIST", download=True).prepare_data()
    assert sorted(fakes["MNIST"].downloads) == [False, True]


@pytest.mark.parametrize("name", ["MNIST", "CIFAR10"])
def test_missing_files_are_explained(name: Any, tmp_path: Path) -> None:
    """Catches torchvision's own message, which names neither the folder nor the arguments to change."""
    with pytest.raises(FileNotFoundError, match=r"(?s)root='.*nowhere'.*download=True"):
        VisionDataModule(name, root=tmp_path / "nowhere").setup()


def test_unknown_name_is_refused() -> None:
    """Catches an attribute error inside torchvision for a misspelt name."""
    with pytest.raises(ValueError, match="one of MNIST, FashionMNIST, KMNIST, CIFAR10, CIFAR100, got 'Mnist'"):
        VisionDataModule("Mnist")  # type: ignore[arg-type]


@pytest.mark.mnist
def test_real_mnist(mnist_root: Path) -> None:
    """Catches constants or a reading that do not fit the real files, whose pixels must get mean 0, deviation 1."""
    data = VisionDataModule("MNIST", root=mnist_root, val_split=10_000, flatten=True, batch_size=1000)
    data.setup("fit")
    batches = list(data.train_dataloader())
    x = torch.cat([x for x, _ in batches])
    assert (len(x), len(list(data.val_dataloader())), len(list(data.test_dataloader()))) == (50_000, 10, 10)
    # 50,000 of the 60,000 images the constants were measured on; their digits are rounded to 1e-4
    assert abs(float(x.mean())) < 5e-3
    assert abs(float(x.std()) - 1) < 5e-3
    assert torch.bincount(torch.cat([y for _, y in batches])).min() > 4000


def test_without_augmentation_images_are_as_they_are(fakes: dict[str, type[FakeDataset]]) -> None:
    """Catches crops of training images that nobody asked for."""
    data = VisionDataModule("CIFAR10", batch_size=30, normalize=False)
    assert data.augmentation() is None
    data.setup("fit")
    images = torch.from_numpy(fakes["CIFAR10"]("", train=True, download=False).data).permute(0, 3, 1, 2)
    x, _ = next(iter(data.train_dataloader()))
    stored = {tuple(image.flatten().tolist()) for image in images}
    assert {tuple(image.flatten().tolist()) for image in (x * 255).round().to(torch.uint8)} <= stored
