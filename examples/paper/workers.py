"""Runs of an experiment, in this process or several at a time."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

Run = TypeVar("Run")
Result = TypeVar("Result")


def results(train: Callable[[Run], Result], runs: Sequence[Run], workers: int) -> Iterator[Result]:
    """What each run gives, as it ends.

    Args:
        train: One run. What it has loaded before, the processes share.
        runs: What to train.
        workers: How many processes train; 1 for none but this one.
    """
    if workers == 1:
        yield from map(train, runs)
        return
    # Forked, so that they share what is loaded; nothing may have touched a GPU by now.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        for done in as_completed([pool.submit(train, run) for run in runs]):
            yield done.result()
