"""What the Trainer does with the data modules besides resuming."""

import gc
import multiprocessing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import Dataset

from lightning_altmin.data import CSVDataModule, DatasetSource, IndexedDataModule, Sources, TensorLoader, TensorSource
from lightning_altmin.data.csv_loader import CSVLoader
from tests.data.resume_harness import Recorder, fit


class Numbers(IndexedDataModule):
    """Twenty samples; sample i has target i."""

    @property
    def num_classes(self) -> int:
        return 20

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (1,)

    def load_sources(self) -> Sources:
        return Sources(TensorSource(torch.arange(20.0)[:, None], torch.arange(20)))


def test_fit_without_validation_data() -> None:
    """Catches a validation loop over nothing, about which Lightning warns (and warnings are errors here)."""
    validations = []

    class Watch(Callback):
        def on_validation_start(self, *_: Any) -> None:
            validations.append(1)

    module = fit(Numbers(5), 1, 0, [Watch()], None, max_epochs=2)
    assert len(module.steps) == 8
    assert validations == []


def test_validation_is_asked_for_in_vain() -> None:
    """Catches `validate` and `test` over nothing, and an error that does not say what is missing."""
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    data = Numbers(5)
    with pytest.raises(RuntimeError, match="Numbers was set up without validation data"):
        trainer.validate(Recorder(1), datamodule=data, verbose=False)
    data.setup("fit")
    assert not data.has_validation


def test_validation_runs_where_there_is_data() -> None:
    """Catches a hidden validation hook that stays hidden when the data module is used again."""
    data = Numbers(5, val_split=4)
    data.setup("fit")
    assert data.has_validation
    assert len(next(iter(data.val_dataloader()))[1]) == 4


def test_overfitted_batches_are_the_same_every_epoch() -> None:
    """Catches `overfit_batches` that shows other samples every epoch because our loader has no sampler to replace."""
    module = fit(Numbers(5), 1, 0, [], None, max_epochs=3, overfit_batches=2)
    assert [ids for ids, _, _ in module.steps] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]] * 3


def shared(samples: int, size: int, world: int, **settings: Any) -> list[TensorLoader]:
    """The loaders of all processes."""
    x = torch.arange(float(samples))[:, None]
    loaders = [TensorLoader(x, torch.arange(samples), size, **settings) for _ in range(world)]
    for rank, loader in enumerate(loaders):
        loader.share(rank, world)
    return loaders


@pytest.mark.parametrize(("samples", "size", "world"), [(16, 4, 2), (21, 4, 2), (22, 2, 4), (7, 7, 3)])
def test_processes_share_every_batch(samples: int, size: int, world: int) -> None:
    """Catches samples that are seen twice, or by nobody, or in another global batch than on one process."""
    parts = [[y.tolist() for _, y in loader] for loader in shared(samples, size, world)]
    whole = [y.tolist() for _, y in TensorLoader(torch.zeros(samples, 1), torch.arange(samples), size * world)]
    assert [[y for part in batch for y in part] for batch in zip(*parts, strict=True)] == whole
    sizes = [[len(batch) for batch in batches] for batches in zip(*parts, strict=True)]
    assert all(max(batch) - min(batch) <= 1 and min(batch) >= 1 for batch in sizes)
    assert all(len(loader) == len(whole) for loader in shared(samples, size, world))


def test_a_process_without_samples_is_refused() -> None:
    """Catches a process that waits for a batch that it never gets."""
    with pytest.raises(ValueError, match="last batch would have 1 samples for 2 processes"):
        shared(9, 4, 2)
    with pytest.raises(ValueError, match="2 processes with batch_size=4 need 8"):
        shared(7, 4, 2, drop_last=True)
    assert [len(loader) for loader in shared(9, 4, 2, drop_last=True)] == [1, 1]


def rows(path: Path, count: int, size: int, rank: int, world: int, **settings: Any) -> CSVLoader:
    """The CSV loader of one of several processes; targets are the numbers of the rows."""
    path.write_text("".join(f"0,{row}\n" for row in range(count)))
    data = CSVDataModule(path, batch_size=size, target_column=1, chunk_rows=3, **settings)
    data.setup("fit")
    shared: dict[str, Any] = {"distributed_sampler_kwargs": {"num_replicas": world, "rank": rank}}
    data.trainer = SimpleNamespace(world_size=world, global_rank=rank, overfit_batches=0, **shared)  # type: ignore[assignment]
    return data.train_dataloader()  # type: ignore[return-value]


@pytest.mark.parametrize("settings", [{}, {"shuffle_buffer": 5}, {"count_rows": False}, {"drop_last": True}], ids=str)
@pytest.mark.parametrize(("count", "size", "world"), [(16, 4, 2), (21, 4, 2), (22, 2, 4), (7, 7, 3)])
def test_processes_share_every_batch_of_a_stream(
    count: int, size: int, world: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Catches rows that are trained on twice, or by nobody, or in another global batch than on one process."""
    if settings.get("drop_last") and count < size * world:
        pytest.skip("leaves no batch")
    seed = 3 if "shuffle_buffer" in settings else None
    for start in (0, 1) if count > size * world else (0,):  # from the first batch, and resumed

        def targets(loader: CSVLoader, start: int = start) -> list[Any]:
            return [y.long().tolist() for _, y in loader.batches_from(seed, start)]

        loaders = [rows(tmp_path / "rows.csv", count, size, rank, world, **settings) for rank in range(world)]
        parts = [targets(loader) for loader in loaders]
        whole = targets(rows(tmp_path / "rows.csv", count, size * world, 0, 1, **settings))
        assert [[y for part in batch for y in part] for batch in zip(*parts, strict=True)] == whole
        sizes = [[len(batch) for batch in found] for found in zip(*parts, strict=True)]
        assert all(max(batch) - min(batch) <= 1 and min(batch) >= 1 for batch in sizes)
        if settings.get("count_rows", True):
            assert all(len(loader) == start + len(whole) for loader in loaders)
        assert loaders[0].layout() == rows(tmp_path / "rows.csv", count, size * world, 0, 1, **settings).layout()


def test_a_process_without_rows_is_refused(tmp_path: Path) -> None:
    """Catches a process that waits for a batch that it never gets, at the end of a stream whose length is not known."""
    with pytest.raises(ValueError, match="last batch would have 1 samples for 2 processes"):
        rows(tmp_path / "rows.csv", 9, 4, 0, 2)
    for rank in range(2):
        batches = rows(tmp_path / "rows.csv", 9, 4, rank, 2, count_rows=False).batches_from(None, 0)
        assert len(next(batches)[1]) == 4
        with pytest.raises(ValueError, match=r"last batch would have 1 samples for 2 processes.*batch_size=4 per"):
            next(batches)


class NumberedItems(Dataset[tuple[torch.Tensor, int]]):
    """Sample i is the vector (i)."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.tensor([float(index)]), index


class ReadByWorker(Numbers):
    """The same samples read by another process, for training and validation."""

    def load_sources(self) -> Sources:
        return Sources(DatasetSource(NumberedItems(), num_workers=1), val=DatasetSource(NumberedItems(), num_workers=1))


@pytest.mark.parametrize("flags", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 3}])
def test_no_worker_outlives_the_fit(flags: dict[str, int]) -> None:
    """Catches reading processes that stay until some later garbage collection, which then waits for each of them."""
    gc.disable()
    try:
        fit(ReadByWorker(5), 1, 0, [], None, **flags)
        assert multiprocessing.active_children() == []
    finally:
        gc.enable()


def test_checkpoint_of_other_batches_is_refused(tmp_path: Path) -> None:
    """Catches a run resumed inside an epoch with another batch size: samples would be lost or repeated."""

    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "saved.ckpt")

    fit(Numbers(5), 1, 0, [Save()], None, max_epochs=1)
    with pytest.raises(ValueError, match="batch_size was 5, now 4"):
        fit(Numbers(4), 1, 0, [], tmp_path / "saved.ckpt", max_epochs=1)


EMPTY = TensorSource(torch.zeros(0, 1), torch.zeros(0))
SOME = TensorSource(torch.zeros(4, 1), torch.zeros(4))


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (Sources(EMPTY), "the training data has no samples"),
        (Sources(SOME, test=EMPTY), "the test data has no samples"),
        (Sources(SOME, val=EMPTY), "the validation data has no samples"),
    ],
)
def test_empty_parts_are_refused(sources: Sources, message: str) -> None:
    """Catches training, or testing, on nothing without a word."""

    class Given(Numbers):
        def load_sources(self) -> Sources:
            return sources

    with pytest.raises(ValueError, match=message):
        Given(2).setup("fit")


def test_data_is_read_once() -> None:
    """Catches data read again, and split again, by each of fit, validate and test."""
    reads = []

    class Counting(Numbers):
        def load_sources(self) -> Sources:
            reads.append(1)
            return super().load_sources()

    data = Counting(5)
    for stage in ("fit", "validate", "test", "predict"):
        data.setup(stage)
    assert len(reads) == 1


def test_closed_epoch_says_so() -> None:
    """Catches an iterator that seems to be at its end because the fit it belonged to was torn down."""
    data = Numbers(5)
    data.setup("fit")
    batches = iter(data.train_dataloader())
    next(batches)
    data.teardown("fit")
    with pytest.raises(RuntimeError, match="was closed"):
        next(batches)
