"""Oracle: formulas written out here. A mistake shared by both engines, or made in torch's own kernels, shows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_altmin.engines import stage_engine
from tests.engines.catalogue import ACTIVATIONS, LAYERS, TOLERANCE, largest_difference

Function = Callable[..., Tensor]
ENGINES = ["closed_form", "autograd"]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = torch.stack([(x * row).sum(-1) for row in weight], -1)
    return y if bias is None else y + bias


def convolution(module: nn.Module) -> Function:
    """Cross-correlation by its definition: a sum over kernel positions of shifted, strided windows."""
    stride, padding, dilation, groups = module.stride, module.padding, module.dilation, module.groups

    def function(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        spatial, kernel = x.dim() - 2, weight.shape[2:]
        x = nn.functional.pad(x, [p for size in reversed(padding) for p in (size, size)])
        out = [(x.shape[2 + d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1 for d in range(spatial)]
        per_group_in, per_group_out = x.shape[1] // groups, weight.shape[0] // groups
        channels = []
        for o in range(weight.shape[0]):
            first = (o // per_group_out) * per_group_in
            total = torch.zeros(x.shape[0], *out, dtype=x.dtype)
            for position in itertools.product(*(range(k) for k in kernel)):
                window = x[:, first : first + per_group_in]
                for d, offset in enumerate(position):
                    start = offset * dilation[d]
                    index = torch.arange(out[d]) * stride[d] + start
                    window = window.index_select(2 + d, index)
                w = weight[(o, slice(None), *position)].view(1, -1, *([1] * spatial))
                total = total + (window * w).sum(1)
            channels.append(total if bias is None else total + bias[o])
        return torch.stack(channels, 1)

    return function


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel, by their definition."""
    channels = x.transpose(0, 1).reshape(x.shape[1], -1)
    mean = channels.sum(1) / channels.shape[1]
    return mean, (channels - mean[:, None]).square().sum(1) / channels.shape[1]


def normalization(mean: Tensor, variance: Tensor, eps: float) -> Function:
    def function(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        shape = (1, -1, *([1] * (x.dim() - 2)))
        y = (x - mean.view(shape)) / torch.sqrt(variance.view(shape) + eps)
        return y if weight is None else y * weight.view(shape) + bias.view(shape)

    return function


def live_normalization(eps: float) -> Function:
    def function(x: Tensor, *affine: Tensor) -> Tensor:
        return normalization(*batch_statistics(x), eps)(x, *affine)

    return function


def derivatives(function: Function, x: Tensor, grad: Tensor, parameters: list[Tensor]) -> tuple[Tensor, ...]:
    leaves = [t.detach().clone().requires_grad_() for t in (x, *parameters)]
    return torch.autograd.grad((function(*leaves) * grad).sum(), leaves)


def assert_engine_computes(
    kind: str, module: nn.Module, x: Tensor, at: Tensor, fixed: Function, live: Function
) -> None:
    engine = stage_engine([module], kind)
    output, state = engine.encode(x)
    parameters = list(module.parameters())
    assert largest_difference(output, live(x, *parameters).detach()) <= TOLERANCE
    grad = torch.randn_like(output)
    held = engine.fixed(at, state)
    assert largest_difference(held.output(), fixed(at, *parameters).detach()) <= TOLERANCE
    assert largest_difference(held.input_gradient(grad), derivatives(fixed, at, grad, parameters)[0]) <= TOLERANCE
    expected = derivatives(live, at, grad, parameters)
    weighed = engine.live(at, state)
    assert largest_difference(weighed.output(), live(at, *parameters).detach()) <= TOLERANCE
    assert largest_difference(engine.live(at, state).input_gradient(grad), expected[0]) <= TOLERANCE
    gradients = {id(p): g for p, g in engine.live(at, state).parameter_gradients(grad)}
    assert len(gradients) == len(parameters)
    for parameter, gradient in zip(parameters, expected[1:], strict=True):
        assert largest_difference(gradients[id(parameter)], gradient) <= TOLERANCE


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("name", [n for n in LAYERS if n.startswith("linear")])
def test_linear(name: str, kind: str) -> None:
    """Catches a transposed weight, a forgotten bias, or leading dimensions that are not summed over."""
    module, x = LAYERS[name].module(), LAYERS[name].input()
    assert_engine_computes(kind, module, x, torch.randn_like(x), linear, linear)


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("name", [n for n in LAYERS if n.startswith("conv")])
def test_convolution(name: str, kind: str) -> None:
    """Catches stride, padding, dilation or groups mixed up in a convolution or in its gradients."""
    module, x = LAYERS[name].module(), LAYERS[name].input()
    function = convolution(module)
    assert_engine_computes(kind, module, x, torch.randn_like(x), function, function)


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("name", [n for n in LAYERS if n.startswith("batch-norm") and "eval" not in n])
def test_batch_norm_in_training(name: str, kind: str) -> None:
    """Catches, in the code step, statistics other than encode's or differentiated through; in the weight step,
    statistics other than the input's own or treated as constants; and an unbiased variance.
    """
    module, x = LAYERS[name].module(), LAYERS[name].input()
    held = normalization(*batch_statistics(x), module.eps)
    assert_engine_computes(kind, module, x, x + torch.randn_like(x), held, live_normalization(module.eps))


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("name", ["batch-norm-eval", "batch-norm-eval-plain"])
def test_batch_norm_in_evaluation(name: str, kind: str) -> None:
    """Catches a BatchNorm set to eval (a frozen backbone) that normalises by the batch all the same."""
    module, x = LAYERS[name].module(), LAYERS[name].input()
    running = normalization(module.running_mean.clone(), module.running_var.clone(), module.eps)
    assert_engine_computes(kind, module, x, x + torch.randn_like(x), running, running)


@pytest.mark.parametrize("kind", ENGINES)
def test_batch_norm_without_running_statistics_in_evaluation(kind: str) -> None:
    """Catches a BatchNorm without running statistics that uses something else than the batch's in eval mode."""
    case = LAYERS["batch-norm-untracked-eval"]
    module, x = case.module(), case.input()
    held = normalization(*batch_statistics(x), module.eps)
    assert_engine_computes(kind, module, x, x + torch.randn_like(x), held, live_normalization(module.eps))


FORMULAS: dict[str, Callable[[float], float]] = {
    "identity": lambda x: x,
    "relu": lambda x: max(x, 0.0),
    "relu-inplace": lambda x: max(x, 0.0),
    "leaky-relu": lambda x: x if x > 0 else 0.01 * x,
    "leaky-relu-slope": lambda x: x if x > 0 else 0.3 * x,
    "relu6": lambda x: min(max(x, 0.0), 6.0),
    "hardtanh": lambda x: min(max(x, -1.0), 1.0),
    "hardtanh-range": lambda x: min(max(x, -0.5), 2.0),
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "tanh": lambda x: (math.exp(2 * x) - 1) / (math.exp(2 * x) + 1),
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "gelu-tanh": lambda x: x * 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "elu": lambda x: x if x > 0 else math.exp(x) - 1,
    "elu-alpha": lambda x: x if x > 0 else 0.4 * (math.exp(x) - 1),
    "sign": lambda x: 1.0 if x >= 0 else -1.0,
    "step-threshold": lambda x: float(x >= 0.3),
    "hard-threshold": lambda x: float(x >= 0.6) - float(x < -0.6),
    "quantise": lambda x: -1.0 + (x >= -0.5) + (x >= 0.5) + (x >= 1.5),
    "staircase": lambda x: -1.0 + 0.5 * ((x >= -0.75) + (x >= -0.25) + (x >= 0.25)),
    "softplus": lambda x: x if x > 20 else math.log1p(math.exp(x)),
    "softplus-beta": lambda x: x if 3 * x > 4 else math.log1p(math.exp(3 * x)) / 3,
}


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name: str, kind: str) -> None:
    """Catches a wrong function or a wrong parameter (slope, alpha, beta, threshold, range) of an activation; slopes
    are held against central differences of the formula.
    """
    points = [-8.0, -2.1, -0.7, -0.2, 0.35, 0.9, 1.2, 1.6, 2.5, 5.0, 6.6, 21.0]
    x = torch.tensor([points], dtype=torch.float64)
    engine = stage_engine([ACTIVATIONS[name]()], kind)
    output, state = engine.encode(x)
    formula, step = FORMULAS[name], 1e-5
    values = torch.tensor([[formula(p) for p in points]], dtype=torch.float64)
    slopes = [(formula(p + step) - formula(p - step)) / (2 * step) for p in points]
    assert largest_difference(output, values) <= TOLERANCE
    gradient = engine.fixed(x, state).input_gradient(torch.full_like(x, 3.0))
    torch.testing.assert_close(gradient, 3.0 * torch.tensor([slopes], dtype=torch.float64), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", ENGINES)
def test_max_pool_by_hand(kind: str) -> None:
    """Catches a maximum whose gradient goes to another position of the window."""
    x = torch.tensor([[[[1.0, 4.0, 2.0, 0.0], [3.0, 2.0, 5.0, 1.0]]]], dtype=torch.float64)
    engine = stage_engine([nn.MaxPool2d(2)], kind)
    output, state = engine.encode(x)
    assert output.tolist() == [[[[4.0, 5.0]]]]
    gradient = engine.fixed(x, state).input_gradient(torch.tensor([[[[10.0, 20.0]]]], dtype=torch.float64))
    assert gradient.tolist() == [[[[0.0, 10.0, 0.0, 0.0], [0.0, 0.0, 20.0, 0.0]]]]


@pytest.mark.parametrize("kind", ENGINES)
def test_average_pool_by_hand(kind: str) -> None:
    """Catches an average whose gradient is not shared equally."""
    x = torch.tensor([[[[1.0, 4.0, 2.0, 0.0], [3.0, 2.0, 5.0, 1.0]]]], dtype=torch.float64)
    for module in (nn.AvgPool2d(2), nn.AdaptiveAvgPool2d((1, 2))):
        engine = stage_engine([module], kind)
        output, state = engine.encode(x)
        assert output.tolist() == [[[[2.5, 2.0]]]]
        gradient = engine.fixed(x, state).input_gradient(torch.tensor([[[[4.0, 8.0]]]], dtype=torch.float64))
        assert gradient.tolist() == [[[[1.0, 1.0, 2.0, 2.0], [1.0, 1.0, 2.0, 2.0]]]]


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize(
    ("activation", "x", "move", "change"),
    [
        (nn.LeakyReLU(0.01), 5e-9, -1e-8, -5e-9 - 5e-11),
        (nn.LeakyReLU(0.01), -5e-9, 1e-8, 5e-9 + 5e-11),
        (nn.ELU(2.0), 5e-9, -1e-8, -5e-9 - 2 * 5e-9),
        (nn.Hardtanh(), 1 - 5e-9, 1e-8, 5e-9),
        (nn.ReLU6(), -4e-9, 1e-8, 6e-9),
        (nn.ReLU(), 4e-9, -1e-8, -4e-9),
    ],
)
def test_tiny_moves_across_a_kink(activation: nn.Module, x: float, move: float, change: float, kind: str) -> None:
    """Catches a change taken for slope times move where the slope is another one on the way."""
    engine = stage_engine([activation], kind)
    base, moved = (torch.tensor([[value]], dtype=torch.float64) for value in (x, x + move))
    output, state = engine.encode(base)
    found = engine.fixed(base, state, moved - base).change(output)
    torch.testing.assert_close(found, torch.tensor([[change]], dtype=torch.float64), rtol=1e-6, atol=3e-16)
