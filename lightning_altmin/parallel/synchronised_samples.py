"""The samples of all processes of a torch.distributed group, for synchronised BatchNorms."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_altmin.engines import SharedSamples
from lightning_altmin.parallel.lost import lost_processes_named


class SynchronisedSamples(SharedSamples):
    """Moments and means over a process group.

    Args:
        group: The processes; all if not given.

    Attributes:
        batch: Number of the batch, for the error of a process that is left alone.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.batch = 0

    def total(self, vector: Tensor) -> Tensor:
        with lost_processes_named(self.batch):
            dist.all_reduce(vector, group=self._group)
        return vector

    def rows(self, vector: Tensor) -> Tensor:
        rows = [torch.empty_like(vector) for _ in range(dist.get_world_size(self._group))]
        with lost_processes_named(self.batch):
            dist.all_gather(rows, vector, group=self._group)
        return torch.stack(rows)
