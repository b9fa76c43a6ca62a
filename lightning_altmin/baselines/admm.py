"""Training without gradients by ADMM, offline (Taylor, Burmeister, Xu, Singh, Patel and Goldstein 2016)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_altmin.arguments import check_count, check_number
from lightning_altmin.baselines.offline import Layer, OfflineModule, Variables, forward_variables
from lightning_altmin.baselines.output_losses import Hinge, OutputLoss, check_output_loss
from lightning_altmin.codes.elementwise import activation_move
from lightning_altmin.metrics import Metrics
from lightning_altmin.weights.ridge import ridge_solution


class ADMMModule(OfflineModule):
    r"""ADMM with a multiplier on the output only ("Training Neural Networks Without Gradients", ICML 2016).

    With ``z_l`` before and ``a_l`` after the activation of layer ``l``, ``a_0 = x``, and no ``a`` for the last layer N,

    .. math::
        \text{loss}(z_N, y) + \langle z_N, \lambda \rangle + \sum_{l} \frac{\beta}{2} \|z_l - W_l a_{l-1} - b_l\|^2
            + \sum_{l<N} \frac{\gamma}{2} \|a_l - s(z_l)\|^2 .

    A sweep goes up: ``W_l`` and ``b_l`` together, ``a_l``, ``z_l`` for ``l = 1, ..., N``, each the exact minimum with
    all others held; then ``lambda`` grows by ``beta (z_N - W_N a_{N-1} - b_N)``. (The paper writes the penalties
    without the half.)

    Args:
        network: A multilayer perceptron of ReLU, LeakyReLU, Sigmoid, Tanh or Softplus units.
        loss: `Hinge` (the default, the paper's) or `SquaredError`.
        beta: Price of a difference between ``z`` and ``W a + b``, > 0; 1 in the paper.
        gamma: Price of a difference between ``a`` and ``s(z)``, > 0; 10 in the paper.
        warm_start: Sweeps before the first multiplier step, >= 0.
        ridge: Added to the normal equations of the weights, relative to their mean diagonal, > 0: the pseudo-inverse
            of the paper is its limit at 0.
        metrics: As for `AltMinModule`; accuracy if not given, where targets are classes, or 0 and 1 for a hinge.

    Raises:
        ValueError: If a setting is out of its range, or the network is something else or has a frozen layer.
        TypeError: If the loss has no proximal operator.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: OutputLoss | None = None,
        beta: float = 1.0,
        gamma: float = 10.0,
        warm_start: int = 10,
        ridge: float = 1e-6,
        metrics: Metrics | None = None,
    ) -> None:
        loss = Hinge() if loss is None else loss
        check_output_loss(loss, type(self).__name__)
        super().__init__(network, loss, metrics)
        for name, value in (("beta", beta), ("gamma", gamma), ("ridge", ridge)):
            check_number(name, value, above=0)
        check_count("warm_start", warm_start, 0)
        self.output_loss = loss
        self.beta, self.gamma, self.warm_start, self.ridge = beta, gamma, warm_start, ridge

    def begin(self, x: Tensor, y: Tensor) -> Variables:
        before, after = forward_variables(self.layers, x)
        # The inputs do not change, so neither do their products.
        return {"z": before, "a": after[:-1], "multiplier": [torch.zeros_like(before[-1])], "products": [_products(x)]}

    def sweep(self, x: Tensor, y: Tensor, number: int) -> None:
        z, a, (multiplier,) = self.variables["z"], self.variables["a"], self.variables["multiplier"]
        top = len(self.layers) - 1
        for level, layer in enumerate(self.layers):
            below = a[level - 1] if level > 0 else x
            products = self.variables["products"][0] if level == 0 else _products(below)
            layer.set(*self.weights(layer, below, z[level], products))
            if level < top:
                above = self.layers[level + 1]
                a[level] = self.activations(above, z[level], z[level + 1])
                z[level] = self.preactivations(above.activation, a[level], layer.linear(below))
        predicted = self.layers[top].linear(a[top - 1] if top > 0 else x)
        z[top] = self.output(predicted, multiplier, y)
        if number >= self.warm_start:
            multiplier += self.beta * (z[top] - predicted)

    # ---------------------------------------------------------------- the blocks

    def weights(self, layer: Layer, below: Tensor, z: Tensor, products: Tensor) -> tuple[Tensor, Tensor | None]:
        """``W_l`` and, in a layer that has one, ``b_l``: least squares."""
        targets = (below.t() @ z).t().double()
        if layer.linear.bias is None:
            return ridge_solution(products[:-1, :-1], targets, self.ridge), None
        totals = z.sum(0, dtype=torch.float64).unsqueeze(1)
        solution = ridge_solution(products, torch.cat([targets, totals], 1), self.ridge)
        return solution[:, :-1], solution[:, -1]

    def activations(self, above: Layer, z: Tensor, z_above: Tensor) -> Tensor:
        """``a_l``, from ``z_l`` and ``z_{l+1}``: one linear system for all samples."""
        weight = above.weight.double()
        system = self.beta * weight.t() @ weight
        system.diagonal().add_(self.gamma)
        inverse = torch.linalg.inv(system)
        asked = self.beta * (z_above - above.bias).double() @ weight + self.gamma * above.activation(z).double()
        return (asked @ inverse).to(z.dtype)

    def preactivations(self, activation: nn.Module, a: Tensor, predicted: Tensor) -> Tensor:
        """A hidden ``z_l``: unit by unit. ``predicted`` is ``W_l a_{l-1} + b_l``."""
        return predicted + activation_move(activation, predicted, a - activation(predicted), self.beta / self.gamma)

    def output(self, predicted: Tensor, multiplier: Tensor, y: Tensor) -> Tensor:
        """``z_N``: the multiplier shifts what the loss's proximal operator is asked for."""
        return self.output_loss.prox(predicted - multiplier / self.beta, self.beta, y)

    # ---------------------------------------------------------------- its value

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        z, a, (multiplier,) = self.variables["z"], self.variables["a"], self.variables["multiplier"]
        value = self.output_loss.total(z[-1], y) + (z[-1] * multiplier).sum()
        for level, layer in enumerate(self.layers):
            below = a[level - 1] if level > 0 else x
            value = value + 0.5 * self.beta * (z[level] - layer.linear(below)).square().sum()
            if level < len(a):
                after = self.layers[level + 1].activation(z[level])
                value = value + 0.5 * self.gamma * (a[level] - after).square().sum()
        return value


def _products(below: Tensor) -> Tensor:
    """Sums over samples of the products of a layer's inputs, a constant 1 for the bias among them."""
    rows = below.double()
    totals = rows.sum(0, keepdim=True)
    count = rows.new_full((1, 1), len(rows))
    return torch.cat([torch.cat([rows.t() @ rows, totals]), torch.cat([totals.t(), count])], 1)
