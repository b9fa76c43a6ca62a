"""The border between the layers of one process and those of its neighbour: tensors across it, in order."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_altmin.parallel.lost import lost_processes_named

_DIMENSIONS = 7  # a header holds at most as many
_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64)


class Border:
    """Sends and receives tensors; their types and shapes travel ahead of them.

    Args:
        neighbour: Rank in the group of the process on the other side.
        group: The processes; all if not given.
    """

    def __init__(self, neighbour: int, group: dist.ProcessGroup | None) -> None:
        self._peer = neighbour if group is None else dist.get_global_rank(group, neighbour)
        self._group = group
        self.batch = 0
        """Number of the batch, for the error if the neighbour is lost."""
        self._under_way: list[tuple[dist.Work | None, Tensor]] = []

    def send(self, tensor: Tensor) -> None:
        """Send without waiting; the tensor must not be changed before `flush`.

        Raises:
            ProcessLostError: Here and below, if the neighbour has ended or does not answer.
        """
        tensor = tensor.contiguous()
        shape = [_TYPES.index(tensor.dtype), tensor.dim(), *tensor.shape]
        header = torch.tensor(shape + [0] * (_DIMENSIONS + 2 - len(shape)), device=tensor.device)
        with lost_processes_named(self.batch):
            for part in (header, tensor) if tensor.numel() else (header,):
                self._under_way.append((dist.isend(part, self._peer, group=self._group), part))

    def receive(self, device: torch.device) -> Tensor:
        """Wait for the next tensor."""
        header = torch.empty(_DIMENSIONS + 2, dtype=torch.long, device=device)
        with lost_processes_named(self.batch):
            dist.recv(header, self._peer, group=self._group)
            kind, dimensions, *shape = header.tolist()
            tensor = torch.empty(shape[:dimensions], dtype=_TYPES[kind], device=device)
            if tensor.numel():
                dist.recv(tensor, self._peer, group=self._group)
        return tensor

    def flush(self) -> None:
        """Wait until everything sent has left."""
        with lost_processes_named(self.batch):
            for work, _ in self._under_way:
                if work is not None:
                    work.wait()
        self._under_way.clear()
