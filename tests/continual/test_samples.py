"""Samples of tasks, from every kind of data set that is taken. Oracle: tensors that number the samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from lightning_altmin.continual import Samples, from_continuum
from lightning_altmin.continual.samples import Part, as_samples
from lightning_altmin.continual.task_loader import Share, TaskLoader
from lightning_altmin.data.dataset_loader import DatasetSource
from tests.continual.problems import numbered

COUNT, CLASSES = 7, 3
X, Y = numbered(COUNT, CLASSES)


class Stored(Dataset[Any]):
    """Reads sample by sample; labels are where torchvision keeps them, or nowhere."""

    def __init__(self, **labels: Any) -> None:
        self.__dict__.update(labels)

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        return X[index], Y[index]


SOURCES: dict[str, Any] = {
    "tensors": (X, Y),
    "tensor data set": TensorDataset(X, Y),
    "list of targets": Stored(targets=Y.tolist()),
    "tensor of targets": Stored(targets=Y),
    "array of labels": Stored(labels=np.asarray(Y)),
    "no list of labels": Stored(),
    "part of another": Subset(Stored(targets=Y.tolist()), range(COUNT)),
    "read by workers": DatasetSource(Stored(targets=Y), num_workers=1),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_kind_of_data_set_gives_its_samples_and_labels(name: str) -> None:
    """Catches labels of other samples, or a kind of data set that is read another way in batches."""
    samples = as_samples(SOURCES[name])
    assert samples.labels.tolist() == Y.tolist()
    rows = [torch.tensor([4, 0]), torch.tensor([6])]
    for asked, (x, y) in zip(rows, samples.batches(rows), strict=True):
        assert x[:, 0].tolist() == asked.tolist()
        assert y.tolist() == [int(row) % CLASSES for row in asked]


def test_mappings_of_inputs_follow_one_another() -> None:
    """Catches the order of two mappings turned round: 10 (i + 1), not 10 i + 1."""
    mapped = as_samples((X, Y)).with_inputs(lambda x: x + 1).with_inputs(lambda x: 10 * x)
    assert mapped.read(torch.arange(COUNT))[0][:, 0].tolist() == [10.0 * (i + 1) for i in range(COUNT)]


def test_a_part_whose_labels_are_not_those_of_its_samples_is_refused() -> None:
    """Catches labels that are taken for those of other samples."""
    for indices, labels in ((torch.arange(3), torch.arange(2)), (torch.zeros(1, 2).long(), torch.zeros(1, 2).long())):
        with pytest.raises(ValueError, match="must be 1-d and of one length"):
            Samples([Part(Stored(), indices, labels)])


def test_a_loader_has_a_sample_for_every_process() -> None:
    """Catches a process without a batch, for which the others would wait."""
    with pytest.raises(ValueError, match="7 samples are too few for 8 processes"):
        TaskLoader(as_samples((X, Y)), 2, share=Share(0, 8))


@pytest.mark.parametrize("kept", [{"targets": Y.tolist()}, {"targets": Y.tolist()[:-1]}, {"_y": np.asarray(Y)}, {}])
def test_labels_of_a_continuum_scenario_are_those_of_its_samples(kept: dict[str, Any]) -> None:
    """Catches labels that a data set keeps of other samples than it has, and samples read although they are known."""
    stream = from_continuum([Stored(**kept)], [Stored(**kept)])
    assert stream[0].train.labels.tolist() == Y.tolist()
