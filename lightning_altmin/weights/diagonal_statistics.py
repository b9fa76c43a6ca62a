"""The diagonal of a wide layer's A, in place of the whole matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_altmin.weights.least_squares_layer import LeastSquaresLayer
from lightning_altmin.weights.statistics import Preconditioner


class DiagonalStatistics(Preconditioner):
    MODE = "plain"
    squares: Tensor
    direction: Tensor
    product: Tensor
    inverse: Tensor

    def __init__(self, layer: LeastSquaresLayer, dtype: torch.dtype) -> None:
        super().__init__(layer, dtype)
        self.register_buffer("squares", self.rows.new_zeros(layer.inputs))
        self.register_buffer("direction", self.rows.new_ones(layer.inputs))
        self.register_buffer("product", torch.zeros_like(self.squares))
        self.register_buffer("inverse", torch.zeros_like(self.squares))

    def add(
        self,
        x: Tensor,
        target: Tensor | None = None,
        mask: Tensor | None = None,
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
        rows = self.rows.clamp_min(1e-30)
        damped = self.squares + ridge * self.squares.mean()
        damped = damped.clamp_min(1e-30)
        moved = self.product / damped
        top = (self.direction @ self.product) / (self.direction @ (damped * self.direction))
        self.direction = moved / moved.norm().clamp_min(1e-30)
        self.product = top * damped * self.direction
        self.inverse = rows / damped
        if self.MODE == "top":
            self.inverse = self.inverse / top.clamp_min(1)
        if self.MODE == "root":
            self.inverse = self.inverse / top.clamp_min(1).sqrt()

    def preconditioned(self, matrix: Tensor) -> Tensor:
        with torch.autocast(matrix.device.type, enabled=False):
            return matrix.to(self.inverse.dtype) * self.inverse

    def energy(self) -> Tensor:
        return self.squares.sum()

    @property
    def shape(self) -> str:
        return str(self.squares.shape[0])

    @property
    def products(self) -> tuple[int, int]:
        return 3 * self.squares.shape[0], 0

    def packed(self) -> Tensor:
        return torch.cat([self.squares, self.product, self.rows.reshape(1)])

    def unpack(self, vector: Tensor) -> None:
        size = self.squares.shape[0]
        self.squares, self.product, self.rows = vector[:size].clone(), vector[size:-1].clone(), vector[-1].clone()
        self.is_share = torch.zeros_like(self.is_share)
