"""The handwritten digits that come with scikit-learn: real data without a download."""

import torch

from lightning_altmin.data.base import DataSource, IndexedDataModule, Sources
from lightning_altmin.data.image_preparation import ImagePreparation
from lightning_altmin.data.resumable_loader import BatchPreparation
from lightning_altmin.data.tensor_loader import TensorSource
from lightning_altmin.optional_imports import import_extra

_TEST_SHARE = 0.2
_TEST_SEED = 0
_MAX_PIXEL = 16


class DigitsDataModule(IndexedDataModule):
    """1797 handwritten digits of 8 x 8 pixels in ten classes.

    A fifth of them, drawn once and for all with equal class shares, is the test set. Pixels are normalised by the
    mean and the standard deviation over all pixels of the training images.

    Args:
        batch_size: samples per training batch.
        eval_batch_size: samples per validation, test and prediction batch.
        val_split: part of the training data held out for validation: a share in [0, 1) or a number of samples.
        split_seed: seed of the validation split (the test set never changes).
        drop_last: whether a last training batch that is not full is left out.
        flatten: whether inputs are vectors of 64 pixels; otherwise images of shape (1, 8, 8).

    Raises:
        ImportError: in ``setup``, if scikit-learn is not installed.
        ValueError: see ``IndexedDataModule``.
    """

    def __init__(
        self,
        batch_size: int = 32,
        eval_batch_size: int = 1000,
        val_split: int | float = 0.0,
        split_seed: int = 0,
        drop_last: bool = False,
        flatten: bool = True,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, val_split, split_seed, drop_last)
        self.flatten = flatten

    @property
    def num_classes(self) -> int:
        """Number of classes: 10."""
        return 10

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(64,) if flattened, else (1, 8, 8)."""
        return (64,) if self.flatten else (1, 8, 8)

    def load_sources(self) -> Sources:
        """Read the digits and set the test set apart."""
        digits = import_extra("sklearn.datasets").load_digits()
        split = import_extra("sklearn.model_selection").train_test_split
        train_x, test_x, train_y, test_y = split(
            digits.images, digits.target, test_size=_TEST_SHARE, stratify=digits.target, random_state=_TEST_SEED
        )
        return Sources(train=_source(train_x, train_y), test=_source(test_x, test_y))

    def make_preparation(self, train: DataSource, indices: torch.Tensor | None) -> BatchPreparation:
        """Normalisation by the training images' statistics."""
        (batch,) = train.loader(len(train) if indices is None else len(indices), indices=indices)
        pixels = batch[0].double() / _MAX_PIXEL
        return ImagePreparation(_MAX_PIXEL, [float(pixels.mean())], [float(pixels.std(correction=0))], self.flatten)


def _source(images: object, targets: object) -> TensorSource:
    return TensorSource(torch.as_tensor(images, dtype=torch.uint8)[:, None], torch.as_tensor(targets).long())
