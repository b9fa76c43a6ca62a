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
        (lambda: Heaviside(math.nan), "first must be a finite number"),
        (lambda: Quantise(0), "bits must be an integer from 1 to 16"),
        (lambda: Quantise(2, 1.0, 1.0), "low must be a number below high"),
        (lambda: Staircase(0.0, 1.0, 0.0, steps=0), "steps must be an integer >= 1"),
        (lambda: Staircase(0.0, 0.0, 0.0), "rise must be a positive number"),
        (lambda: IntegerNetwork(MLP(3, [4], 2)), "staircase"),
        (lambda: IntegerNetwork(MLP(3, [4], 2, activation=Sign), bits=1), "bits must be an integer from 2 to 16"),
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
