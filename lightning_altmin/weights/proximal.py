"""Gradient steps on each stage's local problem, with the weights' l1 term by its exact soft threshold."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from lightning_altmin.arguments import check_number
from lightning_altmin.engines import Gradients
from lightning_altmin.losses import LocalLoss
from lightning_altmin.objective import AltMinObjective
from lightning_altmin.stage import Stage
from lightning_altmin.weights.base import Inputs, WeightProblem
from lightning_altmin.weights.local_gradient import LocalGradient, OptimizerFactory


class _Proximal(Optimizer, ABC):
    """A step of the optimizer this is mixed into, and then the proximal operator of ``lambda_w ||W||_1``."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = super().step(closure)
        bad = getattr(self, "found_inf", None)  # set by the guard of bad batches: 1 if this step is not to be made
        for group in self.param_groups:
            for parameter in group["params"]:
                if group["lambda_w"] > 0 and parameter.dim() > 1 and parameter.grad is not None:
                    threshold = self._rate(parameter, group) * group["lambda_w"]
                    shrunk = (parameter.abs() - (threshold if bad is None else threshold * (1 - bad))).clamp_min_(0)
                    parameter.copy_(shrunk.mul_(parameter.sign()))
        return loss

    @abstractmethod
    def _rate(self, parameter: Tensor, group: dict[str, Any]) -> Tensor | float:
        """Of the step that was made, for each entry."""


class ProximalSGD(_Proximal, SGD):
    r"""``torch.optim.SGD``, then ``W <- S(W, lr * lambda_w)``, with ``S(w, t) = sign(w) max(|w| - t, 0)``.

    Without momentum this is the proximal gradient step (ISTA) on the smooth problem plus ``lambda_w ||W||_1``. The
    threshold acts on parameters with two or more dimensions.

    Args:
        params: As for ``torch.optim.SGD``; a group may have a ``lambda_w`` of its own.
        lr: As for ``torch.optim.SGD``.
        lambda_w: Weight of the l1 norm, >= 0; `ProximalWeights` sets it from the objective.
        settings: As for ``torch.optim.SGD``.
    """

    def __init__(self, params: Iterable[Any], lr: float, lambda_w: float = 0.0, **settings: Any) -> None:
        super().__init__(_with_l1(params, lambda_w), lr=lr, **settings)

    def _rate(self, parameter: Tensor, group: dict[str, Any]) -> Tensor | float:
        rate: float = group["lr"]
        return rate


class ProximalAdam(_Proximal, Adam):
    r"""``torch.optim.Adam``, then the proximal operator of ``lambda_w ||W||_1`` in the metric of Adam's step.

    Adam divides each entry by :math:`d = (\sqrt{\hat v} + eps) / lr`; the minimum of
    :math:`\lambda_w |w| + \frac{d}{2} (w - u)^2` at the point u where its step ends is the soft threshold of u by
    ``lambda_w / d``. (A threshold of ``lr * lambda_w`` would belong to another step, and a subgradient inside Adam
    would be divided by a ``d`` that it has made itself.)

    Args:
        params: As for ``torch.optim.Adam``; a group may have a ``lambda_w`` of its own.
        lr: As for ``torch.optim.Adam``.
        lambda_w: Weight of the l1 norm, >= 0; `ProximalWeights` sets it from the objective.
        settings: As for ``torch.optim.Adam``.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, lambda_w: float = 0.0, **settings: Any) -> None:
        super().__init__(_with_l1(params, lambda_w), lr=lr, **settings)

    def _rate(self, parameter: Tensor, group: dict[str, Any]) -> Tensor | float:
        state = self.state[parameter]
        second = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
        # 1 - beta ** step; a step in single precision would lose digits of it
        correction = -torch.expm1(state["step"].double() * math.log(group["betas"][1]))
        scale: Tensor = (second / correction.to(second.dtype)).sqrt_().add_(group["eps"])
        return group["lr"] / scale


def _with_l1(params: Iterable[Any], lambda_w: float) -> list[dict[str, Any]]:
    groups = list(params)
    check_number("lambda_w", lambda_w, least=0)
    if not groups or not isinstance(groups[0], dict):
        groups = [{"params": groups}]
    return [{"lambda_w": lambda_w, **group} for group in groups]


def proximal_adam(params: Iterable[Any]) -> Optimizer:
    """The optimizer of `LocalGradient`, with the threshold: Adam at rate 0.002, fused over all layers."""
    return ProximalAdam(params, lr=0.002, fused=True)


class ProximalWeights(LocalGradient):
    """`LocalGradient` with exact zeros: the objective's ``lambda_w ||W||_1`` acts after each step, as a soft threshold.

    Args:
        optimizer: As for `LocalGradient`; must make `ProximalSGD` or `ProximalAdam`.
        steps: As for `LocalGradient`.
        inputs: As for `LocalGradient`.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If a factory is not callable.
    """

    def __init__(
        self,
        optimizer: OptimizerFactory | Mapping[str, OptimizerFactory] = proximal_adam,
        steps: int = 1,
        inputs: Inputs = "moved",
    ) -> None:
        super().__init__(optimizer, steps, inputs)
        self._lambda_w = 0.0
        self._layers: list[nn.Module] = []  # of the model that this belongs to; in a list: not registered

    def check(self, stages: Sequence[Stage], objective: AltMinObjective, loss: LocalLoss) -> None:
        """Refuse an objective without an l1 term of the weights, or with another one, and a second model.

        Raises:
            ValueError: If that is so.
        """
        if objective.lambda_w == 0:
            raise ValueError(
                "weights=ProximalWeights needs an objective with lambda_w > 0; without, use LocalGradient()"
            )
        if type(objective).weight_sparsity_gradient is not AltMinObjective.weight_sparsity_gradient:
            raise ValueError(
                f"weights=ProximalWeights knows the l1 term of AltMinObjective, not that of {type(objective).__name__}"
            )
        layers = [stage.affine[0] for stage in stages]
        if self._layers and list(map(id, self._layers)) != list(map(id, layers)):
            raise ValueError("weights: this ProximalWeights belongs to another model; make one for each")
        self._layers, self._lambda_w = layers, objective.lambda_w

    def optimizer(self, stages: Sequence[Stage]) -> Optimizer:
        optimizer = super().optimizer(stages)
        for child in getattr(optimizer, "children", {"": optimizer}).values():
            if not isinstance(child, _Proximal):
                raise TypeError(
                    f"weights=ProximalWeights needs ProximalSGD or ProximalAdam to step, got {type(child).__name__}"
                )
        return optimizer

    def groups(self, stages: Sequence[Stage]) -> list[dict[str, Any]]:
        return [{**group, "lambda_w": self._lambda_w} for group in super().groups(stages)]

    def gradients(self, problem: WeightProblem) -> Gradients:
        """The gradients of the problem without the l1 term."""
        return problem.last_smooth_gradients()
