"""What a memory keeps of one layer: sums of products of its inputs, and of its targets with its inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_altmin.weights.least_squares_layer import LeastSquaresLayer
from lightning_altmin.weights.ridge import damped_inverse


class LayerStatistics(nn.Module):
    r"""Discounted sums over all batches seen, :math:`A \leftarrow f A + \sum a a^\top` once per batch.

    Several processes hold *shares*: the statistics are the sum of what the processes hold. Adding and discounting are
    linear, so each process goes on by itself, and what `packed` gives, summed over processes, is the whole.

    Args:
        layer: The layer.
        dtype: Of the sums. Products are computed in the inputs' own precision, at least single.
        targets: Whether to keep B.
        inverse: Whether to keep a damped inverse.

    Attributes:
        A: ``sum a a^T``, shape ``(inputs, inputs)``.
        B: ``sum c a^T``, shape ``(outputs, inputs)``, or ``None``.
        rows: Discounted number of rows in the sums, a scalar.
        inverse: Damped inverse of ``A / rows``, or ``None``; zero until there is one, so that nothing moves.
    """

    replaces_buffers = True  # see `Buffers`: what a batch adds is undone by setting the old tensors again

    A: Tensor
    B: Tensor | None
    rows: Tensor
    inverse: Tensor | None
    is_share: Tensor
    """Whether this is one process's share, a bool scalar; a buffer, so that it goes back with the others."""

    def __init__(self, layer: LeastSquaresLayer, dtype: torch.dtype, targets: bool, inverse: bool) -> None:
        super().__init__()
        device = layer.layer.weight.device
        square = torch.zeros(layer.inputs, layer.inputs, dtype=dtype, device=device)
        self.register_buffer("A", square)
        self.register_buffer("B", square.new_zeros(layer.outputs, layer.inputs) if targets else None)
        self.register_buffer("rows", square.new_zeros(()))
        self.register_buffer("inverse", torch.zeros_like(square) if inverse else None)
        self.register_buffer("is_share", torch.tensor(False, device=device), persistent=False)
        self._layer = layer

    def add(
        self,
        x: Tensor,
        target: Tensor | None = None,
        mask: Tensor | None = None,
        forgetting: float = 1.0,
        processes: int = 1,
    ) -> None:
        """Discount what is there and add a batch.

        Args:
            x: The layer's input, or an input of it per sample and position.
            target: What its output should be, for B.
            mask: Which samples count, for layers without positions; all if not given.
            forgetting: Discount, in (0, 1].
            processes: Number of processes that hold shares.
        """
        discount = forgetting
        if processes > 1 and not self.is_share:
            discount, self.is_share = forgetting / processes, torch.ones_like(self.is_share)
        A, B = self.A * discount, None if self.B is None else self.B * discount
        rows = self.rows * discount
        others = [tensor for tensor in (target, mask) if tensor is not None]
        with torch.autocast(x.device.type, enabled=False):
            for part, *other in self._layer.chunks(x, *others):
                inputs = part.to(torch.promote_types(part.dtype, torch.float32))
                if mask is not None:
                    inputs = inputs * other[-1].unsqueeze(1)
                A += inputs.t() @ inputs
                rows += inputs.shape[0] if mask is None else other[-1].sum()
                if B is not None:
                    B += self._layer.output_rows(other[0]).to(inputs.dtype).t() @ inputs
        self.A, self.rows = A, rows
        if B is not None:
            self.B = B

    def discount(self, factor: float) -> None:
        """Let all that has been seen so far count ``factor`` times as much."""
        self.A, self.rows = self.A * factor, self.rows * factor
        if self.B is not None:
            self.B = self.B * factor

    def mean(self) -> Tensor:
        """The mean of ``a a^T``, corrected for the bias of a moving average that began at zero."""
        return self.A / self.rows.clamp_min(1e-30)

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        super()._load_from_state_dict(*arguments, **keywords)
        self.is_share = torch.zeros_like(self.is_share)  # what is saved is the whole

    def renew(self, ridge: float) -> None:
        """Compute the damped inverse of the mean of ``a a^T``; ``ridge`` is relative to the mean of its diagonal."""
        # contiguous, as a restored one is: products round by how their factors lie in memory
        self.inverse = damped_inverse(self.mean(), ridge).contiguous()

    def preconditioned(self, matrix: Tensor) -> Tensor:
        """``matrix @ (A + ridge)^-1``, shape ``(any, inputs)``."""
        assert self.inverse is not None
        with torch.autocast(matrix.device.type, enabled=False):
            return matrix.to(self.inverse.dtype) @ self.inverse

    def energy(self) -> Tensor:
        """A scalar that is finite if the statistics are."""
        return self.A.diagonal().sum()

    @property
    def shape(self) -> str:
        """What is kept, for a table."""
        size = f"{self.A.shape[0]}x{self.A.shape[0]}"
        return size if self.B is None else f"{size}, {self.B.shape[0]}x{self.B.shape[1]}"

    @property
    def products(self) -> tuple[int, int]:
        """Multiply-adds per row measured, and per renewal."""
        inputs = self.A.shape[0]
        return inputs**2 + (0 if self.B is None else self.B.numel()), inputs**3

    # ---------------------------------------------------------------- several processes

    def packed(self) -> Tensor:
        """All that is to be summed over processes, as one vector; of A its upper triangle."""
        parts = [self.A[self._upper()], self.rows.reshape(1)]
        return torch.cat(parts if self.B is None else [*parts, self.B.reshape(-1)])

    def unpack(self, vector: Tensor) -> None:
        """Take the sums of `packed` over all processes as the whole."""
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
