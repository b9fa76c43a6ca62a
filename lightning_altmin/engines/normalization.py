"""BatchNorm in closed form.

A fixed affine map in the code step, differentiated through its statistics in the weight step; its running statistics
are updated once per batch, in encode. Where BatchNorms are synchronised, statistics and the means in their derivatives
are those of the samples of all processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_altmin.engines.base import Gradients
from lightning_altmin.engines.batch_norm_state import count_batch, follow, uses_batch_statistics
from lightning_altmin.engines.closed_form import closed_form
from lightning_altmin.engines.rule import Point, Rule
from lightning_altmin.engines.shared_samples import SharedSamples, others


@dataclass
class _Statistics:
    """Mean and ``1 / sqrt(var + eps)`` per channel, as encode found them.

    ``input`` is what encode saw, where the statistics are the batch's own; ``None`` where they are the running ones.
    Not a NamedTuple: torch 2.8 cannot trace a property of one.
    """

    mean: Tensor
    inverse_deviation: Tensor
    input: Tensor | None

    @property
    def from_batch(self) -> bool:
        return self.input is not None


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.view(1, -1, *([1] * (like.dim() - 2)))


@closed_form(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
class FixedBatchNormRule(Rule):
    """``y = (x - mean) / deviation * weight + bias`` with the statistics that encode found for this batch."""

    reads_base = False

    def encode(self, x: Tensor) -> tuple[Tensor, Any]:
        norm = self.module
        from_batch = uses_batch_statistics(norm)
        if not from_batch:
            return norm(x), _Statistics(norm.running_mean, (norm.running_var + norm.eps).rsqrt(), None)
        norm._check_input_dim(x)
        _refuse_single_value(x)
        momentum = count_batch(norm)
        running_mean, running_var = (None, None) if momentum is None else (norm.running_mean, norm.running_var)
        y, mean, inverse_deviation = torch.native_batch_norm(
            x, norm.weight, norm.bias, running_mean, running_var, True, momentum or 0.0, norm.eps
        )
        return y, _Statistics(mean, inverse_deviation, x)

    def joined(self, states: Sequence[Any]) -> Any:
        if len(states) > 1 and states[0].from_batch:
            raise ValueError("a BatchNorm in training mode normalises by the whole batch, which was encoded in parts")
        return states[0]

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        scale, shift = self._affine(state)
        return torch.addcmul(_per_channel(shift, x), x, _per_channel(scale, x)), None

    def change(self, difference: Tensor, base: Point, here: Point) -> Tensor:
        return difference * _per_channel(self._affine(here.state)[0], difference)

    def input_gradient(self, grad: Tensor, at: Point) -> Tensor:
        return grad * _per_channel(self._affine(at.state)[0], grad)

    def parameter_gradients(self, grad: Tensor, at: Point) -> Gradients:
        raise TypeError("parameters are trained with live statistics; this rule only serves the code step")

    def live(self) -> Rule:
        return LiveBatchNormRule(self.module)

    def shared(self, samples: SharedSamples | None) -> Rule:
        return FixedBatchNormRule(self.module) if samples is None else SharedFixedBatchNormRule(self.module, samples)

    def _affine(self, state: _Statistics) -> tuple[Tensor, Tensor]:
        norm = self.module
        scale = state.inverse_deviation if norm.weight is None else norm.weight * state.inverse_deviation
        shift = -state.mean * scale if norm.bias is None else norm.bias - state.mean * scale
        return scale, shift


class LiveBatchNormRule(Rule):
    """BatchNorm with the statistics of the input at hand; running statistics are not touched."""

    reads_base = False

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        norm = self.module
        if not state.from_batch:
            return FixedBatchNormRule(norm).forward(x, state)[0], (state.mean, state.inverse_deviation)
        y, mean, inverse_deviation = torch.native_batch_norm(x, norm.weight, norm.bias, None, None, True, 0.0, norm.eps)
        return y, (mean, inverse_deviation)

    def change(self, difference: Tensor, base: Point, here: Point) -> Tensor:
        """Of ``(x - m) r``, with ``r`` the inverse deviation, for ``x -> x + d``.

        With ``e = d - mean(d)`` it is ``e r' + (x - m)(r' - r)``, and ``r' - r`` follows from the change of the
        variance, ``mean(e (2 (x - m) + e)) = mean(d (2 (x - m) + e))``. One tensor of their size serves all of it. The
        moved input and its statistics are then known, too, so nobody has to run the layers below again.
        """
        state = here.state
        if not state.from_batch:
            return FixedBatchNormRule(self.module).change(difference, base, here)
        weight, x, before = self.module.weight, state.input, state.inverse_deviation
        mean = self._mean(difference)
        scratch = torch.add(difference, x, alpha=2).sub_(_per_channel(mean + 2 * state.mean, x))
        rounding = self._mean(scratch) * mean  # zero but for rounding, which a common part of the moves would lengthen
        variance_change = self._mean(scratch.mul_(difference)) - rounding
        del scratch  # whose memory is next
        variance = before.pow(-2)  # with eps
        after = (variance + variance_change).rsqrt()
        growth = -variance_change * before * after / (before.reciprocal() + after.reciprocal())
        here.knows(x + difference, (state.mean + mean, after))
        if weight is not None:
            after, growth = after * weight, growth * weight
        shift = -(mean * after + state.mean * growth)
        after, growth, shift = (_per_channel(values, x) for values in (after, growth, shift))
        return torch.addcmul(shift, difference, after).addcmul_(x, growth)

    def residual(self, difference: Tensor, base: Point, here: Point, target: Tensor, spend: bool) -> Tensor:
        return self.change(difference, base, here).sub_(target)  # new memory, which need not be made twice

    def input_gradient(self, grad: Tensor, at: Point) -> Tensor:
        gradient: Tensor = self._backward(grad, at, (True, False, False))[0]
        return gradient

    def parameter_gradients(self, grad: Tensor, at: Point) -> Gradients:
        norm = self.module
        if norm.weight is None or not (norm.weight.requires_grad or norm.bias.requires_grad):
            return []
        _, weight, bias = self._backward(grad, at, (False, True, True))
        return [(p, g) for p, g in ((norm.weight, weight), (norm.bias, bias)) if p.requires_grad]

    def _mean(self, values: Tensor) -> Tensor:
        """Per channel, over the batch."""
        return values.mean(others(values))

    def _backward(self, grad: Tensor, at: Point, wanted: tuple[bool, bool, bool]) -> Any:
        norm, (mean, inverse_deviation) = self.module, at.saved
        return torch.ops.aten.native_batch_norm_backward(
            grad.contiguous(),
            at.x,
            norm.weight,
            norm.running_mean,
            norm.running_var,
            mean,
            inverse_deviation,
            at.state.from_batch,
            norm.eps,
            wanted,
        )


class SharedFixedBatchNormRule(FixedBatchNormRule):
    """`FixedBatchNormRule` with the statistics of the samples of all processes: one exchange, in encode."""

    def __init__(self, module: nn.Module, samples: SharedSamples) -> None:
        super().__init__(module)
        self._samples = samples

    def encode(self, x: Tensor) -> tuple[Tensor, Any]:
        norm = self.module
        if not uses_batch_statistics(norm):
            return super().encode(x)
        norm._check_input_dim(x)
        mean, variance, count = self._samples.moments(x)
        follow(norm, mean, variance, count)
        state = _Statistics(mean, (variance + norm.eps).rsqrt(), x)
        return self.forward(x, state)[0], state

    def live(self) -> Rule:
        return SharedLiveBatchNormRule(self.module, self._samples)


class SharedLiveBatchNormRule(LiveBatchNormRule):
    """`LiveBatchNormRule` over the samples of all processes.

    Gradients that it is given must be those of one sum over all samples, as the code step's are: the derivative of a
    sample's output by the statistics meets the gradients of other processes' samples.
    """

    def __init__(self, module: nn.Module, samples: SharedSamples) -> None:
        super().__init__(module)
        self._samples = samples

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        if not state.from_batch:
            return super().forward(x, state)
        mean, variance, _ = self._samples.moments(x)
        here = _Statistics(mean, (variance + self.module.eps).rsqrt(), x)
        return FixedBatchNormRule(self.module).forward(x, here)[0], (here.mean, here.inverse_deviation)

    def _mean(self, values: Tensor) -> Tensor:
        (mean,) = self._samples.means(values)
        return mean

    def _backward(self, grad: Tensor, at: Point, wanted: tuple[bool, bool, bool]) -> Any:
        if not at.state.from_batch:
            return super()._backward(grad, at, wanted)
        mean, inverse_deviation = at.saved
        normalised = (at.x - _per_channel(mean, at.x)) * _per_channel(inverse_deviation, at.x)
        if not wanted[0]:  # sums of this process's own: parameters' gradients are added up at the end of the step
            return None, (grad * normalised).sum(others(grad)), grad.sum(others(grad))
        mean_gradient, mean_product = self._samples.means(grad, grad * normalised)
        weight = self.module.weight
        scale = inverse_deviation if weight is None else weight * inverse_deviation
        centred = grad - _per_channel(mean_gradient, grad) - normalised * _per_channel(mean_product, grad)
        return centred * _per_channel(scale, grad), None, None


def _refuse_single_value(x: Tensor) -> None:
    if x.numel() == x.shape[1]:
        raise ValueError(
            f"BatchNorm got a batch of shape {tuple(x.shape)}, one value per channel, which has no variance. "
            "Use drop_last=True or a batch size that leaves more than one sample in the last batch."
        )
