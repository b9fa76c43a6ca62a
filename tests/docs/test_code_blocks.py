"""Every code block of README and documentation does what the page says: Python is run, YAML goes through the CLI."""

from __future__ import annotations

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
from tests.docs.markdown import Block, blocks, pages

WITH_PYTHON = [page for page in pages() if any(block.language == "python" for block in blocks(page))]
CONFIGURATIONS = [
    block for page in pages() for block in blocks(page) if block.language == "yaml" and "model:" in block.code
]


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
    assert {"algorithm.md", "splitting.md", "trainer.md", "extending.md", "data.md"} <= names
    assert len(CONFIGURATIONS) >= 3


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
@pytest.mark.usefixtures("_calm")
def test_python_blocks_run(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a page whose code raises, whose assertions fail, or whose printed output is not what it shows.

    The blocks of a page share one namespace and run in order, as a reader would type them.
    """
    page_blocks, namespace = blocks(page), {"__name__": "documentation"}
    ran = 0
    for index, block in enumerate(page_blocks):
        if block.language != "python":
            continue
        capsys.readouterr()
        # Blank lines in front: errors then show the page's own line numbers.
        exec(compile("\n" * (block.line - 1) + block.code, block.page, "exec"), namespace)
        shown = printed_output(page_blocks, index)
        if shown is not None:
            assert capsys.readouterr().out.rstrip() == shown, f"{block.page}, line {block.line}: other output"
        ran += 1
    assert ran > 0


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
