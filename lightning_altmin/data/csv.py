"""CSV files of any length, streamed in bounded memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from lightning_altmin.arguments import check_count
from lightning_altmin.data.csv_loader import CSVLoader
from lightning_altmin.data.csv_rows import CSVError, CSVFile
from lightning_altmin.data.csv_schema import RowSchema
from lightning_altmin.data.resumable_data_module import EvaluationPart, ResumableDataModule
from lightning_altmin.trainer.progress import TrainingProgress

_DTYPES = {"float32": torch.float32, "float64": torch.float64}
_HIGGS_COLUMNS = 29
_HIGGS_TEST_ROWS = 500_000


class CSVDataModule(ResumableDataModule):
    """Streams a CSV file of numbers, plain or ``.gz``, whose last rows may be kept for validation and testing.

    The file is read anew every epoch; rows, in the order of the file, are training, then validation, then test rows.

    Args:
        path: the file; one whose name ends in ``.gz`` is decompressed while it is read.
        batch_size: rows per training batch.
        eval_batch_size: rows per validation, test and prediction batch.
        target_column: place of the target in a row, negative counts from the end.
        num_classes: number of classes, whose labels are 0, 1, ...; None for a real-valued target.
        val_rows: number of validation rows, directly before the test rows.
        test_rows: number of test rows, at the end of the file.
        delimiter: the one character between fields.
        header: whether the first line holds names and is left out.
        columns: number of fields of a row; None takes that of the first row.
        dtype: ``"float32"`` or ``"float64"``, type of inputs and real-valued targets.
        feature_mean: subtracted from the features, one per feature; None for nothing.
        feature_std: features are divided by it, one per feature; None for nothing.
        shuffle_buffer: training rows are shuffled within blocks of this many; 0 keeps the order of the file.
        chunk_rows: rows parsed at a time; it changes memory and speed only.
        drop_last: whether a last training batch that is not full is left out.
        count_rows: whether the rows are counted in ``setup``, by one cheap pass over the file; without it the train
            loader has no length, and there can be neither validation nor test rows.

    Raises:
        ValueError: if an argument is out of range; in ``setup``, if no training batch would be left.
        FileNotFoundError: in ``setup``, if the file does not exist.
        CSVError: in ``setup`` or when it is read, if a line is malformed; it names file, line and problem.
    """

    def __init__(
        self,
        path: str | Path,
        batch_size: int = 128,
        eval_batch_size: int = 1000,
        target_column: int = 0,
        num_classes: int | None = None,
        val_rows: int = 0,
        test_rows: int = 0,
        delimiter: str = ",",
        header: bool = False,
        columns: int | None = None,
        dtype: Literal["float32", "float64"] = "float32",
        feature_mean: Sequence[float] | None = None,
        feature_std: Sequence[float] | None = None,
        shuffle_buffer: int = 0,
        chunk_rows: int = 10_000,
        drop_last: bool = False,
        count_rows: bool = True,
    ) -> None:
        super().__init__()
        self.path = Path(path)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.target_column = target_column
        self.num_classes = num_classes
        self.val_rows = val_rows
        self.test_rows = test_rows
        self.delimiter = delimiter
        self.header = header
        self.columns = columns
        self.dtype = dtype
        self.feature_mean = feature_mean
        self.feature_std = feature_std
        self.shuffle_buffer = shuffle_buffer
        self.chunk_rows = chunk_rows
        self.drop_last = drop_last
        self.count_rows = count_rows
        self._opened: tuple[CSVFile, RowSchema] | None = None
        self._train_rows: int | None = None
        self._check_settings()

    def _check_settings(self) -> None:
        counts = {
            "batch_size": 1,
            "eval_batch_size": 1,
            "chunk_rows": 1,
            "val_rows": 0,
            "test_rows": 0,
            "shuffle_buffer": 0,
        }
        for name, least in counts.items():
            check_count(name, getattr(self, name), least)
        if self.num_classes is not None:
            check_count("num_classes", self.num_classes, 2, otherwise="None for a real-valued target")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")
        if not self.count_rows and (self.val_rows or self.test_rows):
            raise ValueError(
                f"val_rows={self.val_rows} and test_rows={self.test_rows} are the last rows of the file, which takes "
                "count_rows=True"
            )

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(number of features,); known after ``setup``, or when ``columns`` is given."""
        if self.columns is None:
            raise RuntimeError("the number of features is known after setup(), or when columns is given")
        return (self.columns - 1,)

    def read(self) -> None:
        """Look at the first row and count the rows.

        Raises:
            FileNotFoundError: if the file does not exist.
            CSVError: if it has no rows, or not the expected number of columns.
            ValueError: if no training batch would be left.
        """
        file = CSVFile(self.path, self.delimiter, self.header)
        found = file.count_columns()
        if self.columns is not None and found != self.columns:
            raise CSVError(
                f"{self.path}, line {file.line_of(0)}: {found} fields where {self.columns} are expected; check "
                "delimiter and columns"
            )
        dtype = _DTYPES[self.dtype]
        schema = RowSchema(found, self.target_column, self.num_classes, dtype, self.feature_mean, self.feature_std)
        if self.count_rows:
            self._train_rows = self._remaining_rows(file.count_rows())
        self._opened, self.columns = (file, schema), found

    def make_train_loader(self, shuffle: bool, progress: TrainingProgress | None) -> CSVLoader:
        """Make the loader of training batches."""
        return CSVLoader(
            *self._file_and_schema(),
            self.batch_size,
            rows=self._train_rows,
            shuffle_buffer=self.shuffle_buffer if shuffle else 0,
            drop_last=self.drop_last,
            chunk_rows=self.chunk_rows,
            progress=progress,
        )

    def make_eval_loader(self, part: EvaluationPart) -> CSVLoader | None:
        """Make the loader of validation or test batches, in the order of the file."""
        start, rows = self._train_rows or 0, self.val_rows
        if part == "test":
            start, rows = start + rows, self.test_rows
        if rows == 0:
            return None
        return CSVLoader(
            *self._file_and_schema(), self.eval_batch_size, start=start, rows=rows, chunk_rows=self.chunk_rows
        )

    def _file_and_schema(self) -> tuple[CSVFile, RowSchema]:
        if self._opened is None:
            raise RuntimeError(f"call setup() of {type(self).__name__} before asking for its loaders")
        return self._opened

    def _remaining_rows(self, total: int) -> int:
        remaining = total - self.val_rows - self.test_rows
        least = self.batch_size if self.drop_last else 1
        if remaining < least:
            raise ValueError(
                f"no training batch would be left: {self.path} has {total} rows, val_rows={self.val_rows}, "
                f"test_rows={self.test_rows}, batch_size={self.batch_size}, drop_last={self.drop_last}"
            )
        return remaining


class HiggsDataModule(CSVDataModule):
    """The HIGGS file (11 million rows): label 0 or 1 first, then 28 features; the last 500,000 rows are the test set.

    Args:
        path: the file, plain or ``.gz``.
        batch_size: rows per training batch.
        eval_batch_size: rows per validation, test and prediction batch.
        val_rows: number of validation rows, directly before the test rows.
        test_rows: number of test rows, at the end of the file; to be lowered for smaller files of the same layout.
        dtype: ``"float32"`` or ``"float64"``, type of the inputs.
        feature_mean: subtracted from the features, 28 numbers; None for nothing.
        feature_std: features are divided by it, 28 numbers; None for nothing.
        shuffle_buffer: training rows are shuffled within blocks of this many; 0 keeps the order of the file.
        chunk_rows: rows parsed at a time; it changes memory and speed only.
        drop_last: whether a last training batch that is not full is left out.

    Raises:
        ValueError: see ``CSVDataModule``.
        FileNotFoundError: see ``CSVDataModule``.
        CSVError: see ``CSVDataModule``.
    """

    def __init__(
        self,
        path: str | Path,
        batch_size: int = 200,
        eval_batch_size: int = 10_000,
        val_rows: int = 0,
        test_rows: int = _HIGGS_TEST_ROWS,
        dtype: Literal["float32", "float64"] = "float32",
        feature_mean: Sequence[float] | None = None,
        feature_std: Sequence[float] | None = None,
        shuffle_buffer: int = 0,
        chunk_rows: int = 10_000,
        drop_last: bool = False,
    ) -> None:
        super().__init__(
            path,
            batch_size,
            eval_batch_size,
            num_classes=2,
            val_rows=val_rows,
            test_rows=test_rows,
            columns=_HIGGS_COLUMNS,
            dtype=dtype,
            feature_mean=feature_mean,
            feature_std=feature_std,
            shuffle_buffer=shuffle_buffer,
            chunk_rows=chunk_rows,
            drop_last=drop_last,
        )
