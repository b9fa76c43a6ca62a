"""Dependencies point one way: core <- module <- callbacks, strategies, streams, commands; the core is plain torch."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_altmin"
CORE = {
    *("__about__", "altmin", "arguments", "codes", "compiled", "engines", "guard", "losses", "margins", "network"),
    *("nn", "objective", "optim", "parallel", "processes", "random_state", "recurrent", "stage", "step"),
    *("traced_block", "tracing", "verification", "weights", "optional_imports"),
}
MODULE = CORE | {"baselines", "metrics", "module", "sequence_classifier", "supervised", "trainer"}


def imported(unit: str) -> set[str]:
    """What the files of a module or package of ours import: names of ours, and ``lightning`` itself."""
    files = (PACKAGE / unit).rglob("*.py") if (PACKAGE / unit).is_dir() else [PACKAGE / f"{unit}.py"]
    found = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in names:
                first, *rest = name.split(".")
                if first in ("lightning", "torchmetrics", "pytorch_lightning"):
                    found.add(first)
                elif first == "lightning_altmin":
                    found.add(rest[0] if rest else "lightning_altmin")
    return found


@pytest.mark.parametrize("unit", sorted(CORE))
def test_the_core_knows_neither_lightning_nor_what_is_built_on_it(unit: str) -> None:
    """Catches an import that makes plain torch users install a Trainer, or that closes a circle."""
    assert imported(unit) <= CORE


@pytest.mark.parametrize("unit", sorted(MODULE - CORE))
def test_the_module_knows_no_callback_strategy_or_command_line(unit: str) -> None:
    """Catches a circle that has to be broken by an import inside of a function, or by asking for an attribute."""
    assert imported(unit) <= MODULE | {"lightning", "torchmetrics"}


def test_every_file_has_its_place() -> None:
    """Catches a new file that no rule above looks at: it belongs to the core, the module, or what is built on both."""
    above = {"__init__", "__main__", "callbacks", "cli", "continual", "data", "report", "run_logs", "strategies"}
    units = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert units == MODULE | above
