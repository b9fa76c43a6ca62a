"""Data the tests of this folder share."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def mnist_root() -> Path:
    """Folder that holds torchvision's MNIST files; the test is skipped where there is none."""
    repository = Path(__file__).parents[2]
    candidates = [repository.parent / "shared" / "data", repository / "data"]
    if named := os.environ.get("LIGHTNING_ALTMIN_MNIST_ROOT"):
        candidates.insert(0, Path(named))
    for root in candidates:
        if (root / "MNIST" / "raw" / "train-images-idx3-ubyte").is_file():
            return root
    pytest.skip("MNIST is not on this machine; name its folder in LIGHTNING_ALTMIN_MNIST_ROOT")
