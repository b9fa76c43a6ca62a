"""Reading ranges of rows of a CSV file, plain or gzip, in chunks, with errors that name the line."""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, cast

import numpy as np
import numpy.typing as npt

_COUNT_BLOCK = 1 << 20  # bytes read at a time when rows are counted
_BLANKS = b" \t\r\n"

Rows = npt.NDArray[np.float64]


class CSVError(ValueError):
    """A CSV file that cannot be read; the message names the file, the 1-based line and what is wrong."""


class CSVFile:
    """A CSV file of numbers.

    Every line is one row, all rows have the same number of fields, every field is a number (``nan`` and ``inf``
    count as numbers). Blank lines are allowed at the end only.

    Args:
        path: the file; one whose name ends in ``.gz`` is decompressed while it is read.
        delimiter: the one character between fields.
        header: whether the first line holds names and is left out.

    Raises:
        ValueError: if ``delimiter`` is not one character.
        FileNotFoundError: if the file does not exist.
    """

    def __init__(self, path: str | Path, delimiter: str = ",", header: bool = False) -> None:
        self.path = Path(path)
        if len(delimiter) != 1 or delimiter in "\r\n":
            raise ValueError(f"delimiter must be one character other than a line end, got {delimiter!r}")
        if not self.path.is_file():
            raise FileNotFoundError(f"the CSV file {str(self.path.absolute())!r} does not exist; check path")
        self.delimiter = delimiter
        self.header = header

    def line_of(self, row: int) -> int:
        """The 1-based number of the line that holds a row (rows count from 0)."""
        return row + 1 + int(self.header)

    def count_rows(self) -> int:
        """Number of rows, by one pass that counts line ends and parses nothing."""
        ends_before, lines = 0, 0
        with self._reading(), self._open_bytes() as handle:
            while block := handle.read(_COUNT_BLOCK):
                content = block.rstrip(_BLANKS)
                if content:
                    # the line that holds the last character which is not blank
                    lines = ends_before + content.count(b"\n") + 1
                ends_before += block.count(b"\n")
        return max(0, lines - int(self.header))

    def count_columns(self) -> int:
        """Number of fields of the first row.

        Raises:
            CSVError: if there is no row.
        """
        with self._reading(), self._open_lines() as lines:
            first = next(islice(lines, int(self.header), None), "")
        if not first.strip():
            raise CSVError(f"{self.path}: no data rows")
        return len(first.split(self.delimiter))

    @contextmanager
    def rows(self, start: int, columns: int) -> Iterator["RowReader"]:
        """Open the file at a row.

        Args:
            start: number of the row, from 0; the rows before it are passed over without being parsed.
            columns: number of fields every row must have.

        Yields:
            A reader of the rows from ``start`` on.
        """
        with self._reading(), self._open_lines() as lines:
            first_line = start + int(self.header)
            passed_over = sum(1 for _ in islice(lines, first_line))
            yield RowReader(self, lines, line_number=passed_over, columns=columns)

    def _open_bytes(self) -> IO[bytes]:
        if self._is_gzip():
            return cast("IO[bytes]", gzip.open(self.path, "rb"))
        return open(self.path, "rb")

    def _open_lines(self) -> IO[str]:
        # newline="\n": a lone carriage return is not a line end here, as it is none for count_rows.
        # errors="replace": an undecodable byte becomes a field that is not a number, which is reported by line.
        if self._is_gzip():
            return gzip.open(self.path, "rt", encoding="utf-8-sig", errors="replace", newline="\n")
        return open(self.path, encoding="utf-8-sig", errors="replace", newline="\n")

    def _is_gzip(self) -> bool:
        return self.path.suffix == ".gz"

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise CSVError(f"{self.path}: not a complete gzip file ({error}); fetch or compress it again") from error


class RowReader:
    """Parses the following rows of an open file on demand; made by ``CSVFile.rows``.

    Args:
        file: the file, for messages.
        lines: its remaining lines.
        line_number: number of lines before them.
        columns: number of fields every row must have.
    """

    def __init__(self, file: CSVFile, lines: IO[str], line_number: int, columns: int) -> None:
        self._file = file
        self._lines = lines
        self._line_number = line_number
        self._columns = columns

    def read(self, count: int) -> Rows:
        """Parse up to ``count`` rows.

        Args:
            count: number of rows wanted, positive.

        Returns:
            Array of shape (m, columns); ``m`` is less than ``count`` only at the end of the file.

        Raises:
            CSVError: if a line has another number of fields, a field that is not a number, or is blank with rows
                after it.
        """
        lines = list(islice(self._lines, count))
        full = len(lines)
        while lines and not lines[-1].strip():
            lines.pop()
        if len(lines) < full:
            self._check_only_blanks_follow(self._line_number + len(lines))
        rows = self._parse(lines)
        self._line_number += full
        return rows

    def _parse(self, lines: list[str]) -> Rows:
        if not lines:
            return np.empty((0, self._columns))
        # numpy passes over blank lines, which would shift all line numbers after them
        if not any(line.isspace() for line in lines):
            try:
                rows = np.loadtxt(lines, delimiter=self._file.delimiter, comments=None, ndmin=2, dtype=np.float64)
            except ValueError as error:
                raise self._explain(lines, str(error)) from error
            if rows.shape == (len(lines), self._columns):
                return rows
        raise self._explain(lines, "the rows could not be read")

    def _explain(self, lines: list[str], reason: str) -> CSVError:
        for number, line in enumerate(lines, self._line_number + 1):
            problem = self._problem(line.strip("\r\n"))
            if problem is not None:
                first = number == 1 and not self._file.header
                hint = "; if the first line holds names, use header=True" if first else ""
                return CSVError(f"{self._file.path}, line {number}: {problem}{hint}")
        span = f"lines {self._line_number + 1} to {self._line_number + len(lines)}"
        return CSVError(f"{self._file.path}, {span}: {reason}")

    def _problem(self, line: str) -> str | None:
        if not line.strip():
            return "the line is blank, and rows follow it"
        fields = line.split(self._file.delimiter)
        for column, field in enumerate(fields):
            if not _is_number(field):
                return f"field {column + 1} is {field.strip()!r}, not a number"
        if len(fields) != self._columns:
            return f"{len(fields)} fields where {self._columns} are expected"
        return None

    def _check_only_blanks_follow(self, blank_line: int) -> None:
        for line in self._lines:
            if line.strip():
                raise CSVError(f"{self._file.path}, line {blank_line + 1}: the line is blank, and rows follow it")


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return "_" not in field  # Python reads 1_000 as a number, CSV readers do not
