"""A process that is killed with SIGKILL, again and again, ends where one does that was left alone."""

from __future__ import annotations

import math
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.module.interruption import assert_equal

LOOK = 0.002  # seconds from one look at a run to the next
PATIENCE = 300  # seconds of looking without a new batch; the first one waits for imports


def start(kind: str, folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "tests.continual.killed_run", kind, str(folder)])


def trained(folder: Path) -> int:
    path = folder / "batches"
    return path.stat().st_size if path.exists() else 0


def follow(process: subprocess.Popen[bytes], folder: Path, goal: float = math.inf) -> None:
    """Wait until so many batches were trained, or the process has ended.

    What is counted are looks since the newest batch, and not the clock: on a loaded machine, or one that stood still
    with both processes on it, a run may take as long as it likes, and one that hangs is still found.
    """
    seen, looks = trained(folder), 0
    while process.poll() is None and trained(folder) < goal:
        looks = looks + 1 if trained(folder) == seen else 0
        seen = trained(folder)
        if looks > PATIENCE / LOOK:
            process.kill()
            pytest.fail(f"the run makes no progress after {seen} batches")
        time.sleep(LOOK)


def kill_after(process: subprocess.Popen[bytes], folder: Path, batches: int, delay: float) -> None:
    """Kill the process some time after a number of batches, wherever in the next one it then is."""
    follow(process, folder, trained(folder) + batches)
    assert process.poll() is None, "the run ended before it could be killed"
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["backprop", "memory"])
def test_a_killed_stream_ends_as_if_nothing_had_happened(kind: str, tmp_path: Path) -> None:
    """Catches any state that checkpoints leave out, half-written checkpoints, and steps repeated or lost.

    Parameters, optimizer, memories, buffers, importances, matrices and trajectories must agree to the bit. Batches that
    were trained after the last checkpoint are trained again: how many were is not compared.
    """
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    undisturbed = start(kind, whole)
    draws = random.Random(kind)
    for batches in (2, 4, 7):
        kill_after(start(kind, killed), killed, batches, draws.uniform(0, 0.06))
        assert not (killed / "final.pt").exists()
    last = start(kind, killed)
    for process, folder in ((last, killed), (undisturbed, whole)):
        follow(process, folder)
        assert process.returncode == 0
    expected, got = (torch.load(folder / "final.pt", weights_only=False) for folder in (whole, killed))
    assert expected["matrix"].isfinite().all()
    torch.testing.assert_close(expected.pop("matrix"), got.pop("matrix"), rtol=0, atol=0)
    assert_equal(expected, got)
