"""The sums of the solve form in half the space: of the symmetric A, one triangle."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_altmin.weights.least_squares_layer import LeastSquaresLayer
from lightning_altmin.weights.statistics import Statistics


class TriangleStatistics(Statistics):
    r"""Sums over all batches seen, as those of `LayerStatistics`, of A only what its symmetry does not give.

    A is cut into four blocks of (nearly) equal size, in rows and columns. Of the two below and above the diagonal one
    is kept, ``across``. Of the two on the diagonal one triangle each: the lower one of the first and the upper one of
    the second fit into one rectangle, as in LAPACK's rectangular full packed format (Gustavson et al. 2010), so that
    no index is needed. A batch is three products of blocks, three quarters of the multiply-adds of all of A.

    Args:
        layer: The layer.
        dtype: Of A. With single precision a sum over n batches is rounded by about ``3e-8 sqrt(n)`` of itself.
        sums_dtype: Of B and of the number of rows; what is solved for is computed in it.

    Attributes:
        triangles: Both triangles of blocks on the diagonal, shape ``(h + 1, h)`` for ``2 h`` inputs and ``(h, h)`` for
            ``2 h - 1``.
        across: The block below the diagonal, shape ``(inputs - h, h)``.
        B: ``sum c a^T``, shape ``(outputs, inputs)``.
    """

    triangles: Tensor
    across: Tensor
    B: Tensor

    def __init__(self, layer: LeastSquaresLayer, dtype: torch.dtype, sums_dtype: torch.dtype) -> None:
        super().__init__(layer, sums_dtype)
        self._inputs = layer.inputs
        self._first = (layer.inputs + 1) // 2
        self._even = 1 - layer.inputs % 2
        zeros = self.rows.new_zeros
        self.register_buffer("triangles", zeros(self._first + self._even, self._first, dtype=dtype))
        self.register_buffer("across", zeros(layer.inputs - self._first, self._first, dtype=dtype))
        self.register_buffer("B", zeros(layer.outputs, layer.inputs))

    def add(
        self,
        x: Tensor,
        target: Tensor | None = None,
        weights: Tensor | None = None,
        forgetting: float = 1.0,
        processes: int = 1,
    ) -> None:
        assert target is not None
        decay = self._decay(forgetting, processes)
        triangles, across, B, rows = (each * decay for each in (self.triangles, self.across, self.B, self.rows))
        others = [target] if weights is None else [target, weights]
        with torch.autocast(x.device.type, enabled=False):
            for part, *other in self._layer.chunks(x, *others):
                inputs = part.to(torch.promote_types(part.dtype, torch.float32))
                weighted = inputs if weights is None else inputs * other[-1].unsqueeze(1)
                first, second = inputs[:, : self._first], inputs[:, self._first :]
                lower, upper = self._halves(triangles)
                lower += (first.t() @ weighted[:, : self._first]).tril_()
                upper += (second.t() @ weighted[:, self._first :]).triu_()
                across += second.t() @ weighted[:, : self._first]
                rows += inputs.shape[0] if weights is None else other[-1].sum()
                B += self._layer.output_rows(other[0]).to(inputs.dtype).t() @ weighted
        self.triangles, self.across, self.B, self.rows = triangles, across, B, rows

    def discount(self, factor: float) -> None:
        self.triangles, self.across = self.triangles * factor, self.across * factor
        self.B, self.rows = self.B * factor, self.rows * factor

    def sums(self) -> tuple[Tensor, Tensor]:
        """``A``, made for the occasion, and ``B`` of all that is to be solved for."""
        lower, upper = self._halves(self.triangles.to(self.B.dtype))
        lower, upper = lower.tril(), upper.triu()
        A = self.B.new_empty(self._inputs, self._inputs)
        A[: self._first, : self._first] = lower + lower.tril(-1).t()
        A[self._first :, self._first :] = upper + upper.triu(1).t()
        A[self._first :, : self._first] = self.across
        A[: self._first, self._first :] = self.across.t()
        return A, self.B

    def energy(self) -> Tensor:
        lower, upper = self._halves(self.triangles)
        return lower.diagonal().sum() + upper.diagonal().sum()

    @property
    def shape(self) -> str:
        return f"a triangle of {self._inputs}x{self._inputs}, {self.B.shape[0]}x{self.B.shape[1]}"

    @property
    def products(self) -> tuple[int, int]:
        blocks = self._first**2 + (self._inputs - self._first) ** 2 + self.across.numel()
        return blocks + self.B.numel(), self._inputs**3

    def packed(self) -> Tensor:
        parts = (self.triangles, self.across, self.B, self.rows)
        return torch.cat([part.to(self.B.dtype).reshape(-1) for part in parts])

    def unpack(self, vector: Tensor) -> None:
        names = ("triangles", "across", "B", "rows")
        sizes = [getattr(self, name).numel() for name in names]
        for name, whole in zip(names, torch.split(vector, sizes), strict=True):
            held = getattr(self, name)
            setattr(self, name, whole.reshape(held.shape).to(held.dtype, copy=True))
        self.is_share = torch.zeros_like(self.is_share)

    def _halves(self, triangles: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the rectangle: the first block lies below its own diagonal, the second above."""
        second = self._inputs - self._first
        if self._even:
            return triangles[1:], triangles[:-1]
        return triangles, triangles[:second, 1:]
