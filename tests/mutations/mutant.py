"""One deliberate mistake."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One mistake.

    Attributes:
        name: What is wrong.
        file: Path below the package.
        old: Text that occurs exactly once in it.
        new: What it is replaced by.
        tests: What must fail, as pytest knows it, below ``tests/``.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def planted(self, text: str) -> str:
        """The file's text with the mistake.

        Raises:
            ValueError: If ``old`` does not occur exactly once.
        """
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"mutant {self.name!r}: its text occurs {count} times in {self.file}: {self.old!r}")
        return text.replace(self.old, self.new)
