"""torchvision's small image data sets, held in memory."""

from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch

from lightning_altmin.data.augment import Compose, RandomCrop, RandomHorizontalFlip
from lightning_altmin.data.base import DataSource, IndexedDataModule, Sources
from lightning_altmin.data.image_preparation import ImagePreparation
from lightning_altmin.data.resumable_loader import BatchPreparation, BatchTransform
from lightning_altmin.data.tensor_loader import TensorSource
from lightning_altmin.optional_imports import import_extra

VisionName = Literal["MNIST", "FashionMNIST", "KMNIST", "CIFAR10", "CIFAR100"]


class _Facts(NamedTuple):
    """What is known of a data set; mean and std per channel of the training pixels scaled to 0..1."""

    shape: tuple[int, int, int]
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int
    mirror: bool


_FACTS: dict[str, _Facts] = {
    "MNIST": _Facts((1, 28, 28), 10, (0.1307,), (0.3081,), 2, False),
    "FashionMNIST": _Facts((1, 28, 28), 10, (0.2860,), (0.3530,), 2, False),
    "KMNIST": _Facts((1, 28, 28), 10, (0.1918,), (0.3483,), 2, False),
    "CIFAR10": _Facts((3, 32, 32), 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 4, True),
    "CIFAR100": _Facts((3, 32, 32), 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), 4, True),
}


class VisionDataModule(IndexedDataModule):
    """MNIST, FashionMNIST, KMNIST, CIFAR10 or CIFAR100 by name.

    The images are held as bytes; normalisation and augmentation work on whole batches.

    Args:
        name: name of the data set, as in ``torchvision.datasets``.
        root: folder that holds, or is to hold, torchvision's files.
        download: whether files that are missing are downloaded.
        batch_size: samples per training batch.
        eval_batch_size: samples per validation, test and prediction batch.
        val_split: part of the training data held out for validation: a share in [0, 1) or a number of samples.
        split_seed: seed of the validation split.
        drop_last: whether a last training batch that is not full is left out.
        normalize: whether the usual mean and standard deviation of the data set are applied; otherwise pixels lie in
            0..1.
        flatten: whether inputs are vectors; otherwise images of shape (channels, height, width).
        augment: whether training images are cropped at random after padding (by 4 pixels for CIFAR, else by 2) and,
            for CIFAR, mirrored at random.

    Raises:
        ValueError: if ``name`` is unknown; see also ``IndexedDataModule``.
        FileNotFoundError: in ``setup``, if the files are not in ``root``.
        ImportError: in ``setup``, if torchvision is not installed.
    """

    def __init__(
        self,
        name: VisionName = "MNIST",
        root: str | Path = "data",
        download: bool = False,
        batch_size: int = 128,
        eval_batch_size: int = 1000,
        val_split: int | float = 0.0,
        split_seed: int = 0,
        drop_last: bool = False,
        normalize: bool = True,
        flatten: bool = False,
        augment: bool = False,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, val_split, split_seed, drop_last)
        if name not in _FACTS:
            raise ValueError(f"name must be one of {', '.join(get_args(VisionName))}, got {name!r}")
        self.name = name
        self._class_name: str = name  # Lightning types `name` as possibly None
        self.root = Path(root)
        self.download = download
        self.normalize = normalize
        self.flatten = flatten
        self.augment = augment
        self._facts = _FACTS[name]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self._facts.classes

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input as the network sees it."""
        channels, height, width = self._facts.shape
        return (channels * height * width,) if self.flatten else (channels, height, width)

    def prepare_data(self) -> None:
        """Download what is missing, if ``download`` is set."""
        if self.download:
            for train in (True, False):
                self._dataset_class()(str(self.root), train=train, download=True)

    def load_sources(self) -> Sources:
        """Read both parts into memory."""
        return Sources(train=self._read(train=True), test=self._read(train=False))

    def make_preparation(self, train: DataSource, indices: torch.Tensor | None) -> BatchPreparation:
        """Scaling to 0..1 and, if asked for, normalisation."""
        mean, std = (self._facts.mean, self._facts.std) if self.normalize else (None, None)
        return ImagePreparation(255, mean, std, self.flatten)

    def augmentation(self) -> BatchTransform | None:
        """Random crops and, for CIFAR, mirror images."""
        if not self.augment:
            return None
        crop = RandomCrop(self._facts.crop_padding)
        return Compose([crop, RandomHorizontalFlip()]) if self._facts.mirror else crop

    def _dataset_class(self) -> Any:
        return getattr(import_extra("torchvision.datasets"), self._class_name)

    def _read(self, train: bool) -> TensorSource:
        try:
            dataset = self._dataset_class()(str(self.root), train=train, download=False)
        except RuntimeError as error:
            # torchvision's answer to missing or damaged files; it names neither the folder nor the way out
            raise FileNotFoundError(
                f"{self.name} was not found, or is damaged, in root={str(self.root.absolute())!r} ({error}); set root "
                "to the folder that holds torchvision's files, or download=True to fetch them there"
            ) from error
        return TensorSource(_channels_first(torch.as_tensor(dataset.data)), torch.as_tensor(dataset.targets).long())


def _channels_first(images: torch.Tensor) -> torch.Tensor:
    """Bring (n, h, w) or (n, h, w, channels) to (n, channels, h, w)."""
    return images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
