"""The method of auxiliary coordinates, offline (Carreira-Perpinan and Wang 2014)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_altmin.arguments import check_count, check_number
from lightning_altmin.baselines.offline import OfflineModule, Variables, forward_variables
from lightning_altmin.metrics import Metrics

SAMPLES_PER_PROBLEM = 250
"""Samples whose coordinates share an L-BFGS run. One each would be exact, too, but slow."""


class MACModule(OfflineModule):
    r"""MAC by a quadratic penalty ("Distributed optimization of deeply nested systems", AISTATS 2014).

    Every hidden layer of every sample has coordinates ``z_l``, values of its units *after* the activation, and

    .. math::
        E = \text{loss}(f_N(z_{N-1}), y) + \frac{\mu}{2} \sum_{l<N} \|z_l - f_l(z_{l-1})\|^2, \qquad z_0 = x .

    A sweep lowers E over the weights (W step: each layer is a problem of its own) and then over all coordinates (Z
    step: each sample is). ``mu`` then grows, which drives the coordinates to the values of the forward pass. When
    training ends, `post_process` refits the output layer at those values. It is not part of a sweep: a checkpoint that
    a callback writes during training has the output layer as the sweeps left it, so that a resumed run goes on as if
    it had not stopped. Save with ``trainer.save_checkpoint`` after ``fit``, or test without ``ckpt_path``, for the
    network that is post-processed.

    Each problem is lowered by L-BFGS with a line search from where the last sweep left it, in place of the paper's
    Gauss-Newton method; neither step can raise E. The Z step takes `SAMPLES_PER_PROBLEM` samples at a time, so that a
    line search answers for few of them and the memory of L-BFGS does not grow with the data.

    Args:
        network: A multilayer perceptron of ReLU, LeakyReLU, Sigmoid, Tanh or Softplus units.
        loss: ``loss(output, target)``, a mean over samples; cross-entropy if not given.
        mu: Price of a difference between a coordinate and its layer's output at first, > 0.
        growth: What ``mu`` is multiplied by, >= 1.
        every: Sweeps between two of these, >= 1.
        iterations: L-BFGS iterations per problem and sweep, >= 1.
        metrics: As for `AltMinModule`.

    Raises:
        ValueError: If a setting is out of its range, or the network is something else.
    """

    mu: Tensor

    def __init__(
        self,
        network: nn.Module,
        loss: nn.Module | Callable[[Tensor, Any], Tensor] | None = None,
        mu: float = 1.0,
        growth: float = 2.0,
        every: int = 5,
        iterations: int = 10,
        metrics: Metrics | None = None,
    ) -> None:
        super().__init__(network, nn.CrossEntropyLoss() if loss is None else loss, metrics)
        check_number("mu", mu, above=0)
        check_number("growth", growth, least=1)
        check_count("every", every)
        check_count("iterations", iterations)
        self.first_mu, self.growth, self.every, self.iterations = mu, growth, every, iterations
        self.register_buffer("mu", torch.tensor(float(mu), dtype=torch.float64))

    def begin(self, x: Tensor, y: Tensor) -> Variables:
        return {"z": forward_variables(self.layers, x)[1][:-1]}

    def sweep(self, x: Tensor, y: Tensor, number: int) -> None:
        self.lower_weights(x, y)
        self.lower_coordinates(x, y)
        if (number + 1) % self.every == 0:
            self.mu *= self.growth

    def lower_weights(self, x: Tensor, y: Tensor) -> None:
        """The W step. Layers do not depend on one another."""
        for level in range(len(self.layers)):
            self._lower_layer(level, x, y, self.variables["z"])

    def lower_coordinates(self, x: Tensor, y: Tensor) -> None:
        """The Z step, over the coordinates of all layers at once. Samples do not depend on one another."""
        z = self.variables["z"]
        # The first layer's output is the same for all coordinates, and costs more than the rest of E.
        first = self.layers[1].activation(self.layers[0].linear(x))
        for begin in range(0, len(x), SAMPLES_PER_PROBLEM):
            rows = slice(begin, begin + SAMPLES_PER_PROBLEM)
            self._lower_some(first[rows], y[rows], [t[rows] for t in z])

    def post_process(self, x: Tensor, y: Tensor) -> None:
        """Put coordinates at the values of the forward pass, where E is the network's loss, and refit the output."""
        self.variables["z"] = forward_variables(self.layers, x)[1][:-1]
        self._lower_layer(len(self.layers) - 1, x, y, self.variables["z"])

    def on_fit_start(self) -> None:
        """Begin with the first ``mu``, unless a run goes on."""
        super().on_fit_start()
        if not self.resuming:
            self.mu.fill_(self.first_mu)

    @torch.no_grad()
    def on_train_end(self) -> None:
        """Post-processing."""
        if self._samples is not None:
            self.post_process(*self._samples)

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        return self._value(x, y, self.variables["z"])

    # ---------------------------------------------------------------- the terms of E

    def _lower_some(self, first: Tensor, y: Tensor, z: list[Tensor]) -> None:
        """Lower E over the coordinates of some samples, whose first layer's output is ``first``."""

        def value() -> Tensor:
            above = [self._term(level, None, y, z) for level in range(1, len(self.layers))]
            return torch.stack([self._penalty(z[0], first), *above]).sum()

        lower(value, z, self.iterations)

    def _lower_layer(self, level: int, x: Tensor, y: Tensor, z: list[Tensor]) -> None:
        lower(lambda: self._term(level, x, y, z), list(self.layers[level].linear.parameters()), self.iterations)

    def _value(self, x: Tensor, y: Tensor, z: list[Tensor]) -> Tensor:
        return torch.stack([self._term(level, x, y, z) for level in range(len(self.layers))]).sum()

    def _term(self, level: int, x: Tensor | None, y: Tensor, z: list[Tensor]) -> Tensor:
        """The one term of E that has this layer's weights, summed over samples. ``x`` is for the first layer."""
        below = z[level - 1] if level > 0 else x
        output = self.layers[level].linear(below)
        if level == len(self.layers) - 1:
            return self._local_loss.total(output, y)
        return self._penalty(z[level], self.layers[level + 1].activation(output))

    def _penalty(self, z: Tensor, fitted: Tensor) -> Tensor:
        """What a difference between coordinates and their layer's output costs."""
        return 0.5 * self.mu.to(z.dtype) * (z - fitted).square().sum()


def lower(value: Callable[[], Tensor], variables: Sequence[Tensor], iterations: int) -> None:
    """Lower a function by L-BFGS, in place; where its line search went wrong, the variables stay as they were.

    Args:
        value: The function of the variables as they are when it is called.
        variables: What to change.
        iterations: At most this many.
    """
    before, required = [v.detach().clone() for v in variables], [v.requires_grad for v in variables]
    for variable in variables:
        variable.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        variables, max_iter=iterations, line_search_fn="strong_wolfe", tolerance_grad=0.0, tolerance_change=0.0
    )

    def closure() -> Tensor:
        with torch.enable_grad():
            found = value()
            # Not backward(): the function may depend on other weights, whose .grad is none of its business.
            gradients = torch.autograd.grad(found, variables)
        for variable, gradient in zip(variables, gradients, strict=True):
            variable.grad = gradient
        return found.detach()

    first = value()
    optimizer.step(closure)  # type: ignore[no-untyped-call]
    for variable, requires_grad in zip(variables, required, strict=True):
        variable.requires_grad_(requires_grad)
        variable.grad = None
    if not bool(value() <= first):
        for variable, old in zip(variables, before, strict=True):
            variable.data.copy_(old)
