"""What a finished run left in its folder: logged values, settings, accuracy matrices."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lightning_altmin.optional_imports import import_extra

Curve = list[tuple[int, float]]
"""``(step, value)`` pairs in the order of steps."""

_CSV, _EVENTS, _MATRIX = "metrics.csv", "events.out.tfevents.*", "accuracy_matrix.csv"
_SETTINGS = ("config.yaml", "hparams.yaml")  # the command line's, then Lightning's own
_NO_METRICS = ("step", "epoch", "hp_metric")


@dataclass
class Run:
    """One run.

    Attributes:
        name: Its folder, as short as tells the runs apart.
        folder: Where it is.
        curves: Logged values by name.
        settings: The text of its settings file, empty if there is none.
        matrices: Rows of cells of each accuracy matrix, by the file's path below the folder.
    """

    name: str
    folder: Path
    curves: dict[str, Curve] = field(default_factory=dict)
    settings: str = ""
    matrices: dict[str, list[list[str]]] = field(default_factory=dict)


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """The runs in these folders, or below them.

    A run's folder is one that holds ``metrics.csv`` (Lightning's ``CSVLogger``) or TensorBoard's event files.

    Raises:
        FileNotFoundError: If a folder does not exist, or no run is in or below it.
        ValueError: If a file of a run cannot be read.
        ImportError: If there are event files and tensorboard is not installed.
    """
    found: list[Path] = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise FileNotFoundError(
                f"run folder {str(folder)!r} {'is a file' if folder.exists() else 'does not exist'}"
            )
        below = sorted({path.parent for pattern in (_CSV, _EVENTS) for path in folder.rglob(pattern)})
        if not below:
            raise FileNotFoundError(
                f"no {_CSV} and no {_EVENTS} in or below {str(folder)!r}: train with a CSVLogger or a TensorBoardLogger"
            )
        found += [path for path in below if path not in found]
    return [_read(path, name) for path, name in zip(found, _names(found), strict=True)]


def _read(folder: Path, name: str) -> Run:
    run = Run(name, folder)
    if (path := folder / _CSV).exists():
        run.curves = _csv_curves(path)
    if any(folder.glob(_EVENTS)):
        run.curves = _event_curves(folder) | run.curves
    settings = next((path for file in _SETTINGS if (path := folder / file).exists()), None)
    if settings is not None:
        with _named(settings):
            run.settings = settings.read_text(encoding="utf-8").strip()
    for path in sorted(folder.rglob(_MATRIX)):
        with _named(path), path.open(newline="", encoding="utf-8") as file:
            run.matrices[str(path.relative_to(folder))] = [row for row in csv.reader(file) if row]
    return run


def _csv_curves(path: Path) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    with _named(path), path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            if None in row:
                raise ValueError(f"{path}, line {number}: it has more cells than the first line has columns")
            for name, cell in row.items():
                if name in _NO_METRICS or not cell:
                    continue
                try:
                    curves.setdefault(name, []).append((int(float(row["step"])), float(cell)))
                except (KeyError, TypeError, ValueError, OverflowError) as error:
                    raise ValueError(
                        f"{path}, line {number}, column {name!r}: {cell!r} with its step is no number"
                    ) from error
    return {name: sorted(curve, key=lambda point: point[0]) for name, curve in curves.items()}


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name the file that cannot be read inside this context."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} cannot be read as UTF-8: {error}") from error
    except csv.Error as error:
        raise ValueError(f"{path} cannot be read as CSV: {error}") from error
    except OSError as error:
        file = path if error.filename is None else os.fsdecode(error.filename)
        raise ValueError(f"{file} cannot be read: {error.strerror or error}") from error


def _event_curves(folder: Path) -> dict[str, Curve]:
    accumulator = import_extra("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    with _named(folder):
        events.Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
        if name not in _NO_METRICS
    }


def _names(folders: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as tell all of them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]
