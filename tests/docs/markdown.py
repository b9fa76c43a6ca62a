"""Fenced code blocks of a Markdown page."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
_FENCE = re.compile(r"^```(?P<language>[^\n`]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page: Path of the page relative to the repository.
        line: Line of the first line of code, counted from 1.
        language: What stands behind the opening fence.
        code: The text inside.
        follows: Whether only blank lines are between this block and the one before it.
    """

    page: str
    line: int
    language: str
    code: str
    follows: bool


def pages() -> list[Path]:
    """README and every page of the documentation."""
    return [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if page.exists()]


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text, found, end = page.read_text(encoding="utf-8"), [], 0
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        follows = bool(found) and not text[end : match.start()].strip()
        found.append(Block(str(page.relative_to(ROOT)), line, match["language"].strip(), match["code"], follows))
        end = match.end()
    return found
