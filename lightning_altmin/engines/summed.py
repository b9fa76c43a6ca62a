"""A stage's map for gradients that were divided by a number which differs between processes."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_altmin.engines.base import Gradients, StageMap


class SummedMap(StageMap):
    """A map whose derivatives are taken of sums over samples, given gradients of their mean on this process.

    Where samples of several processes are mixed, derivatives are right for the gradient of one function of all samples.
    A mean over a process's own samples is not that, the sum is; and what comes back is linear, so it can be divided.

    Args:
        inner: The map itself.
        weight: What the mean was divided by, a scalar.
    """

    def __init__(self, inner: StageMap, weight: Tensor) -> None:
        self._inner, self._weight = inner, weight

    def output(self) -> Tensor:
        return self._inner.output()

    def change(self, base_output: Tensor) -> Tensor:
        return self._inner.change(base_output)

    def residual(self, base_output: Tensor, target_move: Tensor, spend: bool = False) -> Tensor:
        return self._inner.residual(base_output, target_move, spend)

    def layer_input(self, layer: nn.Module) -> Tensor:
        return self._inner.layer_input(layer)

    def input_gradient(self, grad_output: Tensor) -> Tensor:
        return self._inner.input_gradient(grad_output * self._weight).div_(self._weight)

    def parameter_gradients(self, grad_output: Tensor) -> Gradients:
        gradients = self._inner.parameter_gradients(grad_output * self._weight)
        return [(parameter, gradient / self._weight) for parameter, gradient in gradients]
