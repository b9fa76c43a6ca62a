"""The leading directions of a wide layer's inputs, in place of the whole matrix of their products."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_altmin.weights.least_squares_layer import LeastSquaresLayer
from lightning_altmin.weights.ridge import TINY, zero_unless_seen
from lightning_altmin.weights.statistics import Preconditioner


class LowRankStatistics(Preconditioner):
    r"""``A`` as :math:`U diag(v) U^\top + \rho (I - U U^\top)`: leading directions, and the mean of the rest.

    What is summed is the product ``A U`` with directions that stay the same from one renewal to the next; from it a
    renewal finds better ones, by the Nystrom approximation :math:`A U (U^\top A U)^{-1} U^\top A`. So the directions
    follow those of ``A`` by subspace iteration. The trace is exact, and with it ``rho``. Memory is
    ``2 * inputs * rank`` where all of A and its inverse take ``2 * inputs^2``.

    Args:
        layer: The layer.
        rank: Number of directions, >= 1 and below the layer's inputs.
        dtype: Of the statistics.

    Attributes:
        directions: ``U``, orthonormal columns, shape ``(inputs, rank)``.
        product: Discounted sum of ``a a^T U``, shape ``(inputs, rank)``.
        trace: Discounted sum of all squares, a scalar.
        gain, base: The damped inverse is ``U diag(gain) U^T + base I``; both zero until there is one.
    """

    directions: Tensor
    product: Tensor
    trace: Tensor
    gain: Tensor
    base: Tensor

    def __init__(self, layer: LeastSquaresLayer, rank: int, dtype: torch.dtype) -> None:
        super().__init__(layer, dtype)
        # The same start in every run, process and device.
        start = torch.randn(layer.inputs, rank, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.register_buffer("directions", torch.linalg.qr(start).Q.contiguous().to(self.rows.device, dtype))
        self.register_buffer("product", torch.zeros_like(self.directions))
        self.register_buffer("gain", self.rows.new_zeros(rank))
        self.register_buffer("trace", self.rows.clone())
        self.register_buffer("base", self.rows.clone())

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
        product, trace, rows = self.product * decay, self.trace * decay, self.rows * decay
        with torch.autocast(x.device.type, enabled=False):
            for (part,) in self._layer.chunks(x):
                inputs = part.to(torch.promote_types(part.dtype, torch.float32))
                product += inputs.t() @ (inputs @ self.directions.to(inputs.dtype))
                trace += inputs.square().sum()
                rows += inputs.shape[0]
        self.product, self.trace, self.rows = product, trace, rows

    def discount(self, factor: float) -> None:
        self.product, self.trace, self.rows = self.product * factor, self.trace * factor, self.rows * factor

    def renew(self, ridge: float) -> None:
        with torch.autocast(self.rows.device.type, enabled=False):
            values = self._turn()
        rows, (inputs, rank) = self.rows.clamp_min(1e-30), self.directions.shape
        rest = (self.trace - values.sum()).clamp_min(0) / (inputs - rank)
        damping = ridge * (self.trace / inputs).clamp_min(TINY)
        self.base = zero_unless_seen(rows / (rest + damping), self.trace)
        self.gain = zero_unless_seen(rows / (values + damping), self.trace) - self.base

    def _turn(self) -> Tensor:
        """Set the directions to the eigenvectors of the Nystrom approximation; returns its eigenvalues."""
        small = self.directions.t() @ self.product
        basis, R = torch.linalg.qr(self.product)
        finite = small.sum().isfinite() & R.sum().isfinite()  # eigh raises otherwise; a bad batch shows in the trace
        small = torch.where(finite, (small + small.t()) / 2, torch.zeros_like(small))
        sizes, turn = torch.linalg.eigh(small)
        # Directions that no sample has reached are not divided by.
        floor = sizes[-1:].clamp_min(torch.finfo(sizes.dtype).tiny) * len(sizes) * torch.finfo(sizes.dtype).eps
        half = R @ (turn * sizes.clamp_min(floor).rsqrt().where(sizes > floor, 0.0))
        half = torch.where(finite, half, torch.zeros_like(half))
        values, inner = torch.linalg.eigh(half @ half.t())
        values = values.clamp_min(0)
        self.directions = (basis @ inner).contiguous()
        self.product = self.directions * values
        return values

    def preconditioned(self, matrix: Tensor) -> Tensor:
        with torch.autocast(matrix.device.type, enabled=False):
            matrix = matrix.to(self.directions.dtype)
            return torch.addmm(matrix * self.base, (matrix @ self.directions) * self.gain, self.directions.t())

    def energy(self) -> Tensor:
        return self.trace + self.product.sum()

    @property
    def shape(self) -> str:
        return f"{self.directions.shape[0]}x{self.directions.shape[1]}"

    @property
    def products(self) -> tuple[int, int]:
        inputs, rank = self.directions.shape
        return 2 * inputs * rank, 4 * inputs * rank**2

    def packed(self) -> Tensor:
        return torch.cat([self.product.reshape(-1), self.trace.reshape(1), self.rows.reshape(1)])

    def unpack(self, vector: Tensor) -> None:
        self.product = vector[:-2].reshape(self.product.shape).clone()
        self.trace, self.rows = vector[-2].clone(), vector[-1].clone()
        self.is_share = torch.zeros_like(self.is_share)
