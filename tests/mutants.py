"""Deliberate mistakes in the package that the tests must catch: each is planted in a copy, and its tests must fail.

    python tests/mutants.py                 # all
    python tests/mutants.py --only anchor   # those whose name holds this
    python tests/mutants.py --list
    python tests/mutants.py --limit 900     # seconds that all may take, 300 if not given

A mutant (`tests/mutations` has them) is one small change of text, and names the tests that are to catch it; only
those are run. The command ends with an error if a mutant survives, if its text no longer occurs exactly once (then
bring it up to date with the code), if a test named fails without any mutant, or if all together take longer than the
limit; what still runs then is ended.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script, the path holds this folder alone
from tests.mutations import MUTANTS, Mutant

ROOT = Path(__file__).parent.parent
PACKAGE = "lightning_altmin"
_CAUGHT, _ALL_PASSED = 1, 0  # pytest's exit codes: tests failed; all passed. Others say that it could not run
_BROKEN = 70
_LATE = 71
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["torch", "lightning.pytorch", "lightning.pytorch.cli", "torchmetrics", "scipy.optimize"]
)


@dataclass(frozen=True)
class Ended:
    """A run of pytest: its exit code, and what it printed."""

    code: int
    output: str


def run_pytest(folder: Path, tests: tuple[str, ...], deadline: float) -> Ended:
    """Run tests against the package in ``folder``, up to the first failure, in a process of its own.

    The process is forked from one that has imported the large libraries, which takes longer than most tests do. At the
    deadline (of ``time.monotonic``) it is ended, with the processes that its tests started.
    """
    if time.monotonic() >= deadline:
        return Ended(_LATE, "")
    process = _SERVER.Process(target=_child, args=(folder, tests))
    process.start()
    process.join(max(0.0, deadline - time.monotonic()))
    if process.exitcode is None:
        assert process.pid is not None  # it was started
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has no group of its own yet, or just ended
            process.kill()
        process.join()
        return Ended(_LATE, "")
    return Ended(process.exitcode, (folder / "output").read_text(encoding="utf-8", errors="replace"))


def _child(folder: Path, tests: tuple[str, ...]) -> None:
    os.setpgid(0, 0)
    output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    os.environ |= {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    sys.path = [str(folder), *(path for path in sys.path if Path(path).resolve() not in (ROOT, ROOT / "tests"))]
    import pytest  # here: pytest rewrites what it has not found imported

    try:
        code = int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests)]))
    except BaseException:  # an exit code of its own: that of an exception would look like a failed test
        traceback.print_exc()
        code = _BROKEN
    sys.stdout.flush()
    sys.exit(code)


def copy_of_the_tree(folder: Path) -> Path:
    """A copy of package and tests; the rest is linked."""
    ignored = shutil.ignore_patterns("__pycache__")
    for name in (PACKAGE, "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "setup.cfg", "README.md", "docs", "examples"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def verdict(mutant: Mutant, deadline: float) -> str | None:
    """What is wrong with the tests, or ``None`` if they catch the mutant."""
    with tempfile.TemporaryDirectory() as name:
        folder = copy_of_the_tree(Path(name))
        path = folder / PACKAGE / mutant.file
        path.write_text(mutant.planted(path.read_text(encoding="utf-8")), encoding="utf-8")
        started = time.monotonic()
        ended = run_pytest(folder, mutant.tests, deadline)
    if ended.code == _CAUGHT:
        print(f"caught    {mutant.name} ({time.monotonic() - started:.0f} s)", flush=True)
        return None
    if ended.code == _LATE:
        return f"OUT OF TIME  {mutant.name}"
    what = "SURVIVED" if ended.code == _ALL_PASSED else "COULD NOT RUN"
    return f"{what}  {mutant.name}: {PACKAGE}/{mutant.file}, {' '.join(mutant.tests)}\n{ended.output[-1500:]}"


def sound(tests: tuple[str, ...], deadline: float) -> str | None:
    """What is wrong with the tests where there is no mutant, or ``None`` if they pass."""
    with tempfile.TemporaryDirectory() as name:
        ended = run_pytest(copy_of_the_tree(Path(name)), tests, deadline)
    if ended.code == _LATE:
        return "OUT OF TIME  the tests without a mutant"
    return None if ended.code == _ALL_PASSED else f"FAILED without a mutant\n{ended.output[-3000:]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutants whose name holds this text")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds that all may take, an error beyond")
    parser.add_argument("--list", action="store_true", help="print their names and run nothing")
    arguments = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if arguments.only in mutant.name]
    if arguments.list:
        print("\n".join(f"{mutant.name}: {mutant.file}, {' '.join(mutant.tests)}" for mutant in chosen))
        return
    if not chosen:
        sys.exit(f"no mutant's name holds {arguments.only!r}")
    started = time.monotonic()
    named = tuple(dict.fromkeys(test for mutant in chosen for test in mutant.tests))
    deadline = started + arguments.limit
    with ThreadPoolExecutor(arguments.workers) as pool:
        healthy = pool.submit(sound, named, deadline)
        problems = pool.map(partial(verdict, deadline=deadline), chosen)
        complaints = [problem for problem in problems if problem is not None]
        if (problem := healthy.result()) is not None:
            complaints.append(problem)
    print("\n".join(complaints))
    late = time.monotonic() >= deadline
    if late:
        print(f"over the limit of {arguments.limit:g} s: on a slow machine raise it with --limit")
    print(f"{len(chosen)} mutants, {len(complaints)} complaints, {time.monotonic() - started:.0f} s")
    sys.exit(late or bool(complaints))


if __name__ == "__main__":
    main()
