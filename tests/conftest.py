"""Shared by all tests: one thread, a fixed seed, small helpers to build problems."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import seed_everything


def pytest_configure(config: pytest.Config) -> None:
    """Single-threaded, so that tests can run beside other work and results do not depend on the machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    seed_everything(0, verbose=False)
