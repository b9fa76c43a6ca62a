"""Hand-computed values of the staircases, and integer inference against Python's own integers."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_altmin.nn import MLP, HardThreshold, Heaviside, Quantise, Sign, Staircase
from lightning_altmin.nn.integer import IntegerNetwork


def values(module: nn.Module, points: list[float]) -> list[float]:
    result: list[float] = module(torch.tensor(points, dtype=torch.float64)).tolist()
    return result


@pytest.mark.parametrize(
    ("module", "points", "expected"),
    [
        (Sign(), [-2.0, -1e-300, -0.0, 0.0, 3.0, math.inf, -math.inf], [-1, -1, 1, 1, 1, 1, -1]),
        (Heaviside(), [-1e-300, 0.0, 2.0], [0, 1, 1]),
        (Heaviside(0.5), [0.25, 0.5, 0.75], [0, 1, 1]),
        (HardThreshold(0.5), [-0.75, -0.5, 0.25, 0.5, 9.0], [-1, 0, 0, 1, 1]),
        (Quantise(1, 0.0, 1.0), [-3.0, 0.25, 0.5, 7.0], [0, 0, 1, 1]),
        (Quantise(2, -1.5, 1.5), [-9.0, -1.25, -1.0, -0.25, 0.25, 1.25, 9.0], [-1.5, -1.5, -0.5, -0.5, 0.5, 1.5, 1.5]),
    ],
)
def test_values_by_hand(module: nn.Module, points: list[float], expected: list[float]) -> None:
    """Catches a threshold on the wrong side, a level too many, and a saturated end that goes on."""
    assert values(module, points) == expected


@given(st.integers(1, 8), st.floats(-5, 5), st.floats(0.1, 5), st.floats(-20, 20))
def test_quantise_rounds_to_the_nearest_value(bits: int, low: float, width: float, x: float) -> None:
    """Catches thresholds that are not half way between two values."""
    module = Quantise(bits, low, low + width)
    grid = [low + width * k / (2**bits - 1) for k in range(2**bits)]
    (got,) = values(module, [x])
    assert min(abs(got - g) for g in grid) < 1e-9 * (1 + abs(low) + width)
    assert abs(got - x) <= min(abs(g - x) for g in grid) + 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bits", [1, 2, 4, 5, 8])
def test_levels_and_thresholds_agree_to_the_last_bit(bits: int, dtype: torch.dtype) -> None:
    """Catches levels found by a division that is rounded otherwise than the thresholds.

    By definition the level is the number of thresholds reached, so counting them is the oracle: at each threshold, and
    at the next number below it. (In 16 bits some thresholds are one number, and are reached together.)
    """
    modules = [Quantise(bits, low, high) for low, high in ((-1.0, 1.0), (0.0, 1.0), (-0.3, 2.7))]
    for module in (*modules, Sign(), Heaviside(0.1), HardThreshold(0.1)):
        thresholds = module.threshold(torch.arange(1, module.steps + 1, dtype=dtype))
        points = torch.cat([thresholds, thresholds.nextafter(torch.full_like(thresholds, -math.inf))])
        assert torch.equal(module.level(points), (points.unsqueeze(1) >= thresholds).sum(1).to(dtype))


@pytest.mark.parametrize("module", [Sign(), Heaviside(0.3), HardThreshold(), Quantise(3)])
def test_the_gradient_is_zero_and_nan_stays(module: nn.Module) -> None:
    """Catches a surrogate gradient, a graph that ends with an error, and a NaN that becomes a valid value."""
    x = torch.tensor([-1.3, 0.01, 0.7, 2.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(module(x).sum(), x)
    assert torch.equal(gradient, torch.zeros(4))
    assert module(torch.tensor([math.nan])).isnan().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HardThreshold(0.0), "threshold must be a positive number"),
        (lambda: Heaviside(math.nan), "threshold must be a finite number"),
        (lambda: Quantise(0), "bits must be an integer from 1 to 16"),
        (lambda: Quantise(2, 1.0, 1.0), "low must be a number below high"),
        (lambda: Staircase(0.0, 1.0, 0.0, steps=0), "steps must be an integer >= 1"),
        (lambda: Staircase(0.0, 0.0, 0.0), "rise must be a positive number"),
        (lambda: IntegerNetwork(MLP(3, [4], 2)), "staircase"),
        (lambda: IntegerNetwork(MLP(3, [4], 2, activation=Sign), bits=1), "bits must be an integer from 2 to 16"),
        (lambda: IntegerNetwork(MLP(3, [4], 2, activation=Sign), unit=-1), "unit must be a positive number, got -1"),
        (lambda: IntegerNetwork(MLP(3, [4], 2, activation=Sign), math.nan), "zero must be a finite number, got nan"),
        (
            lambda: IntegerNetwork(MLP(3, [4], 2, activation=Sign)).predict(torch.rand(2, 3)),
            "pixels must be integers, got torch.float32",
        ),
    ],
)
def test_bad_arguments_are_refused(make: Any, message: str) -> None:
    """Catches a setting that fails late, or not at all."""
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("activation", [Sign, Heaviside, HardThreshold, Quantise])
def test_integers_predict_what_exact_arithmetic_does(activation: type[nn.Module]) -> None:
    """Catches a threshold rounded the wrong way, a bias left out, and a scale of the wrong layer.

    The oracle is the rounded network in rational numbers, which has no rounding error at all.
    """
    torch.manual_seed(0)
    network = MLP(6, [9, 8], 4, activation=activation)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3)
    zero, unit = 100.5, 1 / 64
    integer = IntegerNetwork(network, zero, unit, bits=6)
    pixels = torch.randint(256, (60, 6), dtype=torch.uint8)
    linears = [m for m in integer.rounded if isinstance(m, nn.Linear)]
    stairs: Any = [m for m in integer.rounded if isinstance(m, Staircase)]
    for sample, predicted in zip(pixels.tolist(), integer.predict(pixels).tolist(), strict=True):
        x = [(Fraction(p) - Fraction(zero)) * Fraction(unit) for p in sample]
        for index, linear in enumerate(linears):
            rows, bias = linear.weight.tolist(), linear.bias.tolist()
            x = [
                sum(Fraction(w) * v for w, v in zip(r, x, strict=True)) + Fraction(b)
                for r, b in zip(rows, bias, strict=True)
            ]
            if index < len(stairs):
                s = stairs[index]
                tops = [Fraction(s.first) + k * Fraction(s.gap) for k in range(s.steps)]
                x = [Fraction(s.low) + sum(v >= t for t in tops) * Fraction(s.rise) for v in x]
        assert predicted == max(range(4), key=lambda k: x[k])
    weights = integer.rounded[1].weight.detach()
    assert len(weights.unique()) <= 63
    assert (
        float((weights - network[1].weight.detach()).abs().max()) <= float(network[1].weight.detach().abs().max()) / 31
    )


def _one_sum(weights: list[float], threshold: float) -> nn.Sequential:
    """One hidden unit that reads all pixels; the prediction is 1 where its sum reaches the threshold, or else 0."""
    network = nn.Sequential(nn.Linear(len(weights), 1, bias=False), Heaviside(threshold), nn.Linear(1, 2)).double()
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([weights], dtype=torch.float64))
        network[2].weight.copy_(torch.tensor([[0.0], [1.0]], dtype=torch.float64))
        network[2].bias.copy_(torch.tensor([0.5, 0.0], dtype=torch.float64))
    return network


@pytest.mark.parametrize(
    ("weights", "threshold", "pixel", "dtype", "expected"),
    [
        ([1.0] * 784, 0.0, 255, torch.uint8, 1),  # 784 * 255 * 2^14 = 1.5 * 2^31, negative in 32 bits
        ([-1.0] * 784, 0.0, 255, torch.uint8, 0),
        ([1.0] * 784, 1e300, 255, torch.uint8, 0),  # a threshold beyond 64 bits
        ([1.0] * 784, -1e300, 255, torch.uint8, 1),
        ([1.0, 1.0], 2.0**33, 2**32, torch.int64, 1),  # of such a pixel the lower 32 bits are zero
        ([1.0, 1.0], 2.0**33, 2**32 - 1, torch.int64, 0),
        ([1.0, 1.0], 2.0**32, 2**31, torch.uint32, 1),
    ],
)
def test_sums_have_room(weights: list[float], threshold: float, pixel: int, dtype: torch.dtype, expected: int) -> None:
    """Catches sums, thresholds and pixels that come round to the other sign; what is right is whether the weights' sum
    times the pixel reaches the threshold, in exact integers.
    """
    assert expected == int(int(sum(weights)) * pixel >= threshold)
    integer = IntegerNetwork(_one_sum(weights, threshold), bits=16)
    pixels = torch.full((1, len(weights)), pixel, dtype=torch.int64).to(dtype)
    assert integer.predict(pixels).tolist() == [expected]


def test_what_64_bits_do_not_hold_is_refused() -> None:
    """Catches a prediction made of sums that came round."""
    integer = IntegerNetwork(_one_sum([1.0, 1.0], 0.0), bits=16)
    most = (2**61 - 1) // 2**15  # two weights of 2^14 steps each
    assert integer.predict(torch.tensor([[most, -most]])).tolist() == [1]
    with pytest.raises(ValueError, match=f"pixels must lie between -{most} and {most}.*got {most + 1}"):
        integer.predict(torch.tensor([[0, -most - 1]]))
    with pytest.raises(ValueError, match=r"pixels must be integers, got torch\.uint64"):
        integer.predict(torch.zeros(1, 2, dtype=torch.uint64))
    assert integer.predict(torch.zeros(0, 2, dtype=torch.uint8)).shape == (0,)
    tiny = _one_sum([1.0], 0.0)
    with torch.no_grad():
        tiny[2].weight.mul_(1e-30)
    with pytest.raises(ValueError, match=r"its bias, is .* does not fit 64 bits"):
        IntegerNetwork(tiny)


def test_levels_that_64_bits_do_not_hold_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a wide output layer whose sums come round, here where numbers end much earlier: 65535 levels times a
    weight of 2^6 steps times the fraction 2^16 of a step are just below 2^38, with a weight of 2^14 below 2^46.
    """
    monkeypatch.setattr("lightning_altmin.nn.integer._MOST", 2**38)
    network = nn.Sequential(nn.Linear(2, 1), Quantise(16, 0.0, 1.0), nn.Linear(1, 2, bias=False))
    with torch.no_grad():
        network[2].weight.fill_(1.0)
    IntegerNetwork(network, bits=8)
    with pytest.raises(ValueError, match=r"bits=16 and 65535 steps of the last staircase"):
        IntegerNetwork(network, bits=16)
