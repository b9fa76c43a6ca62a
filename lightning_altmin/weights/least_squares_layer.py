"""A Linear or Conv2d layer seen as a matrix: its inputs as rows, its weights and bias as one matrix."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_altmin.engines import Gradients, runs_more_than_its_type
from lightning_altmin.stage import Stage

_CHUNK = 2**23  # entries of a convolution's unfolded input that are held at once


class LeastSquaresLayer:
    """``y = W a`` for every row ``a`` of the unfolded input, with a one appended where the layer trains a bias.

    Args:
        layer: ``nn.Linear``, or ``nn.Conv2d`` with one group.

    Attributes:
        has_bias: Whether a one is appended to each row: whether there was a bias to train when this was made. What is
            kept of a layer has its shape, so a bias that is frozen later stays in it, with the value it has.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        self.layer = layer
        self.has_bias = layer.bias is not None and layer.bias.requires_grad

    @property
    def is_frozen(self) -> bool:
        """Whether the weight is not to be changed now."""
        return not self.layer.weight.requires_grad

    @property
    def keeps_bias(self) -> bool:
        """Whether the rows' one belongs to a bias that is not to be changed now."""
        return self.has_bias and self.layer.bias is not None and not self.layer.bias.requires_grad

    @property
    def outputs(self) -> int:
        """Rows of the matrix of weights."""
        return self.layer.weight.shape[0]

    @property
    def inputs(self) -> int:
        """Columns of the matrix of weights, the bias included."""
        return self.layer.weight[0].numel() + self.has_bias

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The weight, and the bias if a one is appended for it; frozen ones included."""
        named = self.layer._parameters
        return [p for name in ("weight", "bias")[: 1 + self.has_bias] if (p := named[name]) is not None]

    def matrix(self) -> Tensor:
        """The weights as they are, shape ``(outputs, inputs)``."""
        return self.join([p.detach() for p in self.parameters])

    def join(self, parts: list[Tensor]) -> Tensor:
        """One matrix of tensors shaped like `parameters`."""
        return torch.cat([part.reshape(self.outputs, -1) for part in parts], 1)

    def split(self, matrix: Tensor) -> Gradients:
        """The matrix' parts, shaped like the parameters they belong to and laid out like them; without the frozen ones.

        A fused optimizer reads a gradient as if it were contiguous, whatever its strides say.
        """
        weight, dtype = self.layer.weight, self.layer.weight.dtype
        inputs = weight[0].numel()
        parts = [matrix[:, :inputs], matrix[:, inputs:]][: 1 + self.has_bias]
        return [
            (p, part.reshape(p.shape).to(dtype).contiguous())
            for p, part in zip(self.parameters, parts, strict=True)
            if p.requires_grad
        ]

    def rows(self, x: Tensor) -> Tensor:
        """The inputs of the layer, one row per sample and position, shape ``(rows, inputs)``."""
        rows = self._patches(self.layer, x) if isinstance(self.layer, nn.Conv2d) else x.reshape(-1, x.shape[-1])
        return functional.pad(rows, (0, 1), value=1.0) if self.has_bias else rows

    def positions(self, x: Tensor) -> int:
        """Rows per sample."""
        if not isinstance(self.layer, nn.Conv2d):
            return x[0].numel() // x.shape[-1]
        conv, count = self.layer, 1
        left, right, top, bottom = conv._reversed_padding_repeated_twice
        for axis, padding in enumerate((top + bottom, left + right)):
            reach = conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1
            count *= (x.shape[2 + axis] + padding - reach) // conv.stride[axis] + 1
        return count

    def chunks(self, x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """`rows` of some samples at a time, with the same samples of other tensors."""
        per_sample = x[0].numel()
        if isinstance(self.layer, nn.Conv2d):  # a patch at every position, or fewer with a stride
            per_sample *= self.layer.kernel_size[0] * self.layer.kernel_size[1]
        count = max(1, _CHUNK // max(per_sample, 1))
        for start in range(0, x.shape[0], count):
            yield (self.rows(x[start : start + count]), *(other[start : start + count] for other in others))

    def output_rows(self, y: Tensor) -> Tensor:
        """The layer's output, or a target of it, as rows that belong to `rows`; shape ``(rows, outputs)``."""
        if isinstance(self.layer, nn.Conv2d):
            return y.flatten(2).transpose(1, 2).reshape(-1, self.outputs)
        return y.reshape(-1, self.outputs)

    @staticmethod
    def _patches(conv: nn.Conv2d, x: Tensor) -> Tensor:
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        padded = functional.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
        patches = functional.unfold(padded, conv.kernel_size, conv.dilation, 0, conv.stride)
        return patches.transpose(1, 2).reshape(-1, patches.shape[1])


def least_squares_layer(stage: Stage) -> LeastSquaresLayer:
    """The stage's layer, if it is one that least squares can solve.

    Raises:
        ValueError: If it is not, with the way out.
    """
    layer = stage.affine[0]
    remedy = f'train it otherwise: LayerwiseWeights({{"{stage.name}": LocalGradient(), "default": ...}})'
    if not isinstance(layer, nn.Linear | nn.Conv2d) or type(layer).forward not in (
        nn.Linear.forward,
        nn.Conv2d.forward,
    ):
        raise ValueError(
            f"a memory needs Linear or Conv2d layers, but stage {stage.name!r} has {type(layer).__name__}; {remedy}"
        )
    if runs_more_than_its_type(layer):
        raise ValueError(
            f"a memory solves for the weights of {type(layer).__name__}.forward, but the layer of stage "
            f"{stage.name!r} has a forward of its own, set on the instance, or hooks; {remedy}"
        )
    if layer._parameters.get("weight") is None:
        raise ValueError(
            f"a memory sets a layer's weight, but that of stage {stage.name!r} is computed from others (a "
            f"parametrization, such as weight_norm); {remedy}"
        )
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        raise ValueError(
            f"a memory has one matrix for all of a layer's inputs, but the convolution of stage {stage.name!r} has "
            f"groups={layer.groups}; {remedy}"
        )
    return LeastSquaresLayer(layer)
