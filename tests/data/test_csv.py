"""CSVDataModule: parts, streaming in bounded memory, shuffling, labels, and the HIGGS layout."""

import gzip
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_altmin.data import CSVDataModule, CSVError, CSVLoader, HiggsDataModule, ResumableLoader
from lightning_altmin.data.csv_rows import RowReader


def write_rows(path: Path, count: int, label: Callable[[int], float] = lambda i: i % 2) -> Path:
    """Rows (label, i, i / 4)."""
    text = "".join(f"{label(i)},{i},{i / 4}\n" for i in range(count)).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def ready(path: Path, **arguments: Any) -> CSVDataModule:
    """A data module that is set up."""
    data = CSVDataModule(path, **arguments)
    data.setup("fit")
    return data


def numbers(loader: ResumableLoader) -> list[int]:
    """Numbers of the rows a loader gives, in its order."""
    return [int(i) for x, _ in loader for i in x[:, 0]]


@pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz"])
def test_parts_are_consecutive_rows(tmp_path: Path, name: str) -> None:
    """Catches test rows that are trained on, rows lost between the parts, and a test set at the wrong end."""
    data = ready(
        write_rows(tmp_path / name, 23), batch_size=4, eval_batch_size=2, val_rows=3, test_rows=5, chunk_rows=2
    )
    assert numbers(data.train_dataloader()) == list(range(15))
    assert numbers(data.val_dataloader()) == [15, 16, 17]
    assert numbers(data.test_dataloader()) == numbers(data.predict_dataloader()) == [18, 19, 20, 21, 22]
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    assert [len(loader) for loader in loaders] == [len(list(loader)) for loader in loaders] == [4, 2, 3]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(
    rows=st.integers(1, 40),
    batch=st.integers(1, 9),
    buffer=st.integers(0, 12),
    chunk=st.integers(1, 15),
    drop_last=st.booleans(),
    known=st.booleans(),
    start=st.integers(0, 10),
)
def test_any_cutting_gives_the_same_batches_and_resumes(
    tmp_path: Path, rows: int, batch: int, buffer: int, chunk: int, drop_last: bool, known: bool, start: int
) -> None:
    """Catches rows lost or repeated where chunks, shuffled blocks and batches meet, and a resume at the wrong row."""
    if drop_last and rows < batch:
        return
    path = write_rows(tmp_path / f"{rows}.csv", rows)
    settings_ = {"batch_size": batch, "shuffle_buffer": buffer, "drop_last": drop_last, "count_rows": known}
    loader = ready(path, chunk_rows=chunk, **settings_).train_dataloader()
    torch.manual_seed(1)
    iterator = iter(loader)
    state = loader.state_dict()
    batches = []
    for index, (x, _) in enumerate(iterator, 1):
        batches.append([int(i) for i in x[:, 0]])
        if index == start:
            state = loader.state_dict()
    order = list(chain(*batches))
    kept = rows - rows % batch if drop_last else rows
    assert [len(b) for b in batches[:-1]] == [batch] * (len(batches) - 1)
    assert len(order) == kept
    if drop_last:
        assert len(set(order)) == kept
    else:
        block = buffer or 1
        for low in range(0, rows, block):
            assert sorted(order[low : low + block]) == list(range(low, min(low + block, rows)))
    other = ready(path, chunk_rows=chunk + 3, **settings_).train_dataloader()
    other.load_state_dict(state)
    if 0 < start < len(batches):
        before = torch.get_rng_state()
        assert numbers(other) == list(chain(*batches[start:]))
        assert torch.equal(torch.get_rng_state(), before)


def test_shuffled_epochs_differ_and_follow_the_global_seed(tmp_path: Path) -> None:
    """Catches one order for all epochs, one order for all blocks, and an order that no seed governs."""
    loader = ready(write_rows(tmp_path / "rows.csv", 60), shuffle_buffer=20, chunk_rows=7).train_dataloader()
    torch.manual_seed(5)
    first, second = numbers(loader), numbers(loader)
    torch.manual_seed(5)
    assert [numbers(loader), numbers(loader)] == [first, second]
    assert first != second
    blocks = [[i % 20 for i in first[low : low + 20]] for low in (0, 20, 40)]
    assert blocks[0] != blocks[1] != blocks[2]


def test_memory_is_bounded_by_chunk_and_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a loader that reads the whole file: rows parsed may run ahead of rows handed out only by the buffers."""
    parsed, largest = 0, 0
    original = RowReader.read

    def counting(self: RowReader, count: int) -> Any:
        nonlocal parsed, largest
        rows = original(self, count)
        parsed, largest = parsed + len(rows), max(largest, len(rows))
        return rows

    monkeypatch.setattr(RowReader, "read", counting)
    path = write_rows(tmp_path / "rows.csv", 5000)
    for buffer, ahead in ((0, 32), (100, 100)):
        loader = ready(path, batch_size=10, chunk_rows=32, shuffle_buffer=buffer).train_dataloader()
        parsed, largest, used = 0, 0, 0
        for x, _ in loader:
            assert parsed - used <= ahead + 10
            used += len(x)
        assert used == parsed == 5000
        assert largest == 32


def test_resume_parses_no_earlier_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a resume that parses the file from its beginning."""
    parsed = 0
    original = RowReader.read

    def counting(self: RowReader, count: int) -> Any:
        nonlocal parsed
        rows = original(self, count)
        parsed += len(rows)
        return rows

    loader = ready(write_rows(tmp_path / "rows.csv", 100), batch_size=10, shuffle_buffer=25).train_dataloader()
    batches = iter(loader)
    for _ in range(8):
        next(batches)
    monkeypatch.setattr(RowReader, "read", counting)
    loader.load_state_dict(loader.state_dict())
    assert len(numbers(loader)) == 20
    assert parsed == 25  # rows 75 to 99, the block in which the last two batches begin


def test_a_loader_of_uncounted_rows_has_no_length(tmp_path: Path) -> None:
    """Catches an invented length: the Trainer would end the epoch there."""
    loader = ready(write_rows(tmp_path / "rows.csv", 10), batch_size=4, count_rows=False).train_dataloader()
    with pytest.raises(TypeError, match="does not know its length"):
        len(loader)
    assert [len(y) for _, y in loader] == [4, 4, 2]


@pytest.mark.parametrize("column", [0, 1, 2, -1, -3])
def test_target_column(tmp_path: Path, column: int) -> None:
    """Catches features and target exchanged; a real-valued target has one column, like a network's output."""
    path = write_rows(tmp_path / "rows.csv", 6)
    x, y = next(iter(ready(path, target_column=column).train_dataloader()))
    table = torch.tensor([[i % 2, i, i / 4] for i in range(6)], dtype=torch.float32)
    place = column % 3
    assert torch.equal(y, table[:, place : place + 1])
    assert torch.equal(x, table[:, [c for c in range(3) if c != place]])


def test_types_and_scaling(tmp_path: Path) -> None:
    """Catches class labels that are not integers, an ignored dtype, and features scaled by each other's numbers."""
    path = write_rows(tmp_path / "rows.csv", 6)
    data = ready(path, num_classes=2, dtype="float64", feature_mean=[1.0, 2.0], feature_std=[2.0, 0.5])
    x, y = next(iter(data.train_dataloader()))
    assert y.dtype == torch.int64
    assert y.tolist() == [0, 1, 0, 1, 0, 1]
    assert x.dtype == torch.float64
    assert x.tolist() == [[(i - 1) / 2, (i / 4 - 2) / 0.5] for i in range(6)]
    assert data.input_shape == (2,)


@pytest.mark.parametrize("bad", [2.0, -1.0, 0.5, float("nan")])
@pytest.mark.parametrize("header", [False, True])
def test_label_out_of_range_is_named(tmp_path: Path, bad: float, header: bool) -> None:
    """Catches a label that is rounded, or that fails deep inside a loss on some batch of a shuffled block."""
    path = write_rows(tmp_path / "rows.csv", 30, lambda i: bad if i == 17 else i % 2)
    if header:
        path.write_text("label,a,b\n" + path.read_text())
    data = ready(path, num_classes=2, shuffle_buffer=10, chunk_rows=4, header=header)
    with pytest.raises(
        CSVError, match=rf"rows\.csv, line {18 + header}: the label \(field 1\) is {bad:g}, not one of 0 to 1"
    ):
        list(data.train_dataloader())


@pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz"])
def test_malformed_line_is_named_through_the_loader(tmp_path: Path, name: str) -> None:
    """Catches a line number that forgets the rows a part begins after."""
    path = tmp_path / name
    lines = [f"0,{i},0" for i in range(30)]
    lines[26] = "0,26"
    text = "\n".join(lines).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    data = ready(path, test_rows=8, chunk_rows=3)
    assert len(numbers(data.train_dataloader())) == 22
    with pytest.raises(CSVError, match=r", line 27: 2 fields where 3 are expected"):
        list(data.test_dataloader())


def test_file_cut_short_during_the_run(tmp_path: Path) -> None:
    """Catches an epoch that silently becomes shorter."""
    path = write_rows(tmp_path / "rows.csv", 20)
    data = ready(path)
    write_rows(path, 15)
    with pytest.raises(CSVError, match="ends after 15 rows where at least 20 were expected"):
        list(data.train_dataloader())


def test_uncounted_rows_that_give_no_batch(tmp_path: Path) -> None:
    """Catches a run that trains on nothing."""
    data = ready(write_rows(tmp_path / "rows.csv", 3), batch_size=4, drop_last=True, count_rows=False)
    with pytest.raises(ValueError, match="gives no batch: it has 3 rows where batch_size=4"):
        list(data.train_dataloader())


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"batch_size": 0}, "batch_size must be"),
        ({"eval_batch_size": 0}, "eval_batch_size must be"),
        ({"chunk_rows": 0}, "chunk_rows must be"),
        ({"shuffle_buffer": -1}, "shuffle_buffer must be"),
        ({"val_rows": -1}, "val_rows must be"),
        ({"test_rows": 1.5}, "test_rows must be"),
        ({"num_classes": 1}, "num_classes must be an integer >= 2, or None for a real-valued target, got 1"),
        ({"num_classes": 2.5}, "num_classes must be an integer >= 2, .*, got 2.5"),
        ({"num_classes": "2"}, "num_classes must be an integer >= 2, .*, got '2'"),
        ({"dtype": "float16"}, "dtype must be"),
        ({"count_rows": False, "test_rows": 2}, "count_rows=True"),
    ],
)
def test_bad_arguments_are_refused_at_once(tmp_path: Path, settings_: dict[str, Any], message: str) -> None:
    """Catches settings that would show only in training."""
    with pytest.raises(ValueError, match=message):
        CSVDataModule(tmp_path / "rows.csv", **settings_)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"target_column": 3}, "target_column=3 is not one of the 3 columns"),
        ({"columns": 4}, "line 1: 3 fields where 4 are expected"),
        ({"delimiter": ";"}, "1 field; check delimiter"),
        ({"test_rows": 6, "val_rows": 4}, "no training batch would be left"),
        ({"batch_size": 11, "drop_last": True}, "no training batch would be left"),
        ({"feature_mean": [0.0]}, "feature_mean must have one entry per feature, 2 in all, got 1"),
        ({"feature_std": [1.0, 0.0]}, "feature_std must be positive"),
    ],
)
def test_settings_that_do_not_fit_the_file(tmp_path: Path, settings_: dict[str, Any], message: str) -> None:
    """Catches settings that would fail, or be ignored, after the fit has begun."""
    path = write_rows(tmp_path / "rows.csv", 10)
    with pytest.raises(ValueError, match=message):
        ready(path, **settings_)


@pytest.mark.parametrize("name", ["higgs.csv", "higgs.csv.gz"])
def test_higgs_layout(tmp_path: Path, name: str) -> None:
    """Catches the label taken from another column, another number of features, and a test set at the beginning."""
    table = np.random.default_rng(0).normal(size=(60, 29))
    table[:, 0] = np.arange(60) % 2
    np.savetxt(tmp_path / name, table, fmt="%.18e", delimiter=",")
    data = HiggsDataModule(tmp_path / name, test_rows=10, batch_size=50)
    data.setup("fit")
    ((x, y),) = list(data.train_dataloader())
    assert x.shape == (50, 28)
    assert data.input_shape == (28,)
    assert data.num_classes == 2
    assert np.allclose(x.double(), table[:50, 1:], atol=1e-6)
    assert y.tolist() == table[:50, 0].tolist()
    ((x, y),) = list(data.test_dataloader())
    assert np.allclose(x.double(), table[50:, 1:], atol=1e-6)
    assert HiggsDataModule(tmp_path / name).test_rows == 500_000
    with pytest.raises(ValueError, match="60 rows, val_rows=0, test_rows=500000"):
        HiggsDataModule(tmp_path / name).setup()


def test_loaders_before_setup_are_refused(tmp_path: Path) -> None:
    """Catches an error about None deep inside when `setup` was forgotten."""
    with pytest.raises(RuntimeError, match=r"call setup\(\) of CSVDataModule"):
        CSVDataModule(tmp_path / "rows.csv").train_dataloader()
    with pytest.raises(RuntimeError, match="after setup"):
        _ = CSVDataModule(tmp_path / "rows.csv").input_shape


def test_loader_range_is_checked(tmp_path: Path) -> None:
    """Catches a loader over no rows made by hand."""
    file, schema = ready(write_rows(tmp_path / "rows.csv", 10))._file_and_schema()
    with pytest.raises(ValueError, match="would be empty"):
        CSVLoader(file, schema, 4, rows=3, drop_last=True)
    with pytest.raises(ValueError, match="shuffle_buffer must be"):
        CSVLoader(file, schema, 4, shuffle_buffer=-2)
    with pytest.raises(ValueError, match="shuffle_buffer must be an integer >= 0, got 'all'"):
        CSVLoader(file, schema, 4, shuffle_buffer="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="start must be an integer >= 0, got -1"):
        CSVLoader(file, schema, 4, start=-1)
    with pytest.raises(ValueError, match=r"rows must be an integer >= 0, or None for all, got 2\.5"):
        CSVLoader(file, schema, 4, rows=2.5)  # type: ignore[arg-type]


def test_loaders_are_made_after_setup(tmp_path: Path) -> None:
    """Catches a loader of a file that nobody has looked at."""
    with pytest.raises(RuntimeError, match=r"call setup\(\) of CSVDataModule before asking for its loaders"):
        CSVDataModule(tmp_path / "rows.csv").train_dataloader()
