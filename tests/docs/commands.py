"""The commands of ``bash`` blocks, checked as far as can be without doing their work.

A command is refused as the shell or its own parser would refuse it; what follows the parser is not run.
"""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from configparser import ConfigParser
from pathlib import Path
from typing import Any, NoReturn

import pytest

from lightning_altmin.cli import AltMinCLI, main
from tests.docs.markdown import ROOT

SEPARATORS = {"&&", ";"}
EXAMPLES = ROOT / "examples"
Words = list[str]


class CommandError(AssertionError):
    """A command that does not work as it stands."""


def commands(code: str) -> list[Words]:
    """The words of every command of a block.

    Raises:
        CommandError: If the shell would take a part for something else, as a placeholder in ``<>`` without quotes.
    """
    found: list[Words] = []
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        command: Words = []
        for word in lexer:
            if word in SEPARATORS:
                found.append(command)
                command = []
            elif set(word) <= set("();<>|&"):
                raise CommandError(f"{line!r}: the shell takes {word!r} for its own")
            else:
                command.append(word)
        found.append(command)
    return [command for command in found if command]


def check(command: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    """See that a command would start.

    Raises:
        CommandError: If the program is unknown here, a file it names is missing, or its parser refuses an argument.
    """
    program, *words = command
    if program not in _CHECKS:
        raise CommandError(f"{program!r} has no check: add one to {Path(__file__).name}")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        try:
            _CHECKS[program](words, patch)
        except SystemExit as end:  # 0: --print_config and --help do what they say
            if end.code:
                raise CommandError(f"{shlex.join(command)}: exit status {end.code}") from end


def _lightning_altmin(words: Words, patch: pytest.MonkeyPatch) -> None:
    """The command line up to the Trainer's method: model, data and Trainer are made. ``report`` makes its page."""
    patch.setattr(AltMinCLI, "_run_subcommand", lambda *_: None)
    main(words)


def _python(words: Words, patch: pytest.MonkeyPatch) -> None:
    if words[:1] == ["-c"]:
        exec(compile(words[1], "<python -c>", "exec"), {"__name__": "__main__"})
    elif words[:1] == ["-m"]:
        _module(words[1:], patch)
    else:
        _script(words, patch)


def _module(words: Words, patch: pytest.MonkeyPatch) -> None:
    if words[:1] != ["lightning_altmin"]:
        raise CommandError(f"python -m {words[0]} has no check")
    _lightning_altmin(words[1:], patch)


class _Parsed(BaseException):
    """The script's arguments were accepted."""


def _script(words: Words, patch: pytest.MonkeyPatch) -> None:
    """A script up to the end of its ``parse_args``."""
    path = Path(words[0])
    if not path.is_file():
        raise CommandError(f"there is no script {words[0]}")
    if "parse_args(" not in path.read_text(encoding="utf-8"):
        if words[1:]:
            raise CommandError(f"{words[0]} takes no arguments, got {words[1:]}")
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> NoReturn:
        parse(parser, *args, **kwargs)
        raise _Parsed

    patch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    patch.setattr(sys, "argv", words)
    patch.syspath_prepend(path.resolve().parent)
    _forget_examples()  # scripts of two folders may have a name in common
    try:
        runpy.run_path(words[0], run_name="__main__")
    except _Parsed:
        return
    finally:
        _forget_examples()
    raise CommandError(f"{words[0]} ended before it parsed its arguments")


def _forget_examples() -> None:
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file is not None and EXAMPLES in Path(file).resolve().parents:
            del sys.modules[name]


def _torchrun(words: Words, patch: pytest.MonkeyPatch) -> None:
    from torch.distributed.run import get_args_parser

    given = get_args_parser().parse_args(words)
    run = _module if given.module else _script
    run([given.training_script, *given.training_script_args], patch)


def _pytest(words: Words, patch: pytest.MonkeyPatch) -> None:
    for path in (word.split("::")[0] for word in words if not word.startswith("-")):
        if not Path(path).exists():
            raise CommandError(f"there are no tests {path}")


def _pip(words: Words, patch: pytest.MonkeyPatch) -> None:
    """``pip install -e ".[extras]"``: the extras are those of the package."""
    wanted = re.fullmatch(r"\.(?:\[(?P<extras>[\w,]+)\])?", words[-1])
    if words[:2] != ["install", "-e"] or len(words) != 3 or wanted is None:
        raise CommandError(f"pip {shlex.join(words)} has no check")
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    missing = set((wanted["extras"] or "").split(",")) - {"", *setup["options.extras_require"]}
    if missing:
        raise CommandError(f"setup.cfg has no extras {sorted(missing)}")


_CHECKS: dict[str, Callable[[Words, pytest.MonkeyPatch], None]] = {
    "lightning-altmin": _lightning_altmin,
    "pip": _pip,
    "pytest": _pytest,
    "python": _python,
    "torchrun": _torchrun,
}
