"""The statistics of several processes, summed in one collective."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import distributed

from lightning_altmin.weights.layer_statistics import LayerStatistics


def processes() -> int:
    """Number of processes that train together; 1 without a process group."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def sum_over_ranks(statistics: Sequence[LayerStatistics]) -> None:
    """Make the shares that processes hold the whole again, in all of them; nothing happens where all is whole.

    One flat collective over all layers, of A's upper triangles, B and the number of rows. All processes must call it.
    """
    if processes() == 1 or not any(each.is_share for each in statistics):
        return
    parts = [each.packed() for each in statistics]
    flat = torch.cat(parts)
    distributed.all_reduce(flat)
    start = 0
    for each, part in zip(statistics, parts, strict=True):
        each.unpack(flat[start : start + part.numel()])
        start += part.numel()
