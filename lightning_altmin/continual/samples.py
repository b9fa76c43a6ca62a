"""The samples of a task: parts of data sets, with inputs and labels mapped, readable one by one or in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lightning_altmin.data.dataset_loader import DatasetSource
from lightning_altmin.data.resumable_loader import Batch, BatchPreparation
from lightning_altmin.data.tensor_loader import TensorSource

_WORKER_SEED = 0  # reading draws nothing; the DataLoader wants a seed all the same, and would take a global draw


@dataclass(frozen=True)
class Part:
    """Some samples of one data set.

    Attributes:
        data: The data set: in memory, or one that is read sample by sample.
        indices: Numbers of the samples in it, shape ``(n,)``, int64.
        labels: Label of each of them, shape ``(n,)``, int64.
        inputs: Maps a batch of stored inputs to the task's own, as a permutation of pixels does; ``None`` for none.
    """

    data: TensorSource | Dataset[Any]
    indices: Tensor
    labels: Tensor
    inputs: BatchPreparation | None = None

    def read(self, rows: Tensor) -> Tensor:
        """Inputs of some samples, given by their rows in this part; shape ``(len(rows), ...)``."""
        numbers = self.indices[rows]
        if isinstance(self.data, TensorSource):
            x = self.data.x.index_select(0, numbers.to(self.data.x.device))
        else:
            x = torch.stack([torch.as_tensor(self.data[int(number)][0]) for number in numbers])
        return x if self.inputs is None else self.inputs(x)

    def take(self, rows: Tensor) -> Part:
        """The part that has these rows only."""
        return Part(self.data, self.indices[rows], self.labels[rows], self.inputs)


class Samples(Dataset[tuple[Tensor, Tensor]]):
    """A map-style data set of classified samples, which also reads whole batches.

    Args:
        parts: What it consists of, in order.
        num_workers: Processes that read data sets which are not in memory; 0 reads in the main process.

    Raises:
        ValueError: If a part's ``indices`` and ``labels`` differ in length, or a label is negative.
    """

    def __init__(self, parts: Sequence[Part], num_workers: int = 0) -> None:
        for part in parts:
            if part.indices.shape != part.labels.shape or part.indices.dim() != 1:
                raise ValueError(
                    "indices and labels of a part must be 1-d and of one length, got shapes "
                    f"{tuple(part.indices.shape)} and {tuple(part.labels.shape)}"
                )
        self.parts = tuple(part for part in parts if len(part.indices))
        self.num_workers = num_workers
        self.labels = torch.cat([part.labels for part in self.parts]) if self.parts else torch.empty(0).long()
        """Label of every sample, shape ``(n,)``, int64."""
        if negative := sorted(set(self.labels[self.labels < 0].tolist())):
            raise ValueError(
                f"labels must be the numbers of classes, 0 or more, got {negative}; number the classes from 0 in all "
                "data: y = torch.searchsorted(y_train.unique(), y)"
            )
        self._ends = torch.tensor([len(part.indices) for part in self.parts]).cumsum(0) if self.parts else self.labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} was asked for, there are {len(self)}")
        x, y = self.read(torch.tensor([index % len(self)]))
        return x[0], y[0]

    @property
    def classes(self) -> tuple[int, ...]:
        """The labels that occur, in ascending order."""
        return tuple(sorted(set(self.labels.tolist())))

    @property
    def in_memory(self) -> bool:
        """Whether batches come by indexing tensors."""
        return all(isinstance(part.data, TensorSource) for part in self.parts)

    def read(self, rows: Tensor) -> Batch:
        """A batch: inputs ``(len(rows), ...)`` and labels ``(len(rows),)`` of the samples with these numbers."""
        if len(self.parts) == 1:
            return self.parts[0].read(rows), self.labels[rows]
        owner = torch.searchsorted(self._ends, rows, right=True)
        starts = torch.cat([self._ends.new_zeros(1), self._ends[:-1]])
        x: Tensor | None = None
        for number in sorted(set(owner.tolist())):
            mine = (owner == number).nonzero().squeeze(1)
            read = self.parts[number].read(rows[mine] - starts[number])
            x = read.new_empty((len(rows), *read.shape[1:])) if x is None else x
            x[mine.to(x.device)] = read
        assert x is not None
        return x, self.labels[rows]

    def batches(self, rows: Sequence[Tensor]) -> Iterator[Batch]:
        """Batches of the given samples, one after the other; data that is not in memory is read by the workers."""
        if self.in_memory:
            yield from (self.read(batch) for batch in rows)
            return
        reader: DataLoader[Any] = DataLoader(
            self,
            batch_sampler=[batch.tolist() for batch in rows],
            num_workers=self.num_workers,
            generator=torch.Generator().manual_seed(_WORKER_SEED),
        )
        yield from ((x, y) for x, y in reader)

    def take(self, rows: Tensor) -> Samples:
        """The samples with these numbers, in ascending order of the parts they come from."""
        taken, start = [], 0
        for part in self.parts:
            end = start + len(part.indices)
            taken.append(part.take(rows[(rows >= start) & (rows < end)] - start))
            start = end
        return Samples(taken, self.num_workers)

    def with_inputs(self, inputs: BatchPreparation) -> Samples:
        """The same samples, with inputs mapped further."""
        return Samples(
            [Part(p.data, p.indices, p.labels, _composed(p.inputs, inputs)) for p in self.parts], self.num_workers
        )

    def with_labels(self, new: dict[int, int]) -> Samples:
        """The same samples with each label ``c`` replaced by ``new[c]``.

        Raises:
            ValueError: If ``new`` leaves out a label that occurs.
        """
        if missing := sorted(set(self.classes) - set(new)):
            raise ValueError(f"new must have an entry for every label, got none for {missing}; add them")
        table = torch.full((max(new) + 1,), -1)
        table[list(new)] = torch.tensor(list(new.values()))
        return Samples([Part(p.data, p.indices, table[p.labels], p.inputs) for p in self.parts], self.num_workers)

    def __add__(self, other: Samples) -> Samples:  # type: ignore[override]
        return Samples([*self.parts, *other.parts], max(self.num_workers, other.num_workers))


SamplesLike: TypeAlias = Samples | TensorSource | DatasetSource | Dataset[Any] | tuple[Tensor, Tensor]
"""What builders take for data: tensors ``(x, y)``, a source of `lightning_altmin.data`, or any map-style data set."""


def as_samples(data: SamplesLike) -> Samples:
    """All samples of a data set.

    Args:
        data: See `SamplesLike`. The labels of a data set are its ``targets`` or ``labels`` if it has such, and are
            otherwise read sample by sample, once.

    Raises:
        TypeError: If ``data`` is none of these.
        ValueError: If labels are not integers >= 0, one per sample.
    """
    if isinstance(data, Samples):
        return data
    workers = data.num_workers if isinstance(data, DatasetSource) else 0
    source = data.dataset if isinstance(data, DatasetSource) else data
    if isinstance(source, tuple) and len(source) == 2:
        source = TensorSource(*source)
    if type(source) is TensorDataset and len(source.tensors) == 2:
        source = TensorSource(*source.tensors)
    if not (hasattr(source, "__getitem__") and hasattr(source, "__len__")) and not isinstance(source, TensorSource):
        raise TypeError(
            "data must be tensors (x, y), a TensorSource, a DatasetSource or a map-style data set, got "
            f"{type(source).__name__}"
        )
    labels = _labels_of(source)
    if labels.dim() != 1 or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(
            f"labels must be integers, one per sample, got shape {tuple(labels.shape)} and type {labels.dtype}"
        )
    return Samples([Part(source, torch.arange(len(labels)), labels.long().cpu())], workers)


def _labels_of(source: Any) -> Tensor:
    if isinstance(source, TensorSource):
        return source.y
    if isinstance(source, Subset):
        return _labels_of(source.dataset)[list(source.indices)]
    for name in ("targets", "labels"):
        stored = getattr(source, name, None)
        if isinstance(stored, Tensor) or (isinstance(stored, Sequence) and len(stored) == len(source)):
            return torch.as_tensor(stored)
        if hasattr(stored, "__array__"):
            return torch.as_tensor(stored)
    return torch.tensor([int(source[number][1]) for number in range(len(source))], dtype=torch.int64)


def _composed(first: BatchPreparation | None, second: BatchPreparation) -> BatchPreparation:
    if first is None:
        return second
    return lambda x: second(first(x))
