"""All of A, and B: sums of products of a layer's inputs, and of its targets with its inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_altmin.weights.least_squares_layer import LeastSquaresLayer
from lightning_altmin.weights.ridge import damped_inverse
from lightning_altmin.weights.statistics import Preconditioner


class LayerStatistics(Preconditioner):
    r"""Discounted sums over all batches seen, :math:`A \leftarrow f A + \sum a a^\top` once per batch.

    Args:
        layer: The layer.
        dtype: Of the sums. Products are computed in the inputs' own precision, at least single.
        targets: Whether to keep B.
        inverse: Whether to keep a damped inverse.

    Attributes:
        A: ``sum a a^T``, shape ``(inputs, inputs)``.
        B: ``sum c a^T``, shape ``(outputs, inputs)``, or ``None``.
        inverse: Damped inverse of ``A / rows``, or ``None``.
    """

    A: Tensor
    B: Tensor | None
    inverse: Tensor | None

    def __init__(self, layer: LeastSquaresLayer, dtype: torch.dtype, targets: bool, inverse: bool) -> None:
        super().__init__(layer, dtype)
        square = torch.zeros(layer.inputs, layer.inputs, dtype=dtype, device=self.rows.device)
        self.register_buffer("A", square)
        self.register_buffer("B", square.new_zeros(layer.outputs, layer.inputs) if targets else None)
        self.register_buffer("inverse", torch.zeros_like(square) if inverse else None)

    def add(
        self,
        x: Tensor,
        target: Tensor | None = None,
        weights: Tensor | None = None,
        forgetting: float = 1.0,
        processes: int = 1,
    ) -> None:
        decay = self._decay(forgetting, processes)
        A, B = self.A * decay, None if self.B is None else self.B * decay
        rows = self.rows * decay
        others = [tensor for tensor in (target, weights) if tensor is not None]
        with torch.autocast(x.device.type, enabled=False):
            for part, *other in self._layer.chunks(x, *others):
                inputs = part.to(torch.promote_types(part.dtype, torch.float32))
                weighted = inputs if weights is None else inputs * other[-1].unsqueeze(1)
                A += inputs.t() @ weighted
                rows += inputs.shape[0] if weights is None else other[-1].sum()
                if B is not None:
                    B += self._layer.output_rows(other[0]).to(inputs.dtype).t() @ weighted
        self.A, self.rows = A, rows
        if B is not None:
            self.B = B

    def discount(self, factor: float) -> None:
        self.A, self.rows = self.A * factor, self.rows * factor
        if self.B is not None:
            self.B = self.B * factor

    def sums(self) -> tuple[Tensor, Tensor]:
        """``A`` and ``B`` of all that is to be solved for."""
        assert self.B is not None
        return self.A, self.B

    def mean(self) -> Tensor:
        """The mean of ``a a^T``, corrected for the bias of a moving average that began at zero."""
        return self.A / self.rows.clamp_min(1e-30)

    def renew(self, ridge: float) -> None:
        with torch.autocast(self.rows.device.type, enabled=False):
            # contiguous, as a restored one is: products round by how their factors lie in memory
            self.inverse = damped_inverse(self.mean(), ridge).contiguous()

    def preconditioned(self, matrix: Tensor) -> Tensor:
        assert self.inverse is not None
        with torch.autocast(matrix.device.type, enabled=False):
            return matrix.to(self.inverse.dtype) @ self.inverse

    def energy(self) -> Tensor:
        return self.A.diagonal().sum()

    @property
    def shape(self) -> str:
        size = f"{self.A.shape[0]}x{self.A.shape[0]}"
        return size if self.B is None else f"{size}, {self.B.shape[0]}x{self.B.shape[1]}"

    @property
    def products(self) -> tuple[int, int]:
        inputs = self.A.shape[0]
        return inputs**2 + (0 if self.B is None else self.B.numel()), inputs**3

    def packed(self) -> Tensor:
        """All that is to be summed over processes, as one vector; of A its upper triangle."""
        parts = [self.A[self._upper()], self.rows.reshape(1)]
        return torch.cat(parts if self.B is None else [*parts, self.B.reshape(-1)])

    def unpack(self, vector: Tensor) -> None:
        size = self.A.shape[0]
        end = size * (size + 1) // 2
        triangle, rows, targets = vector[:end], vector[end], vector[end + 1 :]
        upper = torch.zeros_like(self.A)
        upper[self._upper()] = triangle
        self.A = upper + upper.triu(1).t()
        self.rows = rows.clone()
        if self.B is not None:
            self.B = targets.reshape(self.B.shape).clone()
        self.is_share = torch.zeros_like(self.is_share)

    def _upper(self) -> tuple[Tensor, Tensor]:
        size = self.A.shape[0]
        rows, columns = torch.triu_indices(size, size, device=self.A.device)
        return rows, columns
