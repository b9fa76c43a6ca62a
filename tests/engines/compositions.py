"""Hypothesis strategy: random chains of layers that fit each other, with a batch for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from tests.engines.catalogue import ACTIVATIONS, randomized

Draw = Callable[[st.SearchStrategy[Any]], Any]
Shape = tuple[int, ...]


def _sizes(draw: Draw, low: int, high: int, count: int) -> tuple[int, ...]:
    return tuple(draw(st.integers(low, high)) for _ in range(count))


def _linear(draw: Draw, shape: Shape) -> nn.Module:
    return nn.Linear(shape[-1], draw(st.integers(2, 5)), bias=draw(st.booleans()))


def _convolution(draw: Draw, shape: Shape) -> nn.Module:
    spatial = len(shape) - 1
    kernel, dilation = _sizes(draw, 1, 3, spatial), _sizes(draw, 1, 2, spatial)
    padding = tuple(draw(st.integers(0, d * (k - 1))) for k, d in zip(kernel, dilation, strict=True))
    groups = draw(st.sampled_from([g for g in (1, 2, 3) if shape[0] % g == 0]))
    conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial - 1]
    stride = _sizes(draw, 1, 2, spatial)
    out = groups * draw(st.integers(1, 2))
    return conv(shape[0], out, kernel, stride, padding, dilation, groups, bias=draw(st.booleans()))


def _batch_norm(draw: Draw, shape: Shape) -> nn.Module:
    kind: Any = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(shape) - 1]
    # eps: a channel that dropout or ReLU made constant is amplified by 1 / sqrt(eps), its rounding error too. Chains of
    # BatchNorms with the default of 1e-5 would test the conditioning of the chain and not the engines.
    norm = kind(shape[0], 0.1, draw(st.sampled_from([0.1, None])), track_running_stats=draw(st.booleans()))
    return norm.train(draw(st.booleans()))


def _dropout(draw: Draw, shape: Shape) -> nn.Module:
    kind: Any = draw(
        st.sampled_from([nn.Dropout, (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)[len(shape) - 1]])
    )
    return kind(draw(st.sampled_from([0.2, 0.5])))


def _activation(draw: Draw, shape: Shape) -> nn.Module:
    return ACTIVATIONS[draw(st.sampled_from(sorted(ACTIVATIONS)))]()


def _flatten(draw: Draw, shape: Shape) -> nn.Module:
    return nn.Flatten()


def _unflatten(draw: Draw, shape: Shape) -> nn.Module:
    divisor = draw(st.sampled_from([d for d in range(1, shape[0] + 1) if shape[0] % d == 0]))
    return nn.Unflatten(1, (divisor, shape[0] // divisor))


def _max_pool(draw: Draw, shape: Shape) -> nn.Module:
    kernel = _sizes(draw, 1, 2, 2)
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    return nn.MaxPool2d(kernel, _sizes(draw, 1, 2, 2), padding, _sizes(draw, 1, 2, 2), ceil_mode=draw(st.booleans()))


def _average_pool(draw: Draw, shape: Shape) -> nn.Module:
    kernel = _sizes(draw, 1, 2, 2)
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    return nn.AvgPool2d(kernel, _sizes(draw, 1, 2, 2), padding, draw(st.booleans()), draw(st.booleans()))


def _adaptive_pool(draw: Draw, shape: Shape) -> nn.Module:
    return nn.AdaptiveAvgPool2d(_sizes(draw, 1, 3, 2))


_EVERYWHERE = [_linear, _batch_norm, _dropout, _activation]
_BY_DIMENSIONS = {
    1: [*_EVERYWHERE, _unflatten],
    2: [*_EVERYWHERE, _convolution, _flatten],
    3: [*_EVERYWHERE, _convolution, _flatten, _max_pool, _average_pool, _adaptive_pool],
    4: [*_EVERYWHERE, _convolution, _flatten],
}


@st.composite
def chains(draw: Draw, longest: int = 6) -> tuple[nn.Sequential, torch.Tensor]:
    """A float64 ``nn.Sequential`` of up to ``longest`` random layers and a batch of 4 for it."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(4, *_sizes(draw, 2, 6, draw(st.integers(1, 4))), dtype=torch.float64)
    network, shape = nn.Sequential(), tuple(x.shape[1:])
    for _ in range(draw(st.integers(1, longest))):
        layer = randomized(draw(st.sampled_from(_BY_DIMENSIONS[len(shape)]))(draw, shape).double())
        if len(network) > 0 and getattr(layer, "inplace", False):
            layer.inplace = False  # in-place layers in a row are an error in plain PyTorch
        output = _shape_after(layer, shape)
        if output is not None:  # else it does not fit here: leave it out
            network.append(layer)
            shape = output
    return network, x


def _shape_after(layer: nn.Module, shape: Shape) -> Shape | None:
    training = layer.training
    try:
        with torch.no_grad():
            output = layer.eval()(torch.zeros(4, *shape, dtype=torch.float64))
    except RuntimeError:
        return None
    finally:
        layer.train(training)
    # a maximum over a window that lies in the padding is -inf
    return tuple(output.shape[1:]) if output.numel() > 0 and bool(output.isfinite().all()) else None
