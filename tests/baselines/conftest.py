"""Which warnings of Lightning are meant by the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Many tests train without validation data on purpose; Lightning points that out."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no"))
