"""The examples in the docstrings of the package."""

from __future__ import annotations

import doctest
import importlib
import io
import pkgutil
from pathlib import Path

import lightning_altmin


def test_examples_print_what_they_show() -> None:
    """Catches an example in a docstring that raises or prints something else, and one that the finder passes over."""
    runner, output = doctest.DocTestRunner(verbose=False), io.StringIO()
    finder, written = doctest.DocTestFinder(exclude_empty=True), 0
    for found in pkgutil.walk_packages(lightning_altmin.__path__, "lightning_altmin."):
        module = importlib.import_module(found.name)
        assert module.__file__ is not None
        written += Path(module.__file__).read_text(encoding="utf-8").count(">>> ")
        for test in finder.find(module):
            runner.run(test, out=output.write)
    assert runner.failures == 0, output.getvalue()
    assert runner.tries == written > 0
