"""Proximal operators of the offline methods' losses, against a search on the number line."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_altmin.baselines import Hinge, OutputLoss, SquaredError
from tests.baselines.tiny import CLASSES, SAMPLES, elementwise_minimum, one_hot, samples


def squared(v: Tensor, wanted: Tensor) -> Tensor:
    return 0.5 * (v - wanted) ** 2


def hinge(v: Tensor, wanted: Tensor) -> Tensor:
    return torch.relu(1 - v) if wanted == 1 else torch.relu(v)


LOSSES = [(SquaredError(), squared), (Hinge(), hinge)]


@pytest.mark.parametrize("weight", [0.2, 1.0, 7.0])
@pytest.mark.parametrize(("loss", "written"), LOSSES)
def test_the_proximal_operator_is_the_minimum(loss: OutputLoss, written: object, weight: float) -> None:
    """Catches a step of another length, one past the kink, and a half too many or too few."""
    _, y = samples()
    centre = 2 * torch.randn(SAMPLES, CLASSES, dtype=torch.float64)
    expected = elementwise_minimum(
        lambda v, c, t: written(v, t) + weight / 2 * (v - c) ** 2,  # type: ignore[operator]
        centre,
        one_hot(y),
    )
    torch.testing.assert_close(loss.prox(centre, weight, y), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(loss.prox(centre, weight, one_hot(y)), loss.prox(centre, weight, y), rtol=0, atol=0)


@pytest.mark.parametrize(("loss", "written"), LOSSES)
def test_values_are_sums_over_outputs_and_means_over_samples(loss: OutputLoss, written: object) -> None:
    """Catches a mean over outputs, which would make the loss CLASSES times too small beside the penalties."""
    _, y = samples()
    output, wanted = torch.randn(SAMPLES, CLASSES, dtype=torch.float64), one_hot(y)
    by_hand = sum(
        float(written(output[i, j], wanted[i, j]))  # type: ignore[operator]
        for i in range(SAMPLES)
        for j in range(CLASSES)
    )
    assert float(loss.total(output, y)) == pytest.approx(by_hand, rel=1e-12)
    assert float(loss(output, y)) == pytest.approx(by_hand / SAMPLES, rel=1e-12)
