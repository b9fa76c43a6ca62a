"""BatchNorms in a block that only autograd can differentiate, in a batch's phases: of one process, or of several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_altmin.engines import batch_norm_state
from lightning_altmin.engines.batch_norm_state import BatchNorm, Statistics, follow, uses_batch_statistics
from lightning_altmin.engines.shared_samples import SharedSamples


class BlockBatchNorms:
    """A block's BatchNorms, where this process has the whole batch. Each context is for one run of the block."""

    def __init__(self, norms: Sequence[BatchNorm]) -> None:
        self._norms = norms

    def captured(self) -> AbstractContextManager[Statistics]:
        """Encode: batch statistics are recorded, and running ones follow them."""
        return batch_norm_state.captured(self._norms)

    def held(self, statistics: Statistics) -> AbstractContextManager[None]:
        """The code step: every BatchNorm is the fixed affine map of these statistics."""
        return batch_norm_state.held(self._norms, statistics)

    def live(self) -> AbstractContextManager[None]:
        """The weight step: batch statistics are found anew, running ones left alone."""
        return batch_norm_state.untracked(self._norms)

    def size(self, values: Tensor) -> Tensor:
        """The norm of ``values`` over all samples of the batch, shape ``(1,)``."""
        return torch.linalg.vector_norm(values).reshape(1)


class SharedBlockBatchNorms(BlockBatchNorms):
    """The same where other processes have the rest of the batch: an exchange for each BatchNorm and way through it.

    Autograd goes back in the order of the way there, which is the same on all processes.
    """

    def __init__(self, norms: Sequence[BatchNorm], samples: SharedSamples) -> None:
        super().__init__(norms)
        self._samples = samples

    @contextmanager
    def captured(self) -> Iterator[Statistics]:
        statistics: Statistics = {}

        def found(index: int, mean: Tensor, variance: Tensor, count: Tensor) -> None:
            batch_norm_state.refuse_second_use(index, statistics, self._norms[index])
            statistics[index] = mean, variance
            follow(self._norms[index], mean, variance, count)

        with self._normalising(found):
            yield statistics

    def live(self) -> AbstractContextManager[None]:
        return self._normalising(lambda *_: None)

    def size(self, values: Tensor) -> Tensor:
        own = torch.linalg.vector_norm(values).reshape(1).double()  # whose square does not underflow
        return self._samples.total(own.square()).sqrt().to(values.dtype)

    @contextmanager
    def _normalising(self, found: Callable[[int, Tensor, Tensor, Tensor], None]) -> Iterator[None]:
        """Normalise by the samples of all processes where the batch's own statistics are used, and tell these."""
        replaced = [(index, norm) for index, norm in enumerate(self._norms) if uses_batch_statistics(norm)]

        def forward_of(index: int, norm: Any) -> Callable[[Tensor], Tensor]:
            def forward(x: Tensor) -> Tensor:
                norm._check_input_dim(x)
                normalised, *statistics = _Normalised.apply(x, norm.eps, self._samples)
                found(index, *statistics)
                return _affine(norm, normalised)

            return forward

        before = [(norm, norm.__dict__.get("forward")) for _, norm in replaced]
        try:
            for index, norm in replaced:
                norm.__dict__["forward"] = forward_of(index, norm)
            yield
        finally:
            for norm, forward in before:
                del norm.__dict__["forward"]
                if forward is not None:
                    norm.__dict__["forward"] = forward


def _affine(norm: BatchNorm, normalised: Tensor) -> Tensor:
    shape = [1, -1, *[1] * (normalised.dim() - 2)]
    if norm.weight is None:
        return normalised
    return normalised * norm.weight.view(shape) + norm.bias.view(shape)


class _Normalised(torch.autograd.Function):
    """``(x - mean) / deviation`` with mean, biased variance and number of values, over the samples of all processes.

    Its gradient is that of the sum over all processes of what they make of it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, samples: SharedSamples) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, variance, count = samples.moments(x)
        shape = [1, -1, *[1] * (x.dim() - 2)]
        inverse_deviation = (variance + eps).rsqrt().view(shape)
        normalised = (x - mean.view(shape)) * inverse_deviation
        ctx.save_for_backward(normalised, inverse_deviation)
        ctx.samples = samples
        ctx.mark_non_differentiable(mean, variance, count)
        return normalised, mean, variance, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        grad = gradients[0]
        normalised, inverse_deviation = ctx.saved_tensors
        mean, product = (m.view(inverse_deviation.shape) for m in ctx.samples.means(grad, grad * normalised))
        return (grad - mean - normalised * product) * inverse_deviation, None, None
