"""The diagonal of a layer's A, in place of the whole matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_altmin.weights.least_squares_layer import LeastSquaresLayer
from lightning_altmin.weights.ridge import TINY, zero_unless_seen
from lightning_altmin.weights.statistics import Preconditioner


class DiagonalStatistics(Preconditioner):
    r"""``A`` as :math:`\tau D`, ``D`` its diagonal with the ridge and :math:`\tau` the least that makes it no smaller.

    Inputs of one sign have a large common part, of which a diagonal knows nothing: divided by ``D`` alone, a step would
    be too long along it by up to the number of inputs. So the diagonal is multiplied by :math:`\tau \ge 1`, the
    largest eigenvalue of :math:`D^{-1/2} A D^{-1/2}`, found by power iteration, a step of it per renewal. Memory is
    four numbers per input.

    Args:
        layer: The layer.
        dtype: Of the statistics.

    Attributes:
        squares: Discounted sum of the inputs' squares, shape ``(inputs,)``.
        direction: ``u``, the leading generalised eigenvector of ``A`` and ``D``, shape ``(inputs,)``.
        product: Discounted sum of ``a a^T u``, shape ``(inputs,)``.
        inverse: Diagonal of the damped inverse, shape ``(inputs,)``.
    """

    squares: Tensor
    direction: Tensor
    product: Tensor
    inverse: Tensor

    def __init__(self, layer: LeastSquaresLayer, dtype: torch.dtype) -> None:
        super().__init__(layer, dtype)
        self.register_buffer("squares", self.rows.new_zeros(layer.inputs))
        self.register_buffer("direction", torch.full_like(self.squares, layer.inputs**-0.5))
        self.register_buffer("product", torch.zeros_like(self.squares))
        self.register_buffer("inverse", torch.zeros_like(self.squares))

    def add(
        self,
        x: Tensor,
        target: Tensor | None = None,
        weights: Tensor | None = None,
        forgetting: float = 1.0,
        processes: int = 1,
    ) -> None:
        """As `Statistics.add`; targets are not kept, and all samples count."""
        decay = self._decay(forgetting, processes)
        squares, product, rows = self.squares * decay, self.product * decay, self.rows * decay
        with torch.autocast(x.device.type, enabled=False):
            for (part,) in self._layer.chunks(x):
                inputs = part.to(torch.promote_types(part.dtype, torch.float32))
                squares += inputs.square().sum(0)
                product += inputs.t() @ (inputs @ self.direction.to(inputs.dtype))
                rows += inputs.shape[0]
        self.squares, self.product, self.rows = squares, product, rows

    def discount(self, factor: float) -> None:
        self.squares, self.product, self.rows = self.squares * factor, self.product * factor, self.rows * factor

    def renew(self, ridge: float) -> None:
        damped = self.squares + ridge * self.squares.mean().clamp_min(TINY)
        direction, product = self.direction, self.product
        top = (direction * product).sum() / (direction * damped * direction).sum()  # autocast leaves sums alone
        self.inverse = zero_unless_seen(self.rows / (damped * top.clamp_min(1)), self.squares.sum())
        turned = product / damped
        size = turned.norm()
        self.direction = torch.where(size > 0, turned / size.clamp_min(1e-30), direction)
        self.product = damped * self.direction * top  # what A makes of it, once it is the eigenvector

    def preconditioned(self, matrix: Tensor) -> Tensor:
        with torch.autocast(matrix.device.type, enabled=False):
            return matrix.to(self.inverse.dtype) * self.inverse

    def energy(self) -> Tensor:
        return self.squares.sum() + self.product.sum()

    @property
    def shape(self) -> str:
        return str(self.squares.shape[0])

    @property
    def products(self) -> tuple[int, int]:
        return 3 * self.squares.shape[0], 5 * self.squares.shape[0]

    def packed(self) -> Tensor:
        return torch.cat([self.squares, self.product, self.rows.reshape(1)])

    def unpack(self, vector: Tensor) -> None:
        size = len(self.squares)
        self.squares, self.product, self.rows = vector[:size].clone(), vector[size:-1].clone(), vector[-1].clone()
        self.is_share = torch.zeros_like(self.is_share)
