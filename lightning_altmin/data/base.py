"""The common part of data modules whose samples can be asked for by number."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from lightning_altmin.arguments import check_count
from lightning_altmin.data.indexed_loader import IndexedLoader
from lightning_altmin.data.resumable_data_module import EvaluationPart, ResumableDataModule
from lightning_altmin.data.resumable_loader import BatchPreparation, BatchTransform
from lightning_altmin.data.val_split import check_val_split, hold_out
from lightning_altmin.trainer.progress import TrainingProgress


class DataSource(Protocol):
    """A data set that makes loaders of its samples, such as ``TensorSource``."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def loader(
        self,
        batch_size: int,
        shuffle: bool = False,
        drop_last: bool = False,
        transform: BatchTransform | None = None,
        prepare: BatchPreparation | None = None,
        indices: torch.Tensor | None = None,
        progress: TrainingProgress | None = None,
    ) -> IndexedLoader:
        """Make a loader; the arguments are those of ``IndexedLoader``."""
        ...


class Sources(NamedTuple):
    """The data sets of a data module; ``test`` and ``val`` may be missing."""

    train: DataSource
    test: DataSource | None = None
    val: DataSource | None = None


@dataclass(frozen=True)
class _Part:
    """Some, or all, samples of a data set."""

    source: DataSource
    indices: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.source) if self.indices is None else len(self.indices)


class IndexedDataModule(ResumableDataModule):
    """Data module with a train, a validation and a test part, and train loaders that resume at any batch.

    A subclass says how to read its data (``load_sources``), how batches become network input
    (``make_preparation``) and, if it augments, how (``augmentation``).

    Args:
        batch_size: samples per training batch.
        eval_batch_size: samples per validation, test and prediction batch.
        val_split: part of the training data held out for validation: a float in [0, 1) is a share (rounded), an int
            is a number of samples; 0 holds out nothing.
        split_seed: seed of the validation split; the split depends on it and on the number of samples only.
        drop_last: whether a last training batch that is not full is left out.

    Raises:
        ValueError: if a batch size is not positive or ``val_split`` is out of range; in ``setup``, if a part would
            be empty.
    """

    def __init__(
        self,
        batch_size: int = 128,
        eval_batch_size: int = 1000,
        val_split: int | float = 0.0,
        split_seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__()
        check_count("batch_size", batch_size)
        check_count("eval_batch_size", eval_batch_size)
        check_val_split(val_split)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.val_split = val_split
        self.split_seed = split_seed
        self.drop_last = drop_last
        self._parts: dict[str, _Part] = {}  # "train" and, where there is such data, "val" and "test"
        self._prepare: BatchPreparation | None = None

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Number of classes."""

    @property
    @abstractmethod
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input as the network sees it, without the batch dimension."""

    @abstractmethod
    def load_sources(self) -> Sources:
        """Read the data; called once, by the first ``setup``."""

    def make_preparation(self, train: DataSource, indices: torch.Tensor | None) -> BatchPreparation | None:
        """Make the deterministic last step of every batch, such as normalisation.

        Args:
            train: the training data.
            indices: numbers of its samples that are trained on; None for all. Statistics are to be taken of these
                only.
        """
        return None

    def augmentation(self) -> BatchTransform | None:
        """The random augmentation of training batches, None for none."""
        return None

    def read(self) -> None:
        """Read and split the data.

        Raises:
            ValueError: if the training part would be empty or give no batch, or an existing part has no samples.
        """
        sources = self.load_sources()
        train, val = self._split(sources)
        if self.drop_last and len(train) < self.batch_size:
            raise ValueError(
                f"no training batch would be left: drop_last=True with {len(train)} training samples and "
                f"batch_size={self.batch_size}; use a smaller batch_size or drop_last=False"
            )
        if sources.test is not None and len(sources.test) == 0:
            raise ValueError("the test data has no samples")
        self._prepare = self.make_preparation(train.source, train.indices)
        self._parts["train"] = train
        if val is not None:
            self._parts["val"] = val
        if sources.test is not None:
            self._parts["test"] = _Part(sources.test)

    def make_train_loader(self, shuffle: bool, progress: TrainingProgress | None) -> IndexedLoader:
        """Make the loader of shuffled, augmented training batches."""
        return self._parts["train"].source.loader(
            self.batch_size,
            shuffle=shuffle,
            drop_last=self.drop_last,
            transform=self.augmentation(),
            prepare=self._prepare,
            indices=self._parts["train"].indices,
            progress=progress,
        )

    def make_eval_loader(self, part: EvaluationPart) -> IndexedLoader | None:
        """Make the loader of validation or test batches, in stored order."""
        if part not in self._parts:
            return None
        source, indices = self._parts[part].source, self._parts[part].indices
        return source.loader(self.eval_batch_size, prepare=self._prepare, indices=indices)

    def _split(self, sources: Sources) -> tuple[_Part, _Part | None]:
        samples = len(sources.train)
        if samples == 0:
            raise ValueError("the training data has no samples")
        if sources.val is not None:
            if self.val_split:
                raise ValueError(f"val_split={self.val_split!r} must be 0 when there is validation data of its own")
            if len(sources.val) == 0:
                raise ValueError("the validation data has no samples")
            return _Part(sources.train), _Part(sources.val)
        parts = hold_out(samples, self.val_split, torch.Generator().manual_seed(self.split_seed))
        if parts is None:
            return _Part(sources.train), None
        train, val = parts
        return _Part(sources.train, train), _Part(sources.train, val)
