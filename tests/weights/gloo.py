"""One function in several processes that talk over gloo."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch import multiprocessing as processes


def run(function: Callable[..., Any], count: int, *arguments: Any) -> list[Any]:
    """What ``function(rank, *arguments)`` returns in each of ``count`` processes."""
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(_enter, (count, folder, function, arguments), nprocs=count)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _enter(rank: int, count: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count)
    try:
        torch.save(function(rank, *arguments), Path(folder) / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()
