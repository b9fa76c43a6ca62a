"""Proximal operators of the offline methods' losses, against a search on the number line."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_altmin.baselines import ADMMModule, BCDModule, Hinge, OutputLoss, SquaredError
from tests.baselines.tiny import CLASSES, SAMPLES, elementwise_minimum, one_hot, perceptron, samples


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


@pytest.mark.parametrize("method", [ADMMModule, BCDModule])
def test_losses_without_a_proximal_operator_are_refused(method: type[ADMMModule] | type[BCDModule]) -> None:
    """Catches a loss that fails in the first sweep, by the name of a method that the user has never heard of."""
    with pytest.raises(TypeError, match=f"loss of {method.__name__} needs a proximal operator; give .*SquaredError"):
        method(perceptron(), loss=nn.CrossEntropyLoss())  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", [SquaredError(), Hinge()])
@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.zeros(4), r"4 class indices, or numbers of the output's shape \(4, 3\).*float32 of shape \(4,\)"),
        (torch.zeros(4, 1), r"got torch.float32 of shape \(4, 1\)"),
        (torch.zeros(5, dtype=torch.long), r"got torch.int64 of shape \(5,\)"),
        (torch.tensor([0, 1, 2, 3]), "lie in 0 to 2, one for each output of the network, got 0 to 3"),
        (torch.tensor([0, 1, 2, -1]), "got -1 to 2"),
    ],
)
def test_targets_that_do_not_fit_are_refused(loss: OutputLoss, target: Tensor, message: str) -> None:
    """Catches targets that are broadcast to other samples' outputs, and labels that no output stands for."""
    with pytest.raises(ValueError, match=message):
        loss(torch.zeros(4, 3), target)


def test_labels_may_be_of_any_integer_type() -> None:
    """Catches labels in bytes, as a label file holds them, that only 64 bits would fit."""
    output, y = torch.randn(3, 3), torch.tensor([2, 0, 1])
    assert torch.equal(SquaredError().total(output, y.to(torch.uint8)), SquaredError().total(output, y))
