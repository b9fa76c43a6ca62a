"""Losses of an output variable that offline methods minimise in closed form, as losses of a network too."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics import Metric

from lightning_altmin.metrics import ClassAccuracy, MidpointAccuracy


class OutputLoss(ABC):
    """A loss ``loss(output, target)``, a mean over samples, with its proximal operator.

    Targets are class indices of shape ``(samples,)``, or numbers shaped like the output ``(samples, outputs)``.
    """

    reduction = "mean"

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """The mean over samples of the sum over outputs."""
        return self.total(output, target) / len(output)

    @abstractmethod
    def total(self, output: Tensor, target: Tensor) -> Tensor:
        """The sum over samples and outputs, a scalar."""

    @abstractmethod
    def prox(self, centre: Tensor, weight: float, target: Tensor) -> Tensor:
        """The ``v`` that minimises ``total(v, target) + weight/2 ||v - centre||^2``.

        Args:
            centre: Shape ``(samples, outputs)``.
            weight: > 0.
            target: Class indices, or numbers shaped like ``centre``.
        """

    def default_metrics(self, outputs: int) -> dict[str, Metric]:
        """What is logged if the user names nothing: accuracy, unless a single output has numbers for targets."""
        return {"acc": ClassAccuracy()} if outputs > 1 else {}


class SquaredError(OutputLoss):
    """``1/2 ||v - y||^2``, with ``y`` the one-hot code of a class index, or numbers as they are."""

    def total(self, output: Tensor, target: Tensor) -> Tensor:
        return 0.5 * (output - _one_hot(output, target)).square().sum()

    def prox(self, centre: Tensor, weight: float, target: Tensor) -> Tensor:
        return (_one_hot(centre, target) + weight * centre) / (1 + weight)


class Hinge(OutputLoss):
    """``sum_j max(1 - v_j, 0)`` at a label's own output (or where the target is 1), ``max(v_j, 0)`` elsewhere.

    The loss of Taylor et al. 2016 for one output and targets 0 and 1; for classes, the same at each output.
    """

    def default_metrics(self, outputs: int) -> dict[str, Metric]:
        return super().default_metrics(outputs) or {"acc": MidpointAccuracy()}

    def total(self, output: Tensor, target: Tensor) -> Tensor:
        wanted = _one_hot(output, target)
        return torch.where(wanted > 0.5, (1 - output).clamp_min(0), output.clamp_min(0)).sum()

    def prox(self, centre: Tensor, weight: float, target: Tensor) -> Tensor:
        # Outside the flat part the slope is -1 (target 1) or 1 (target 0): go that far, but not past the kink.
        up = torch.maximum(centre, (centre + 1 / weight).clamp_max(1.0))
        down = torch.minimum(centre, (centre - 1 / weight).clamp_min(0.0))
        return torch.where(_one_hot(centre, target) > 0.5, up, down)


def check_output_loss(loss: object, name: str) -> None:
    """Refuse a loss without a proximal operator, such as ``nn.CrossEntropyLoss``.

    Args:
        loss: What was given.
        name: The method that needs the operator.

    Raises:
        TypeError: If it is no `OutputLoss`.
    """
    if not isinstance(loss, OutputLoss):
        known = " or ".join(f"{kind.__name__}()" for kind in OutputLoss.__subclasses__())
        raise TypeError(f"loss of {name} needs a proximal operator; give {known}, got {loss!r}")


def _one_hot(output: Tensor, target: Tensor) -> Tensor:
    if target.shape == output.shape:
        return target.to(output.dtype)
    samples, outputs = output.shape
    if target.is_floating_point() or target.shape != (samples,):
        raise ValueError(
            f"targets must be {samples} class indices, or numbers of the output's shape {tuple(output.shape)} "
            f"(y.unsqueeze(1) for a single output), got {target.dtype} of shape {tuple(target.shape)}"
        )
    if not bool(((target >= 0) & (target < outputs)).all()):
        raise ValueError(
            f"class indices must lie in 0 to {outputs - 1}, one for each output of the network, got "
            f"{int(target.min())} to {int(target.max())}; widen the last layer, or give a single output numbers of "
            f"shape {(samples, 1)}"
        )
    return functional.one_hot(target.long(), outputs).to(output.dtype)
