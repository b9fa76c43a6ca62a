"""A run resumed anywhere trains on exactly the batches the uninterrupted run would have trained on."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_altmin.data import (
    CSVDataModule,
    ImageFolderDataModule,
    IndexedDataModule,
    ResumableDataModule,
    ResumableLoader,
    Sources,
    TensorLoader,
    TensorSource,
)
from lightning_altmin.data.resumable_data_module import EvaluationPart
from lightning_altmin.data.resumable_loader import BatchTransform
from tests.data.resume_harness import FailAt, SaveAt, fit, steps_after_resume

SAMPLES, BATCH = 22, 4  # 6 batches per epoch, the last of 2
EPOCH = 6
EPOCHS = 3


def add_noise(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """An augmentation whose every draw shows in the batch."""
    return x + torch.rand(x.shape, generator=generator)


class NumberedData(IndexedDataModule):
    """Sample i has target i; the augmentation is noise, so that a wrong generator changes the checksum."""

    @property
    def num_classes(self) -> int:
        return SAMPLES

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (3,)

    def load_sources(self) -> Sources:
        x = torch.arange(3.0 * SAMPLES).view(SAMPLES, 3)
        return Sources(TensorSource(x, torch.arange(SAMPLES)), val=TensorSource(x[:3], torch.arange(3)))

    def augmentation(self) -> BatchTransform | None:
        return add_noise


@pytest.fixture(scope="module")
def image_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random images in two classes; 22 to train on and 4 to test on."""
    root = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (SAMPLES + 4, 8, 8, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        part = "train" if number < SAMPLES else "test"
        folder = root / part / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def csv_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """27 rows whose first field is the number of the row."""
    path = tmp_path_factory.mktemp("csv") / "rows.csv"
    rows = np.column_stack([np.arange(SAMPLES + 5), np.random.default_rng(0).normal(size=(SAMPLES + 5, 3))])
    np.savetxt(path, rows, delimiter=",")
    return path


class UnsizedData(CSVDataModule):
    """Rows without a length, so that the Trainer fetches one batch ahead of training; validates on other data."""

    def make_eval_loader(self, part: EvaluationPart) -> ResumableLoader | None:
        return TensorLoader(torch.zeros(5, 3), torch.arange(5), 2) if part == "val" else None


Source = tuple[Callable[[], ResumableDataModule], int, int]
KINDS = ["tensor", "folder-stream", "csv", "csv-shuffled", "csv-unsized"]


@pytest.fixture(params=KINDS)
def source(request: pytest.FixtureRequest) -> Source:
    """A maker of data modules, the number of input features, and the number of batches per epoch."""
    kind = request.param
    if kind == "tensor":
        return lambda: NumberedData(BATCH), 3, EPOCH
    if kind.startswith("folder"):
        root = request.getfixturevalue("image_root")
        reading = {"in_memory": False, "num_workers": int(kind == "folder-worker")}
        return lambda: ImageFolderDataModule(root, batch_size=BATCH, val="test", augment=True, **reading), 192, EPOCH
    path = request.getfixturevalue("csv_path")
    if kind == "csv-unsized":
        return lambda: UnsizedData(path, BATCH, shuffle_buffer=5, count_rows=False, chunk_rows=3), 3, EPOCH + 1
    buffer = 5 if kind == "csv-shuffled" else 0
    return lambda: CSVDataModule(path, BATCH, val_rows=5, shuffle_buffer=buffer, chunk_rows=3), 3, EPOCH


@pytest.mark.parametrize("source", [*KINDS, "folder-worker"], indirect=True)
@pytest.mark.parametrize("batch", [1, 3, "last", "first of the second epoch"])
def test_resume_after_a_batch(source: Source, batch: int | str, tmp_path: Path) -> None:
    """Catches fetched batches counted as trained, and an epoch lost or repeated after a checkpoint of its last batch.

    Catches a permutation or an augmentation that is drawn anew, too.
    """
    make_data, features, epoch = source
    call = {"last": epoch, "first of the second epoch": epoch + 1}.get(str(batch), batch)
    expected, got = steps_after_resume(
        make_data, features, "on_train_batch_end", int(call), tmp_path, max_epochs=EPOCHS
    )
    assert len(expected) == EPOCHS * epoch - int(call)
    assert got == expected


@pytest.mark.parametrize("validate", [1.0, 0])
@pytest.mark.parametrize("batch", [3, EPOCH])
def test_resume_under_max_steps(source: Source, batch: int, validate: float, tmp_path: Path) -> None:
    """Catches reliance on one way of restarting: with max_steps, or without validation, Lightning takes another."""
    make_data, features, _ = source
    flags = {"max_epochs": -1, "max_steps": 17, "limit_val_batches": validate}
    expected, got = steps_after_resume(make_data, features, "on_train_batch_end", batch, tmp_path, **flags)
    assert len(expected) == 17 - batch
    assert got == expected


@pytest.mark.parametrize(
    ("hook", "validate"), [("on_train_epoch_end", 0), ("on_train_epoch_end", 1.0), ("on_validation_end", 1.0)]
)
@pytest.mark.parametrize("limit", [{"max_epochs": EPOCHS}, {"max_epochs": -1, "max_steps": 17}])
def test_resume_after_an_epoch(
    source: Source, hook: str, validate: float, limit: dict[str, int], tmp_path: Path
) -> None:
    """Catches an iterator of the finished epoch that draws from the generator or hands out a batch.

    Catches a next epoch that is not drawn from the restored generator, too.
    """
    make_data, features, epoch = source
    expected, got = steps_after_resume(make_data, features, hook, 1, tmp_path, limit_val_batches=validate, **limit)
    assert len(expected) == limit.get("max_steps", EPOCHS * epoch) - epoch
    assert got == expected


def test_resume_after_a_validation_inside_the_epoch(source: Source, tmp_path: Path) -> None:
    """Catches a state that takes every end of validation for the end of the epoch."""
    make_data, features, epoch = source
    flags = {"max_epochs": EPOCHS, "val_check_interval": 2}
    expected, got = steps_after_resume(make_data, features, "on_validation_end", 2, tmp_path, **flags)
    assert len(expected) == EPOCHS * epoch - 4
    assert got == expected


@pytest.mark.parametrize("batch", [2, 4])
def test_resume_with_a_limited_epoch(source: Source, batch: int, tmp_path: Path) -> None:
    """Catches a loader that judges by its own length that an epoch cut short by the Trainer goes on."""
    make_data, features, _ = source
    flags = {"max_epochs": EPOCHS, "limit_train_batches": 4}
    expected, got = steps_after_resume(make_data, features, "on_train_batch_end", batch, tmp_path, **flags)
    assert len(expected) == EPOCHS * 4 - batch
    assert got == expected


@pytest.mark.parametrize("batch", [1, 4, EPOCH])
def test_resume_after_a_batch_that_failed(source: Source, batch: int, tmp_path: Path) -> None:
    """Catches a batch counted as trained although its step failed, in particular the last one of an epoch."""
    make_data, features, _ = source
    whole = fit(make_data(), features, 1, [], None, max_epochs=EPOCHS)
    failing = FailAt(batch, tmp_path / "saved.ckpt")
    with pytest.raises(FailAt.StepError):
        fit(make_data(), features, 1, [failing], None, max_epochs=EPOCHS)
    resumed = fit(make_data(), features, 2, [], failing.path, max_epochs=EPOCHS)
    assert len(resumed.steps) == len(whole.steps) - (batch - 1)
    assert resumed.steps == whole.steps[batch - 1 :]


@pytest.mark.parametrize("first", [2, EPOCH])
def test_resume_of_a_resumed_run(source: Source, first: int, tmp_path: Path) -> None:
    """Catches positions counted from where a resumed run began instead of from the beginning of its epoch."""
    make_data, features, _ = source
    savers = [SaveAt("on_train_batch_end", call, tmp_path / f"{call}.ckpt") for call in (first, 3)]
    whole = fit(make_data(), features, 1, [savers[0]], None, max_epochs=EPOCHS)
    second = fit(make_data(), features, 2, [savers[1]], savers[0].path, max_epochs=EPOCHS)
    third = fit(make_data(), features, 3, [], savers[1].path, max_epochs=EPOCHS)
    assert second.steps == whole.steps[first:]
    assert len(third.steps) == len(whole.steps) - first - 3
    assert third.steps == whole.steps[first + 3 :]


@pytest.mark.parametrize("steps", [3, EPOCH, EPOCH + 2])
def test_resume_with_more_steps(source: Source, steps: int, tmp_path: Path) -> None:
    """Catches a run continued after its `max_steps` that begins another epoch, or loses the rest of its own."""
    make_data, features, _ = source
    saver = SaveAt("on_train_end", 1, tmp_path / "saved.ckpt")
    whole = fit(make_data(), features, 1, [], None, max_epochs=-1, max_steps=16)
    fit(make_data(), features, 1, [saver], None, max_epochs=-1, max_steps=steps)
    resumed = fit(make_data(), features, 2, [], saver.path, max_epochs=-1, max_steps=16)
    assert saver.trained == steps
    assert resumed.steps == whole.steps[steps:]
