"""Images in one folder per class."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from lightning_altmin.arguments import check_count
from lightning_altmin.data.augment import Compose, RandomCrop, RandomHorizontalFlip
from lightning_altmin.data.base import DataSource, IndexedDataModule, Sources
from lightning_altmin.data.dataset_loader import DatasetSource
from lightning_altmin.data.image_preparation import ImagePreparation, byte_channel_statistics
from lightning_altmin.data.resumable_loader import BatchPreparation, BatchTransform
from lightning_altmin.data.tensor_loader import TensorSource
from lightning_altmin.optional_imports import import_extra

_READ_BATCH = 500  # images read at a time when all of them are wanted


class ImageFolderDataModule(IndexedDataModule):
    """Images in folders ``root/train/<class>/...`` and ``root/test/<class>/...``, read as RGB.

    Args:
        root: the folder above.
        train: folder of the training images inside ``root``.
        test: folder of the test images inside ``root``; None for no test data.
        val: folder of the validation images inside ``root``; None for none, or for ``val_split``.
        size: (height, width), or one number for both, every image is resized to, in pixels; None takes the images as
            they are, and all must have one size.
        in_memory: whether all images are decoded once and kept as bytes; otherwise they are read again every epoch.
        num_workers: processes that read images; 0 reads in the main process.
        batch_size: samples per training batch.
        eval_batch_size: samples per validation, test and prediction batch.
        val_split: part of the training data held out for validation: a share in [0, 1) or a number of samples.
        split_seed: seed of the validation split.
        drop_last: whether a last training batch that is not full is left out.
        normalize: whether pixels are normalised per channel; otherwise they lie in 0..1.
        mean: mean per channel for ``normalize``, of pixels in 0..1; None measures the training images, which reads
            all of them once.
        std: standard deviation per channel for ``normalize``; to be given together with ``mean``.
        flatten: whether inputs are vectors; otherwise images of shape (3, height, width).
        augment: whether training images are mirrored at random and cropped at random after padding by an eighth of
            their shorter side.

    Raises:
        ValueError: if an argument is out of range; in ``setup``, if the parts have different class folders or, in
            ``setup`` or when it is read, if an image differs in size from the first one.
        FileNotFoundError: in ``setup``, if a folder is missing or has no images.
        ImportError: in ``setup``, if torchvision is not installed.
    """

    def __init__(
        self,
        root: str | Path,
        train: str = "train",
        test: str | None = "test",
        val: str | None = None,
        size: int | tuple[int, int] | None = None,
        in_memory: bool = True,
        num_workers: int = 0,
        batch_size: int = 128,
        eval_batch_size: int = 1000,
        val_split: int | float = 0.0,
        split_seed: int = 0,
        drop_last: bool = False,
        normalize: bool = True,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        flatten: bool = False,
        augment: bool = False,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, val_split, split_seed, drop_last)
        check_count("num_workers", num_workers, 0)
        _check_statistics(mean, std, normalize)
        self.root = Path(root)
        self.folders = {"train": train, "test": test, "val": val}
        self.size = _checked_size(size)
        self.in_memory = in_memory
        self.num_workers = num_workers
        self.normalize = normalize
        self.mean = mean
        self.std = std
        self.flatten = flatten
        self.augment = augment
        self._classes: list[str] | None = None
        self._image_size: tuple[int, int] | None = None

    @property
    def class_names(self) -> list[str]:
        """Names of the classes in the order of their numbers; known after ``setup``."""
        if self._classes is None:
            raise RuntimeError("the classes are known after setup()")
        return self._classes

    @property
    def num_classes(self) -> int:
        """Number of classes; known after ``setup``."""
        return len(self.class_names)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input as the network sees it; known after ``setup``."""
        height, width = self._known_size()
        return (3 * height * width,) if self.flatten else (3, height, width)

    def load_sources(self) -> Sources:
        """Find the images of all parts and, if ``in_memory``, decode them."""
        folders = {part: self._open(folder) for part, folder in self.folders.items() if folder is not None}
        self._check_classes({part: folder.classes for part, folder in folders.items()})
        first = folders["train"].samples[0][0]
        loader = folders["train"].loader
        image_size = self.size or _height_and_width(loader(first))
        found: dict[str, DataSource] = {}
        for part, folder in folders.items():
            images = _ByteImages(folder.samples, loader, image_size, resize=self.size is not None, reference=first)
            source = DatasetSource(images, self.num_workers)
            found[part] = _decode(source, image_size) if self.in_memory else source
        self._classes = folders["train"].classes
        self._image_size = image_size
        return Sources(train=found["train"], test=found.get("test"), val=found.get("val"))

    def make_preparation(self, train: DataSource, indices: torch.Tensor | None) -> BatchPreparation:
        """Scaling to 0..1 and, if asked for, normalisation."""
        mean, std = self.mean, self.std
        if self.normalize and mean is None:
            mean, std = byte_channel_statistics(x for x, _ in train.loader(_READ_BATCH, indices=indices))
        return ImagePreparation(255, mean, std, self.flatten)

    def augmentation(self) -> BatchTransform | None:
        """Random crops and mirror images."""
        if not self.augment:
            return None
        return Compose([RandomCrop(max(1, min(self._known_size()) // 8)), RandomHorizontalFlip()])

    def _known_size(self) -> tuple[int, int]:
        size = self.size or self._image_size
        if size is None:
            raise RuntimeError("the size of the images is known after setup(), or when size is given")
        return size

    def _open(self, folder: str) -> Any:
        datasets = import_extra("torchvision.datasets")
        path = self.root / folder
        if not path.is_dir():
            raise FileNotFoundError(
                f"the image folder {str(path.absolute())!r} does not exist; set root (now {str(self.root)!r}) to the "
                f"folder that contains {folder!r}"
            )
        return datasets.ImageFolder(str(path))

    def _check_classes(self, classes: dict[str, list[str]]) -> None:
        expected = set(classes["train"])
        for part, names in classes.items():
            missing, added = sorted(expected - set(names)), sorted(set(names) - expected)
            if missing or added:
                raise ValueError(
                    f"the class folders of {str(self.root / str(self.folders[part]))!r} differ from those of the "
                    f"training images: missing {missing}, additional {added}; every part must have the same classes"
                )


class _ByteImages(Dataset[tuple[torch.Tensor, int]]):
    """Image files as uint8 tensors of shape (3, height, width), all of one size."""

    def __init__(
        self, samples: list[tuple[str, int]], loader: Any, image_size: tuple[int, int], resize: bool, reference: str
    ) -> None:
        self._samples = samples
        self._loader = loader
        self._image_size = image_size
        self._resize = resize
        self._reference = reference

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, target = self._samples[index]
        image = self._loader(path)
        if _height_and_width(image) != self._image_size:
            if not self._resize:
                raise ValueError(
                    f"{path} has height and width {_height_and_width(image)} where {self._reference} has "
                    f"{self._image_size}; give size=(height, width) to resize all images"
                )
            height, width = self._image_size
            image = image.resize((width, height), resample=import_extra("PIL.Image").Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous(), target


def _decode(source: DatasetSource, image_size: tuple[int, int]) -> TensorSource:
    images = torch.empty((len(source), 3, *image_size), dtype=torch.uint8)
    targets = torch.empty(len(source), dtype=torch.int64)
    start = 0
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]] = iter(source.loader(_READ_BATCH))
    for x, y in batches:
        images[start : start + len(x)] = x
        targets[start : start + len(x)] = y
        start += len(x)
    return TensorSource(images, targets)


def _height_and_width(image: Any) -> tuple[int, int]:
    width, height = image.size
    return height, width


def _checked_size(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = tuple(size) if isinstance(size, Iterable) else (size, size)
    if len(pair) != 2 or not all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in pair):
        raise ValueError(f"size must be a positive int or a pair (height, width) of them, got {size!r}")
    return pair[0], pair[1]


def _check_statistics(mean: Sequence[float] | None, std: Sequence[float] | None, normalize: bool) -> None:
    if (mean is None) != (std is None):
        raise ValueError(f"mean and std must be given together, got mean={mean!r} and std={std!r}")
    if mean is not None and not normalize:
        raise ValueError("mean and std are given but normalize=False; drop one or the other")
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != 3:
            raise ValueError(f"{name} must have one entry per colour channel, 3 in all, got {list(values)}")
