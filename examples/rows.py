"""Rows of results: a CSV file that grows as runs end, so that an experiment that is cut off loses nothing, and tables.

The scripts in this folder keep a dataclass per row and skip the runs whose rows exist.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any, TypeVar

Row = TypeVar("Row")
_TYPES: dict[str, Any] = {"int": int, "float": float, "str": str}


def read(path: Path, kind: type[Row]) -> list[Row]:
    """The rows of a file, none if it does not exist; ``kind`` is a dataclass of numbers and strings."""
    types = {field.name: _TYPES[str(field.type)] for field in fields(kind)}  # type: ignore[arg-type]
    return [kind(**{name: make(row[name]) for name, make in types.items()}) for row in read_values(path)]


def read_values(path: Path) -> list[dict[str, str]]:
    """The same as strings by the names of the columns, for files with empty cells."""
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def finished(path: Path, *columns: str) -> set[tuple[str, ...]]:
    """What the rows of a file have in these columns; nothing if there is no file."""
    return {tuple(row[column] for column in columns) for row in read_values(path)}


def append(path: Path, rows: Sequence[Any]) -> None:
    """Add dataclass rows of one kind, below a header if the file is new."""
    append_values(path, [field.name for field in fields(rows[0])], map(astuple, rows))


def append_values(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Add rows of values, below the names of the columns if the file is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(columns)
        writer.writerows(rows)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = (columns, ["---"] * len(columns), *rows)
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)
