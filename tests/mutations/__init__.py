"""The deliberate mistakes that `tests/mutants.py` plants, and the tests that must catch each."""

from tests.mutations import algorithm, around, parts
from tests.mutations.mutant import Mutant

__all__ = ["MUTANTS", "Mutant"]

MUTANTS = (*algorithm.MUTANTS, *parts.MUTANTS, *around.MUTANTS)
