"""The error of a process whose neighbours have ended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning_altmin.processes import ProcessLostError


@contextmanager
def lost_processes_named(batch: int) -> Iterator[None]:
    """Say in one sentence what a failed exchange means; the library's own error stays attached.

    Raises:
        ProcessLostError: If the exchange inside this context fails.
    """
    try:
        yield
    except RuntimeError as error:
        raise ProcessLostError(
            f"another process has ended, or has not answered in time, in batch {batch} (counted from 0 since training "
            "began); its own output says why. Nothing of this batch was applied here. Start all processes again from "
            f"the last checkpoint. The library says: {error}"
        ) from error
