"""The leading directions of a wide layer's inputs, in place of the whole matrix of their products."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_altmin.weights.least_squares_layer import LeastSquaresLayer


class LowRankStatistics(nn.Module):
    r"""``A`` as :math:`U diag(v) U^\top + \rho (I - U U^\top)`: leading directions, and the mean of the rest.

    Each batch is one step of subspace iteration on ``f A + sum a a^T`` from the directions known so far, then a
    Rayleigh-Ritz projection. The trace is exact, and with it ``rho``. Memory is ``inputs * rank`` where all of A takes
    ``inputs^2``.

    Args:
        layer: The layer.
        rank: Number of directions, >= 1 and below the layer's inputs.
        dtype: Of the statistics.

    Attributes:
        directions: Orthonormal columns, shape ``(inputs, rank)``.
        values: Discounted sums of squares along them, shape ``(rank,)``.
        trace: Discounted sum of all squares, a scalar.
        rows: Discounted number of rows, a scalar.
        gain, base: The damped inverse is ``U diag(gain) U^T + base I``; both zero until there is one.
    """

    replaces_buffers = True
    is_share = False

    directions: Tensor
    values: Tensor
    trace: Tensor
    rows: Tensor
    gain: Tensor
    base: Tensor

    def __init__(self, layer: LeastSquaresLayer, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        weight = layer.layer.weight
        # The same start in every run, process and device.
        start = torch.randn(layer.inputs, rank, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.register_buffer("directions", torch.linalg.qr(start).Q.contiguous().to(weight.device, dtype))
        for name in ("values", "gain"):
            self.register_buffer(name, torch.zeros(rank, dtype=dtype, device=weight.device))
        for name in ("trace", "rows", "base"):
            self.register_buffer(name, torch.zeros((), dtype=dtype, device=weight.device))
        self._layer = layer

    def add(self, x: Tensor, target: Tensor | None, mask: Tensor | None, forgetting: float, processes: int = 1) -> None:
        """Discount what is there and add a batch; targets are not kept.

        Raises:
            ValueError: With several processes: leading directions cannot be summed.
        """
        if processes > 1:
            raise ValueError(f"rank is for one process, there are {processes}; leave it out to keep all of A")
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            parts = [rows.to(dtype) for (rows,) in self._layer.chunks(x)]
            turned = torch.linalg.qr(self._times(parts, self.directions, forgetting)).Q
            small = turned.t() @ self._times(parts, turned, forgetting)
            self.trace = self.trace * forgetting + sum(rows.square().sum() for rows in parts)
            self.rows = self.rows * forgetting + sum(rows.shape[0] for rows in parts)
            finite = small.sum().isfinite()  # eigh raises for what is not; a bad batch shows in the trace
            values, inner = torch.linalg.eigh(torch.where(finite, (small + small.t()) / 2, torch.zeros_like(small)))
            self.directions, self.values = (turned @ inner).contiguous(), values.clamp_min(0)

    def _times(self, parts: list[Tensor], matrix: Tensor, forgetting: float) -> Tensor:
        """``(f A + sum a a^T) @ matrix``, without the part of A that is not known by direction."""
        product = (self.directions * (self.values * forgetting)) @ (self.directions.t() @ matrix)
        for rows in parts:
            product = product + (rows.t() @ (rows @ matrix.to(rows.dtype))).to(product.dtype)
        return product

    def discount(self, factor: float) -> None:
        """Let all that has been seen so far count ``factor`` times as much."""
        self.values, self.trace, self.rows = self.values * factor, self.trace * factor, self.rows * factor

    def renew(self, ridge: float) -> None:
        """Compute the damped inverse of the mean of ``a a^T``; ``ridge`` is relative to the mean of its diagonal."""
        rows, (inputs, rank) = self.rows.clamp_min(1e-30), self.directions.shape
        rest = (self.trace - self.values.sum()).clamp_min(0) / (inputs - rank)
        damping = ridge * self.trace / inputs
        self.base = rows / (rest + damping)
        self.gain = rows / (self.values + damping) - self.base

    def preconditioned(self, matrix: Tensor) -> Tensor:
        """``matrix @ (A + ridge)^-1``, shape ``(any, inputs)``."""
        with torch.autocast(matrix.device.type, enabled=False):
            matrix = matrix.to(self.directions.dtype)
            return torch.addmm(matrix * self.base, (matrix @ self.directions) * self.gain, self.directions.t())

    def energy(self) -> Tensor:
        """A scalar that is finite if the statistics are."""
        return self.trace + self.directions.sum()

    @property
    def shape(self) -> str:
        """What is kept, for a table."""
        return f"{self.directions.shape[0]}x{self.directions.shape[1]}"

    @property
    def products(self) -> tuple[int, int]:
        """Multiply-adds per row measured, and per renewal."""
        inputs, rank = self.directions.shape
        return 4 * inputs * rank, 4 * inputs * rank**2
