"""Real processes for tests: forked from the test's own, joined by gloo, each returning a result or its error."""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 60.0
GRACE = 2.0


class ProcessError(AssertionError):
    """A process failed; the message holds its traceback."""


def launch(world: int, function: Callable[..., Any], *args: Any, seconds: float = SECONDS) -> list[Any]:
    """Results of ``function(rank, *args)`` on ``world`` processes that see the environment torchrun would give them.

    Raises:
        ProcessError: If one of them raises, dies or takes longer.
    """
    with tempfile.TemporaryDirectory() as folder:
        workers = start(world, function, args, Path(folder))
        deadline = time.monotonic() + seconds
        while any(worker.is_alive() for worker in workers) and time.monotonic() < deadline:
            if any(worker.exitcode for worker in workers):  # the others may wait for it for long
                deadline = min(deadline, time.monotonic() + GRACE)
            time.sleep(0.02)
        late = [rank for rank, worker in enumerate(workers) if worker.is_alive()]
        for rank in late:
            workers[rank].kill()
            workers[rank].join()
        errors = [path.read_text() for path in sorted(Path(folder).glob("error*"))]
        outputs = [path.read_text()[-2000:] for path in sorted(Path(folder).glob("output*"))]
        if late or errors or any(worker.exitcode for worker in workers):
            codes = [worker.exitcode for worker in workers]
            raise ProcessError(f"late: {late}, exit codes: {codes}\n" + "\n".join(errors + outputs))
        return [torch.load(Path(folder) / f"result{rank}", weights_only=False) for rank in range(world)]


def start(world: int, function: Callable[..., Any], args: tuple[Any, ...], folder: Path) -> list[Any]:
    """The running processes; each leaves ``result<rank>`` or ``error<rank>`` in the folder."""
    port = _free_port()
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=_work, args=(r, world, port, function, args, folder)) for r in range(world)]
    for worker in workers:
        worker.start()
    return workers


def join_gloo(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function for `launch` that is run inside a process group."""

    def joined(rank: int, *args: Any) -> Any:
        dist.init_process_group("gloo", timeout=timedelta(seconds=SECONDS))
        try:
            return function(rank, *args)
        finally:
            dist.destroy_process_group()

    return joined


def _work(rank: int, world: int, port: int, function: Callable[..., Any], args: Any, folder: Path) -> None:
    torch.set_num_threads(1)
    with (folder / f"output{rank}").open("w") as output:  # a process that is left behind must not hold a pipe open
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": 0}
    os.environ.update({name: str(value) for name, value in environment.items()})
    try:
        torch.save(function(rank, *args), folder / f"result{rank}")
    except BaseException:
        (folder / f"error{rank}").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
