"""Reading CSV rows: counting, ranges, plain and gzip files, and errors that name the line."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_altmin.data import CSVError, CSVFile
from lightning_altmin.data import csv_rows as module


def write(path: Path, text: str) -> Path:
    """Write a plain or, by its name, a gzip file."""
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read_all(file: CSVFile, start: int = 0, columns: int = 2, count: int = 1000) -> np.ndarray:
    """Rows from ``start`` on."""
    with file.rows(start, columns) as reader:
        return reader.read(count)


@pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz"])
@pytest.mark.parametrize("ending", ["", "\n", "\n\n", "\r\n", "\n  \n\t\n"])
@pytest.mark.parametrize("header", [False, True])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_line_ends_and_blank_lines_at_the_end(
    tmp_path: Path, name: str, ending: str, header: bool, line_end: str
) -> None:
    """Catches a last row lost without a line end, and blank lines or a header counted as rows."""
    lines = ["a,b"] * header + ["1,2", "3,4", "5,6.5"]
    file = CSVFile(write(tmp_path / name, line_end.join(lines) + ending), header=header)
    assert file.count_rows() == 3
    assert file.count_columns() == 2
    assert read_all(file).tolist() == [[1, 2], [3, 4], [5, 6.5]]
    assert read_all(file, start=2).tolist() == [[5, 6.5]]
    assert read_all(file, start=3).tolist() == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(rows=st.integers(1, 40), start=st.integers(0, 40), block=st.integers(1, 9), chunk=st.integers(1, 9))
def test_ranges_do_not_depend_on_the_cutting(tmp_path: Path, rows: int, start: int, block: int, chunk: int) -> None:
    """Catches rows lost or repeated where two blocks of bytes, or two chunks of lines, meet."""
    file = CSVFile(write(tmp_path / "rows.csv", "".join(f"{i},{i / 2}\n" for i in range(rows))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_COUNT_BLOCK", block)
        assert file.count_rows() == rows
    parts = []
    with file.rows(min(start, rows), 2) as reader:
        while len(part := reader.read(chunk)):
            parts.append(part)
    got = np.concatenate([np.empty((0, 2)), *parts])
    assert got[:, 0].tolist() == list(range(min(start, rows), rows))
    assert got[:, 1].tolist() == [i / 2 for i in range(min(start, rows), rows)]


@pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz"])
@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ("1,2,3", "3 fields where 2 are expected"),
        ("1", "1 fields where 2 are expected"),
        ("1,x", "field 2 is 'x', not a number"),
        ("1,", "field 2 is '', not a number"),
        ("1_0,2", "field 1 is '1_0', not a number"),
        ("1;2", "field 1 is '1;2', not a number"),
        ("1,2#note", "field 2 is '2#note', not a number"),
        ('"1",2', "field 1 is '\"1\"', not a number"),
        ("", "the line is blank, and rows follow it"),
        ("   ", "the line is blank, and rows follow it"),
    ],
)
@pytest.mark.parametrize("header", [False, True])
@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
def test_malformed_line_is_named(tmp_path: Path, name: str, bad: str, problem: str, header: bool, chunk: int) -> None:
    """Catches lines passed over or filled up, and a line number off by the header or the place in its chunk."""
    lines = ["a,b"] * header + [f"{i},0" for i in range(8)]
    lines.insert(6, bad)
    file = CSVFile(write(tmp_path / name, "\n".join(lines) + "\n"), header=header)

    def read_in_chunks() -> None:
        with file.rows(1, 2) as reader:
            while len(reader.read(chunk)):
                pass

    with pytest.raises(CSVError) as raised:
        read_in_chunks()
    assert str(raised.value) == f"{file.path}, line 7: {problem}"


def test_undecodable_bytes_are_named(tmp_path: Path) -> None:
    """Catches a decoding error that names a byte offset instead of a line."""
    path = tmp_path / "rows.csv"
    path.write_bytes(b"1,2\n3,\xff4\n")
    with pytest.raises(CSVError, match=r"line 2: field 2 is '\ufffd4', not a number"):
        read_all(CSVFile(path))


def test_forgotten_header_is_recognised(tmp_path: Path) -> None:
    """Catches an error for the most frequent mistake that does not name the way out."""
    with pytest.raises(CSVError, match=r"line 1: field 1 is 'label', not a number; .*header=True"):
        read_all(CSVFile(write(tmp_path / "rows.csv", "label,x\n1,2\n")))


def test_special_numbers_pass(tmp_path: Path) -> None:
    """Catches nan and inf refused here: what to do with them is the business of the training step."""
    rows = read_all(CSVFile(write(tmp_path / "rows.csv", "nan,inf\n-1e-3, 2E+2 \n")))
    assert np.isnan(rows[0, 0])
    assert rows[0, 1] == np.inf
    assert rows[1].tolist() == [-0.001, 200.0]


def test_byte_order_mark_is_no_part_of_a_number(tmp_path: Path) -> None:
    """Catches files saved by spreadsheets: the mark would make the first field of the first row unreadable."""
    path = tmp_path / "rows.csv"
    path.write_bytes("1,2\n".encode("utf-8-sig"))
    assert read_all(CSVFile(path)).tolist() == [[1, 2]]


@pytest.mark.parametrize("kept", [0.5, 0.99])
def test_truncated_gzip_is_named(tmp_path: Path, kept: float) -> None:
    """Catches an interrupted download that is read as a shorter file."""
    path = write(tmp_path / "rows.csv.gz", "".join(f"{i},{i * 0.1}\n" for i in range(5000)))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(CSVError, match=r"rows\.csv\.gz: not a complete gzip file"):
        CSVFile(path).count_rows()
    with pytest.raises(CSVError, match=r"rows\.csv\.gz: not a complete gzip file"):
        read_all(CSVFile(path), count=10_000)


def test_file_that_is_no_gzip_is_named(tmp_path: Path) -> None:
    """Catches a wrong name ending reported as something else."""
    (tmp_path / "rows.csv.gz").write_text("1,2\n")
    with pytest.raises(CSVError, match="not a complete gzip file"):
        CSVFile(tmp_path / "rows.csv.gz").count_rows()


@pytest.mark.parametrize("text", ["", "\n\n", "a,b\n"])
def test_file_without_rows(tmp_path: Path, text: str) -> None:
    """Catches a column count made up for a file that has none."""
    file = CSVFile(write(tmp_path / "rows.csv", text), header=text.startswith("a"))
    assert file.count_rows() == 0
    with pytest.raises(CSVError, match="no data rows"):
        file.count_columns()


def test_missing_file_and_bad_delimiter_are_refused(tmp_path: Path) -> None:
    """Catches errors that appear only when the first batch is read."""
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv' does not exist"):
        CSVFile(tmp_path / "nowhere.csv")
    with pytest.raises(ValueError, match="delimiter must be one character"):
        CSVFile(tmp_path / "nowhere.csv", delimiter=", ")
