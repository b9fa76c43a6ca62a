"""What several processes do with a batch between its gradients and the optimizer step: on one process, nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lightning_altmin.engines import Gradients, SharedSamples

if TYPE_CHECKING:
    from lightning_altmin.altmin import AltMin
    from lightning_altmin.step import Step


class ProcessLostError(RuntimeError):
    """Another process has ended or does not answer; this one cannot go on."""


class Processes:
    """One process, which sees every sample of a batch itself; the base of those that share a batch.

    Strategies subclass it; the algorithm asks it once per weight step and knows nothing else of other processes.
    """

    @property
    def count(self) -> int:
        """Number of processes that share a batch."""
        return 1

    @property
    def samples(self) -> SharedSamples | None:
        """Whose samples BatchNorms take their batch statistics from; ``None`` for those of this process alone."""
        return None

    def begin(self, core: AltMin) -> None:
        """Called before each batch is encoded: the first moment to compare what the processes are about to train."""
        return

    def sum(self, vector: Tensor) -> Tensor:
        """The sum over these processes; all of them must ask for it."""
        return vector

    def share(
        self, core: AltMin, step: Step, gradients: Gradients, bad: Tensor, first: bool
    ) -> tuple[Gradients, Tensor]:
        """Gradients and verdict of the whole batch, from those of the samples that this process has seen.

        Args:
            core: The model; what it has measured in this batch is shared as well.
            step: The batch on this process; its loss becomes that of the whole batch.
            gradients: Every trainable parameter with its gradient, a mean over this process's samples.
            bad: Whether the samples here are bad, a bool scalar that is not looked at.
            first: Whether this is the batch's first weight step, where measurements are shared too.
        """
        if first:
            core.weights.learn(core.weights.measured())
            if step.measures:
                core.codes.learn(core.codes.measured())
        return gradients, bad
