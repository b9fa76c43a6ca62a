"""Every code block of README and documentation does what the page says.

Python is run, YAML goes through the CLI, ``bash`` is the business of ``test_commands.py``, and nothing else is let by.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning

from lightning_altmin import AltMin, AltMinModule, BackpropModule
from lightning_altmin.cli import AltMinCLI
from lightning_altmin.engines import ClosedFormEngine
from tests.distributed.gloo import launch
from tests.docs.markdown import ROOT, Block, blocks, pages

WITH_PYTHON = [page for page in pages() if any(block.language == "python" for block in blocks(page))]
PROCESSES = {"devices.md": 2}  # pages whose blocks run as under torchrun
CONFIGURATIONS = [block for page in pages() for block in blocks(page) if block.language == "yaml"]
TESTED = {"python", "yaml", "bash"}
SPHINX = {"{eval-rst}", "{toctree}", "{include}"}  # directives, which `sphinx-build -W` reads
# Page and first line of every block that no test runs, with the reason.
EXCEPTIONS = {
    ("README.md", "lightning_altmin/"): "a tree of files; test_the_tree_of_files looks for them",
    ("docs/devices.md", "#!/bin/bash"): "a SLURM batch file, which needs a cluster",
}
_CODE_DIRECTIVE = re.compile(r"\.\. (code|code-block|sourcecode|literalinclude|doctest|testcode)::")
_FENCE_LIKE = re.compile(r"^[\s>]*(```|~~~|:::)", re.MULTILINE)


def printed_output(page_blocks: list[Block], index: int) -> str | None:
    """The ``text`` block directly after a Python block is what that block prints."""
    after = page_blocks[index + 1] if index + 1 < len(page_blocks) else None
    return after.code.rstrip() if after is not None and after.language == "text" and after.follows else None


@pytest.fixture
def _calm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run in an empty folder, without the Trainer's advice on small loaders, and forget rules that a page registers."""
    monkeypatch.chdir(tmp_path)
    rules = sys.modules[ClosedFormEngine.__module__]
    monkeypatch.setattr(rules, "_RULES", dict(vars(rules)["_RULES"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)
        yield


def test_the_pages_are_found() -> None:
    """Catches a pattern that no longer finds blocks, with which every other test here would pass on nothing."""
    names = {page.name for page in WITH_PYTHON}
    assert {"algorithm.md", "splitting.md", "trainer.md", "extending.md", "data.md", *PROCESSES} <= names
    assert len(CONFIGURATIONS) >= 4


def run_blocks(page: Path) -> None:
    """Run the Python blocks of a page in one namespace and in order, as a reader would type them."""
    page_blocks, namespace = blocks(page), {"__name__": "documentation"}
    for index, block in enumerate(page_blocks):
        if block.language != "python":
            continue
        output = io.StringIO()
        # Blank lines in front: errors then show the page's own line numbers.
        code = compile("\n" * (block.line - 1) + block.code, block.page, "exec")
        with contextlib.redirect_stdout(output):
            exec(code, namespace)
        shown = printed_output(page_blocks, index)
        if shown is not None:
            assert output.getvalue().rstrip() == shown, f"{block.page}, line {block.line}: other output"


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
@pytest.mark.usefixtures("_calm")
def test_python_blocks_run(page: Path) -> None:
    """Catches a page whose code raises, whose assertions fail, or whose printed output is not what it shows."""
    if page.name in PROCESSES:
        launch(PROCESSES[page.name], lambda rank: run_blocks(page))
    else:
        run_blocks(page)


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_every_block_is_run_or_excused(page: Path) -> None:
    """Catches a block in a language that no test runs, Python labelled ``text``, and a fence that no test sees."""
    page_blocks = blocks(page)
    for index, block in enumerate(page_blocks):
        place, first = f"{block.page}, line {block.line}", block.code.splitlines()[:1]
        if block.language in TESTED or (block.page, *first) in EXCEPTIONS:
            continue
        if block.language == "text":
            is_output = block.follows and page_blocks[index - 1].language == "python"
            assert is_output, f"{place}: text that is no Python block's output"
            continue
        assert block.language.split(" ")[0] in SPHINX, f"{place}: no test runs {block.language!r}"
        assert not _CODE_DIRECTIVE.search(block.code), f"{place}: code inside of a directive"
    fences = len(_FENCE_LIKE.findall(page.read_text(encoding="utf-8")))
    assert fences == 2 * len(page_blocks), f"{page.name}: a fence that is indented or not of three backticks"


def test_every_excuse_is_needed() -> None:
    """Catches an exception whose block is gone, which would excuse the next one that begins like it."""
    found = {(block.page, *block.code.splitlines()[:1]) for page in pages() for block in blocks(page)}
    assert set(EXCEPTIONS) <= found


def test_the_tree_of_files() -> None:
    """Catches a file of README's tree that was renamed."""
    (tree,) = (block.code for block in blocks(ROOT / "README.md") if block.code.startswith("lightning_altmin/\n"))
    names = re.findall(r"\w+(?:/|\.py)", tree)
    assert len(names) > 20
    assert [
        name for name in names if not any((ROOT / "lightning_altmin" / up / name).exists() for up in ("", ".."))
    ] == []


@pytest.mark.parametrize("block", CONFIGURATIONS, ids=lambda block: f"{block.page}:{block.line}")
@pytest.mark.usefixtures("_calm")
def test_yaml_blocks_are_accepted_by_the_command_line(block: Block, tmp_path: Path) -> None:
    """Catches a configuration with a wrong argument or class path, or one whose optimizers cannot be made."""
    (tmp_path / "run.yaml").write_text(block.code)
    quiet = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_checkpointing=false"]
    if not block.code.startswith(("seed_everything", "model")):
        pytest.fail(f"{block.page}, line {block.line}: a block with a model must be a whole configuration")
    rest = [] if "\ndata:" in block.code else ["--data=lightning_altmin.data.DigitsDataModule"]
    cli = AltMinCLI(["--config", "run.yaml", *rest, *quiet], run=False)
    if isinstance(cli.model, AltMinModule):
        assert isinstance(cli.model.core, AltMin)
        optimizer = cli.model.core.make_optimizer()
    else:
        assert isinstance(cli.model, BackpropModule)
        optimizer = cli.model.configure_optimizers()
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    assert trained == {p for p in cli.model.network.parameters() if p.requires_grad}
    assert cli.model.network(torch.zeros(2, *cli.datamodule.input_shape)).shape == (2, 10)
