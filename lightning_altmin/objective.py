"""The objective of alternating minimization: every constant of it, in one place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_altmin.arguments import check_number
from lightning_altmin.losses import LossAt


class AltMinObjective(nn.Module):
    r"""The penalty form of the training problem (arXiv 1806.09077).

    For one sample

    .. math::
        J = loss(y, f_{out}(c_L)) + \frac{\mu}{2} \sum_l \|c_l - f_l(c_{l-1})\|^2 + \lambda_c \sum_l \|c_l\|_1

    summed over samples in the code step; in the weight step averaged over the batch, features summed, plus
    ``lambda_w * sum ||W||_1`` over weights (parameters with two or more dimensions; biases excluded).

    Code gradients are given divided by ``mu``: a solver's rate ``lr`` on them is the rate ``lr / mu`` on ``J``, so
    hidden codes move at rate ``lr`` whatever ``mu`` is and the signal does not shrink on its way down.

    Args:
        mu: Weight of the coupling between codes and their predictions, > 0. A larger ``mu`` moves codes less.
        lambda_c: Weight of the l1 norm of the codes, >= 0.
        lambda_w: Weight of the l1 norm of the weights, >= 0.

    Raises:
        ValueError: If a constant is out of its range.

    ``mu`` is a buffer: it is saved with the model, and a schedule may change it in place without recompiling.
    """

    mu: Tensor
    per_sample = True
    """Whether a sample's codes are independent of the batch it came in, so that processes can share a batch."""

    def __init__(self, mu: float = 5.0, lambda_c: float = 0.0, lambda_w: float = 0.0) -> None:
        super().__init__()
        check_number("mu", mu, above=0)
        check_number("lambda_c", lambda_c, least=0)
        check_number("lambda_w", lambda_w, least=0)
        self.register_buffer("mu", torch.tensor(float(mu), dtype=torch.float64))
        self.lambda_c = float(lambda_c)
        self.lambda_w = float(lambda_w)

    @classmethod
    def reference(cls, mu: float = 0.003, lambda_c: float = 0.0, lambda_w: float = 0.0) -> ReferenceObjective:
        """The arithmetic of the authors' released code; see `ReferenceObjective`."""
        return ReferenceObjective(mu, lambda_c, lambda_w)

    @property
    def couples_by_squares(self) -> bool:
        """Whether the coupling of codes is the squared distance above, and no other that a subclass defines."""
        return type(self).code_coupling_gradient is AltMinObjective.code_coupling_gradient

    @property
    def treats_entries_alike(self) -> bool:
        """Whether the code step's own terms treat all entries of a sample's code alike, wherever they stand."""
        return self.lambda_c == 0 and type(self).code_anchor_gradient is AltMinObjective.code_anchor_gradient

    # ---- code step: gradients of J / mu, summed over samples ----

    def code_loss_gradient(self, loss: LossAt) -> Tensor:
        """Of the loss term, with respect to the network's output."""
        return loss.total_gradient() / self.mu

    def code_coupling_gradient(self, residual: Tensor) -> Tensor:
        """Of ``mu/2 ||f(c) - target||^2``, with respect to ``f(c)``, given ``f(c) - target``."""
        return residual

    def code_anchor_gradient(self, displacement: Tensor) -> Tensor | None:
        """Of ``mu/2 ||c - c_forward||^2``, given ``c - c_forward``; ``None`` where it is zero by definition."""
        return displacement

    def code_sparsity_gradient(self, code: Tensor) -> Tensor:
        """Of ``lambda_c ||c||_1`` (the subgradient with sign(0) = 0)."""
        return code.sign() * (self.lambda_c / self.mu)

    # ---- code step: values, for tests, monitors and line searches ----

    def code_loss_value(self, loss: LossAt) -> Tensor:
        """Loss term of the top code's problem, summed over samples."""
        return loss.total()

    def code_coupling_value(self, residual: Tensor) -> Tensor:
        """``mu/2 ||residual||^2``, summed over samples; also the value of the anchor, given the displacement."""
        return residual.square().sum() * (0.5 * self.mu)

    def code_anchor_value(self, displacement: Tensor) -> Tensor:
        """``mu/2 ||c - c_forward||^2``, summed over samples."""
        return self.code_coupling_value(displacement)

    def code_sparsity_value(self, code: Tensor) -> Tensor:
        """``lambda_c ||c||_1``, summed over samples."""
        return code.abs().sum() * self.lambda_c

    # ---- weight step: gradients of the batch mean ----

    def weight_coupling_gradient(self, residual: Tensor, signal: Tensor | None = None) -> Tensor:
        """Of the batch mean of ``mu/2 ||f(input) - c||^2``, with respect to ``f(input)``.

        Args:
            residual: ``f(input) - c``, shape ``(batch, *code)``, which may be overwritten.
            signal: What the gradient is divided by, a positive scalar; see ``WeightProblem.signal``.

        Returns:
            The gradient, shaped like ``residual``.
        """
        scale = self.mu / residual.shape[0]
        return residual.mul_(scale if signal is None else scale / signal)

    def weight_sparsity_gradient(self, parameter: Tensor, is_output: bool) -> Tensor | None:
        """Of ``lambda_w ||W||_1``, or ``None`` where it does not apply."""
        if self.lambda_w == 0 or parameter.dim() < 2:
            return None
        return parameter.detach().sign() * self.lambda_w

    def extra_repr(self) -> str:
        return f"mu={float(self.mu):g}, lambda_c={self.lambda_c:g}, lambda_w={self.lambda_w:g}"


class ReferenceObjective(AltMinObjective):
    """The official code's arithmetic, kept for comparison: it is *not* the objective of the paper.

    Losses are means over batch *and* features, so the signal shrinks with depth (a LeNet's first convolution stays
    at its initial values); the coupling carries a factor ``mu`` that the overall ``1/mu`` cancels; the anchor's
    gradient is exactly zero (its target was never detached); the l1 term of the weights skips the output layer.
    """

    per_sample = False

    def code_loss_gradient(self, loss: LossAt) -> Tensor:
        return loss.mean_gradient() / self.mu

    def code_coupling_gradient(self, residual: Tensor) -> Tensor:
        return residual * (2.0 / residual.numel())

    def code_anchor_gradient(self, displacement: Tensor) -> Tensor | None:
        return None

    def code_sparsity_gradient(self, code: Tensor) -> Tensor:
        return code.sign() * (self.lambda_c / (self.mu * code.numel()))

    def code_loss_value(self, loss: LossAt) -> Tensor:
        return loss.mean()

    def code_coupling_value(self, residual: Tensor) -> Tensor:
        return residual.square().mean() * self.mu

    def code_anchor_value(self, displacement: Tensor) -> Tensor:
        return torch.zeros_like(self.mu)

    def code_sparsity_value(self, code: Tensor) -> Tensor:
        return code.abs().mean() * self.lambda_c

    def weight_coupling_gradient(self, residual: Tensor, signal: Tensor | None = None) -> Tensor:
        gradient = residual.mul_(2.0 / residual.numel())
        return gradient if signal is None else gradient.div_(signal)

    def weight_sparsity_gradient(self, parameter: Tensor, is_output: bool) -> Tensor | None:
        gradient = super().weight_sparsity_gradient(parameter, is_output)
        return None if gradient is None or is_output else gradient / parameter.numel()
