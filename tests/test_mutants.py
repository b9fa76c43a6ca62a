"""The mutants themselves: that they can still be planted, before `tests/mutants.py` runs the tests against them."""

from __future__ import annotations

import ast

import pytest

from tests.mutants import PACKAGE, ROOT
from tests.mutations import MUTANTS, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_it_can_be_planted_and_its_tests_exist(mutant: Mutant) -> None:
    """Catches a mutant that the code has moved away from, one that is no Python, and a test that was renamed."""
    text = (ROOT / PACKAGE / mutant.file).read_text(encoding="utf-8")
    planted = mutant.planted(text)
    assert planted != text
    ast.parse(planted)
    assert mutant.tests
    for test in mutant.tests:
        file, _, function = test.partition("::")
        assert f"def {function}(" in (ROOT / "tests" / file).read_text(encoding="utf-8") if function else True


def test_names_tell_them_apart() -> None:
    """Catches two mutants under one name, of which the report would show one."""
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 20


def test_text_that_is_not_there_once_is_an_error() -> None:
    """Catches a mutant that changes nothing, or more than it says, and is then counted as caught or survived."""
    mutant = Mutant("odd", "a.py", "x = 1", "x = 2", ())
    assert mutant.planted("y = 0\nx = 1\n") == "y = 0\nx = 2\n"
    for text in ("y = 0", "x = 1\nx = 1"):
        with pytest.raises(ValueError, match=r"'odd': its text occurs \d times in a.py"):
            mutant.planted(text)
