"""Tables of a stream's results, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor


def matrix_table(R: Tensor, names: Sequence[str]) -> str:
    """The accuracy matrix in per cent, a row per task trained on and a column per task tested on."""
    head = ["after training on", *names]
    rows = [
        [name, *("-" if value != value else f"{100 * value:.1f}" for value in row)]
        for name, row in zip(names, R.tolist(), strict=True)
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *_right(row[1:], widths[1:])]) for row in [head, *rows])


def summary_table(numbers: Mapping[str, float]) -> str:
    """One number per line, in per cent; what is not defined is a dash."""
    width = max(len(name) for name in numbers)
    values = {name: "-" if value != value else f"{100 * value:.2f}" for name, value in numbers.items()}
    return "\n".join(f"{name.replace('_', ' ').ljust(width)}  {value:>7}" for name, value in values.items())


def _right(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
