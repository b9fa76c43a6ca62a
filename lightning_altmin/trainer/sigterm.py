"""SIGTERM among several processes: all end soon, whichever of them is asked to and whenever."""

from __future__ import annotations

import signal
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.connectors.signal_connector import _HandlersCompose


def end_together_on_sigterm(trainer: Trainer) -> None:
    """Let Lightning's handler of SIGTERM take a note and exchange nothing.

    Lightning's broadcasts from inside the handler. No other process expects that: all exchanges after it are off by
    one, and where the next one is not of the same kind, as at the end of an epoch, all wait for the process group's
    timeout. The note is enough. The first process's is broadcast before each batch, and a process that ends by itself
    closes its connections, which the others notice.

    Call it after Lightning has set its handlers, so in ``on_train_start``; it puts back those before it after the run.
    """
    handler = signal.getsignal(signal.SIGTERM)
    if trainer.world_size == 1 or not isinstance(handler, _HandlersCompose):
        return
    connector: Any = trainer._signal_connector

    def note(number: int, frame: Any) -> None:
        launcher: Any = trainer.strategy.launcher
        if not connector.received_sigterm and launcher is not None:
            launcher.kill(number)  # pass it on to the processes that this one has started
        connector.received_sigterm = True

    lightnings = connector._sigterm_notifier_fn
    handler.signal_handlers = [note if each == lightnings else each for each in handler.signal_handlers]
