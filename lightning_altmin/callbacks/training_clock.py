"""A stopwatch for training, which validation does not run on."""

from __future__ import annotations

import time

import torch


class TrainingClock:
    """Seconds spent between `start` and `stop`, pauses excluded; can begin from the seconds of an earlier run.

    Args:
        device: Device that trains; it is waited for when the clock stops or pauses, so that queued work counts.
        seconds: Seconds already spent.
    """

    def __init__(self, device: torch.device, seconds: float = 0.0) -> None:
        self._device = device
        self._spent = seconds
        self._since: float | None = None
        self._paused = False

    def start(self) -> None:
        """Begin, or go on after a pause."""
        self._since, self._paused = time.perf_counter(), False

    def pause(self) -> None:
        """Hold, until `resume`; nothing happens to a clock that is not running."""
        if self._since is not None:
            self.stop()
            self._paused = True

    def resume(self) -> None:
        """Go on, if the clock was paused."""
        if self._paused:
            self.start()

    def stop(self) -> None:
        """Stop."""
        if self._since is not None:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self._spent, self._since = self.seconds, None

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return self._spent + (0.0 if self._since is None else time.perf_counter() - self._since)
