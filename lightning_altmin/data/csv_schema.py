"""What the fields of a CSV row mean: which one is the target, and how rows become batches."""

from collections.abc import Sequence

import numpy as np
import torch

from lightning_altmin.data.csv_rows import CSVError, CSVFile, Rows
from lightning_altmin.data.resumable_loader import Batch


class RowSchema:
    """Maps rows of numbers to inputs and targets.

    Args:
        columns: number of fields of a row.
        target_column: place of the target, negative counts from the end.
        num_classes: number of classes, whose labels are 0, 1, ...; None for a real-valued target.
        dtype: floating type of the inputs, and of real-valued targets.
        mean: subtracted from the features, one per feature; None for nothing.
        std: the features are divided by it, one positive number per feature; None for nothing.

    Raises:
        ValueError: if ``target_column`` is not a column, there is no column beside it, or ``mean`` or ``std`` do not
            fit the features.
    """

    def __init__(
        self,
        columns: int,
        target_column: int = 0,
        num_classes: int | None = None,
        dtype: torch.dtype = torch.float32,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        if columns < 2:
            raise ValueError(f"rows need a target and at least one feature, but have {columns} field; check delimiter")
        if not -columns <= target_column < columns:
            raise ValueError(f"target_column={target_column} is not one of the {columns} columns")
        self.columns = columns
        self.num_classes = num_classes
        self._target = target_column % columns
        self._features = [column for column in range(columns) if column != self._target]
        self._dtype = dtype
        self._mean = self._per_feature("feature_mean", mean, 0.0)
        self._std = self._per_feature("feature_std", std, 1.0)
        if not bool((self._std > 0).all()):
            raise ValueError(f"every entry of feature_std must be positive, got {std}")
        self._scaled = mean is not None or std is not None

    def check(self, rows: Rows, file: CSVFile, first_row: int) -> None:
        """Check the labels of consecutive rows.

        Raises:
            CSVError: naming the line, if a label is not one of the classes.
        """
        if self.num_classes is None:
            return
        labels = rows[:, self._target]
        # written so that nan, for which every comparison is false, counts as bad
        good = (labels >= 0) & (labels < self.num_classes) & (labels == np.floor(labels))
        if not good.all():
            bad = int(np.argmin(good))
            raise CSVError(
                f"{file.path}, line {file.line_of(first_row + bad)}: the label (field {self._target + 1}) is "
                f"{labels[bad]:g}, not one of 0 to {self.num_classes - 1}; check target_column and num_classes"
            )

    def decode(self, rows: Rows) -> Batch:
        """Make a batch of checked rows.

        Returns:
            Inputs of shape (n, columns - 1) and targets: int64 of shape (n,) for classes, otherwise of shape (n, 1)
            like the output of a network with one output.
        """
        features = rows[:, self._features]
        if self._scaled:
            features = (features - self._mean) / self._std
        x = torch.from_numpy(features).to(self._dtype)
        target = torch.from_numpy(rows[:, self._target].copy())
        return x, target.to(self._dtype)[:, None] if self.num_classes is None else target.long()

    def _per_feature(self, name: str, values: Sequence[float] | None, default: float) -> Rows:
        if values is None:
            return np.full(len(self._features), default)
        if len(values) != len(self._features):
            raise ValueError(f"{name} must have one entry per feature, {len(self._features)} in all, got {len(values)}")
        return np.asarray(values, dtype=np.float64)
