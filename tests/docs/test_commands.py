"""Every command of README and documentation starts: its script is there, and its parser takes the arguments."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from lightning_altmin.cli import main
from tests.docs.commands import CommandError, check, commands
from tests.docs.markdown import ROOT, Block, blocks, pages

BASH = [block for page in pages() for block in blocks(page) if block.language == "bash"]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which the first command of the page has been run, for one batch; ``path/to/a.ckpt`` is its end."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("docs", "examples", "tests"):
        (folder / name).symlink_to(ROOT / name)
    short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["lightning-altmin"])
        patch.setattr(sys, "path", list(sys.path))
        main(["fit", "--config", "examples/digits.yaml", "--trainer.callbacks=null", *short, *QUIET])
    (checkpoint,) = folder.rglob("*.ckpt")
    (folder / "path" / "to").mkdir(parents=True)
    shutil.copy(checkpoint, folder / "path" / "to" / "a.ckpt")
    return folder


@pytest.fixture
def _in_the_checkout(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["lightning-altmin"])


@pytest.mark.parametrize("block", BASH, ids=lambda block: f"{block.page}:{block.line}")
@pytest.mark.usefixtures("_in_the_checkout")
def test_commands_are_accepted(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an option, a script, a configuration, a folder of tests or an extra that was renamed or never was."""
    found = commands(block.code)
    assert found
    for command in found:
        check(command, monkeypatch)


@pytest.mark.parametrize(
    "line",
    [
        "lightning-altmin fit --config examples/digits.yaml --trainer.epochs 3",
        "lightning-altmin fit --config examples/digit.yaml",
        "lightning-altmin report",
        "lightning-altmin report lightning_logs --page page.html",
        "python examples/soaks.py",
        "python examples/soak.py --runs many",
        "python examples/continual/benchmark.py split_mnst",
        "python examples/figures.py --rows",
        "python -m lightning_altmin fit --config examples/digits.yaml --model.steps 3",
        "torchrun --nproc-per-nodes 2 examples/fabric.py",
        "torchrun --nproc-per-node 2 examples/fabric.py --epochs two",
        "torchrun --nproc-per-node 2 -m lightning_altmin fit --config examples/digits.yaml --trainer.processes 2",
        "pytest tests/gpus",
        'pip install -e ".[example]"',
        "make docs",
    ],
)
@pytest.mark.usefixtures("_in_the_checkout")
def test_wrong_commands_are_found(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a check that looks at nothing, with which the test above would pass on anything."""
    (command,) = commands(line)
    with pytest.raises(CommandError):
        check(command, monkeypatch)


def test_words_are_those_of_the_shell() -> None:
    """Catches a joined line that is read as two, a comment read as arguments, and a second command left out."""
    block = 'a --b \\\n    "c d"  # e\n\nf && g; h\n'
    assert commands(block) == [["a", "--b", "c d"], ["f"], ["g"], ["h"]]
    with pytest.raises(CommandError, match="the shell takes '<'"):
        commands("lightning-altmin test --ckpt_path <a checkpoint of that run>")
