"""Block coordinate descent with three-splitting, offline (Zeng, Lau, Lin and Yao 2019)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_altmin.arguments import check_number
from lightning_altmin.baselines.offline import Layer, OfflineModule, Variables, forward_variables
from lightning_altmin.baselines.output_losses import OutputLoss, SquaredError, check_output_loss
from lightning_altmin.codes.elementwise import activation_move
from lightning_altmin.metrics import Metrics

_ROWS = 4096  # of samples whose elementwise problems are solved at a time


class BCDModule(OfflineModule):
    r"""Three-splitting BCD ("Global Convergence of Block Coordinate Descent in Deep Learning", ICML 2019).

    With ``u_l`` before and ``v_l`` after the activation of layer ``l`` (none after the last layer), and ``v_0 = x``,

    .. math::
        F = \text{loss}(v_N, y) + \sum_l \frac{\gamma}{2} \|v_l - s(u_l)\|^2
            + \frac{\rho}{2} \|u_l - W_l v_{l-1} - b_l\|^2 .

    A sweep minimises over ``v_l``, ``u_l``, ``W_l``, ``b_l`` for ``l = N, ..., 1``, each exactly, with all others held.
    A term ``alpha/2`` times the squared distance to the old value is added for ``v_N``, the hidden ``u_l``, ``W_l`` and
    ``b_l``. So F never rises.

    Args:
        network: A multilayer perceptron of ReLU, LeakyReLU, Sigmoid, Tanh or Softplus units. `small_weights` gives it
            the initial weights of the paper's experiments.
        loss: `SquaredError` (the default) or `Hinge`.
        gamma: Price of a difference between ``v`` and ``s(u)``, > 0.
        rho: Price of a difference between ``u`` and ``W v + b``, > 0.
        alpha: Price of leaving the old value, > 0.
        metrics: As for `AltMinModule`; accuracy if not given, where targets are classes, or 0 and 1 for a hinge.

    Raises:
        ValueError: If a price is not positive, or the network is something else or has a frozen layer.
        TypeError: If the loss has no proximal operator.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: OutputLoss | None = None,
        gamma: float = 1.0,
        rho: float = 1.0,
        alpha: float = 5.0,
        metrics: Metrics | None = None,
    ) -> None:
        loss = SquaredError() if loss is None else loss
        check_output_loss(loss, type(self).__name__)
        super().__init__(network, loss, metrics)
        for name, value in (("gamma", gamma), ("rho", rho), ("alpha", alpha)):
            check_number(name, value, above=0)
        self.output_loss = loss
        self.gamma, self.rho, self.alpha = gamma, rho, alpha

    def begin(self, x: Tensor, y: Tensor) -> Variables:
        before, after = forward_variables(self.layers, x)
        return {"u": before, "v": after}

    def sweep(self, x: Tensor, y: Tensor, number: int) -> None:
        u, v = self.variables["u"], self.variables["v"]
        top = len(self.layers) - 1
        for level in range(top, -1, -1):
            layer = self.layers[level]
            below = v[level - 1] if level > 0 else x
            predicted = layer.linear(below)
            if level == top:
                v[level] = self.output(u[level], v[level], y)
                u[level] = predicted.mul_(self.rho).add_(v[level], alpha=self.gamma).div_(self.rho + self.gamma)
            else:
                above = self.layers[level + 1]
                v[level] = self.activations(above, u[level], u[level + 1])
                u[level] = self.preactivations(above.activation, v[level], predicted, u[level])
            layer.set(*self.weights(layer, below, u[level]))

    # ---------------------------------------------------------------- the blocks

    def output(self, u: Tensor, v: Tensor, y: Tensor) -> Tensor:
        """The output variable ``v_N``."""
        weight = self.gamma + self.alpha
        return self.output_loss.prox((self.gamma * u + self.alpha * v) / weight, weight, y)

    def activations(self, above: Layer, u: Tensor, u_above: Tensor) -> Tensor:
        """A hidden ``v_l``, from ``u_l`` and ``u_{l+1}``: one linear system for all samples."""
        weight = above.weight.double()
        system = self.rho * weight.t() @ weight
        system.diagonal().add_(self.gamma)
        inverse = torch.linalg.inv(system)
        from_above = (self.rho * weight @ inverse).to(u.dtype)
        v = (u_above - above.bias) @ from_above
        return v.addmm_(above.activation(u), (self.gamma * inverse).to(u.dtype))

    def preactivations(self, activation: nn.Module, v: Tensor, predicted: Tensor, u: Tensor) -> Tensor:
        """A hidden ``u_l``: unit by unit. ``predicted`` is ``W_l v_{l-1} + b_l``."""
        centre = predicted.mul_(self.rho).add_(u, alpha=self.alpha).div_(self.rho + self.alpha)
        weight = (self.rho + self.alpha) / self.gamma
        for c, wanted in zip(torch.split(centre, _ROWS), torch.split(v, _ROWS), strict=True):
            c += activation_move(activation, c, wanted - activation(c), weight)
        return centre

    def weights(self, layer: Layer, below: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """``W_l`` with the old bias, then ``b_l`` with the new ``W_l``."""
        old, bias = layer.weight.double(), layer.bias.double()
        system = (below.t() @ below).double().mul_(self.rho)
        system.diagonal().add_(self.alpha)
        pull = ((u - layer.bias).t() @ below).double().mul_(self.rho).add_(old, alpha=self.alpha)
        weight = torch.linalg.solve(system, pull, left=False)
        # A bias that does not exist stays zero.
        if layer.linear.bias is None:
            return weight, bias
        totals = u.sum(0, dtype=torch.float64) - weight @ below.sum(0, dtype=torch.float64)
        return weight, (self.alpha * bias + self.rho * totals) / (self.rho * len(u) + self.alpha)

    # ---------------------------------------------------------------- its value

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        u, v = self.variables["u"], self.variables["v"]
        value = self.output_loss.total(v[-1], y)
        for level, layer in enumerate(self.layers):
            below = v[level - 1] if level > 0 else x
            value = value + 0.5 * self.rho * (u[level] - layer.linear(below)).square().sum()
            after = self.layers[level + 1].activation(u[level]) if level + 1 < len(self.layers) else u[level]
            value = value + 0.5 * self.gamma * (v[level] - after).square().sum()
        return value


def small_weights(network: nn.Module, std: float = 0.01, bias: float = 0.1) -> nn.Module:
    """Give every Linear normal weights of this deviation and this bias, in place; returns the network."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.constant_(module.bias, bias)
    return network
