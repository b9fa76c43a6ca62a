"""Two processes (gloo) measure and learn what one does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.continual.problems import blob_stream
from tests.module.interruption import assert_equal

SCRIPT = Path(__file__).parent / "ddp_run.py"


def run(processes: int, mode: str, folder: Path) -> list[Any]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, str(SCRIPT), str(processes), mode, str(folder)]
    subprocess.run(command, check=True, timeout=180, env=environment)
    return [torch.load(folder / f"{processes}-{mode}-{rank}.pt") for rank in range(processes)]


@pytest.mark.slow
def test_two_processes_give_the_matrix_of_one(tmp_path: Path) -> None:
    """Catches samples read twice or not at all, counts of one process, padded shards, and parameters that part ways.

    Batches are shared out, and a mean of two equal means is the mean: weights agree up to rounding, counts exactly.
    """
    [one] = run(1, "plain", tmp_path)
    first, second = run(2, "plain", tmp_path)
    assert Counter(first["samples"]) + Counter(second["samples"]) == Counter(one["samples"])
    assert_equal(first["weights"], second["weights"])
    for key in ("weights", "fisher", "omega", "moments"):
        torch.testing.assert_close(first[key], one[key], rtol=1e-3, atol=1e-5)
    for result in (first, second):
        assert torch.equal(result["matrix"], one["matrix"])
        assert torch.equal(result["totals"], one["totals"])
        assert_equal(result["trajectory"], one["trajectory"])
        assert torch.equal(result["prequential"], one["prequential"])


@pytest.mark.slow
def test_replay_with_two_processes_and_after_a_resume(tmp_path: Path) -> None:
    """Catches processes that keep the same samples, shares that do not add up, and buffers mixed up by a resume."""
    whole = run(2, "replay", tmp_path)
    stored = [set(result["buffer"][0][:, 0].tolist()) for result in whole]
    assert [result["buffer"][1] for result in whole] == [8, 7]
    assert sum(result["buffer"][2] for result in whole) == sum(len(task.train) for task in blob_stream(per_class=25))
    assert not stored[0] & stored[1]
    for result, own in zip(whole, stored, strict=True):
        assert own <= set(result["samples"])
    for result, again in zip(whole, run(2, "resumed", tmp_path), strict=True):
        again["samples"] = result["samples"][-len(again["samples"]) :] if again["samples"] else None
        result["samples"] = again["samples"]
        assert_equal(result, again)
