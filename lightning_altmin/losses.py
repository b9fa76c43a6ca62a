"""The loss of the output stage, in the two forms the algorithm needs: as the user gave it, and summed over samples."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

aten = torch.ops.aten
_ROWS = 2**16  # outputs evaluated at once
_MEAN, _SUM = 1, 2  # ATen's numbers of the reductions

Loss = Callable[[Tensor, Any], Tensor]
"""``loss(output, target) -> scalar``, a mean over the batch as in PyTorch."""


class LocalLoss(ABC):
    """A loss with its gradient with respect to the network's output, shape ``(batch, *output)``.

    ``mean`` is the loss as given (the output layer's weight step). ``total`` is the same loss averaged over
    non-batch dimensions and *summed* over samples (the code step), so that a sample's code does not depend on the
    batch it came in.
    """

    @abstractmethod
    def mean(self, output: Tensor, target: Any) -> Tensor:
        """The loss as the user gave it, a scalar."""

    @abstractmethod
    def mean_gradient(self, output: Tensor, target: Any) -> Tensor:
        """Gradient of ``mean`` with respect to ``output``."""

    @abstractmethod
    def total(self, output: Tensor, target: Any) -> Tensor:
        """Sum over samples of each sample's loss, a scalar."""

    @abstractmethod
    def total_gradient(self, output: Tensor, target: Any) -> Tensor:
        """Gradient of ``total`` with respect to ``output``."""

    def values(self, output: Tensor, target: Any) -> Tensor:
        """Each sample's loss, shape ``(batch,)``, the terms of `total`.

        Raises:
            ValueError: If the loss is known as a mean over the batch only.
        """
        raise ValueError(f"{type(self).__name__} has no value per sample")

    def at(self, output: Tensor, target: Any) -> LossAt:
        """This loss at one output."""
        return LossAt(self, output, target)

    def weight(self, output: Tensor, target: Any) -> Tensor:
        """How much `mean` counts for in an average of several batches' means: a scalar, here the number of samples."""
        return torch.full((), float(output.shape[0]), device=output.device)

    def readable(self, output: Tensor, target: Any) -> Any:
        """The targets, or ones that a kernel can read where reading the given ones would break the device."""
        return target

    def check(self, output: Tensor, target: Any) -> None:
        """Refuse targets this loss cannot take, before anything is changed.

        Raises:
            ValueError: If shapes or labels do not fit.
        """
        if isinstance(target, Tensor) and (target.dim() == 0 or target.shape[0] != output.shape[0]):
            raise ValueError(
                f"y has shape {tuple(target.shape)} for a batch of {output.shape[0]} samples; "
                "give one target per sample in the first dimension"
            )


class LossAt:
    """A loss at one output of the network. What the phases of a batch ask for is computed once, when first asked for.

    Attributes:
        loss: The loss.
        output: The network's output, shape ``(batch, *output)``.
        target: The batch's targets.
    """

    def __init__(self, loss: LocalLoss, output: Tensor, target: Any) -> None:
        self.loss = loss
        self.output = output
        self.target = target
        self._total_gradient: Tensor | None = None

    def elsewhere(self, output: Tensor) -> LossAt:
        """The same loss, for the same targets, at another output."""
        return self.loss.at(output, self.target)

    def mean(self) -> Tensor:
        """The loss as the user gave it, a scalar."""
        return self.loss.mean(self.output, self.target)

    def mean_gradient(self) -> Tensor:
        """Gradient of `mean` with respect to the output."""
        return self.loss.mean_gradient(self.output, self.target)

    def total(self) -> Tensor:
        """Sum over samples of each sample's loss, a scalar."""
        return self.loss.total(self.output, self.target)

    def values(self) -> Tensor:
        """Each sample's loss, shape ``(batch,)``."""
        return self.loss.values(self.output, self.target)

    def changes(self, moves: Tensor) -> Tensor:
        """How each sample's loss changes if its output moves by each row of ``moves``, one row at a time.

        Args:
            moves: Shape ``(rows, outputs)``, for outputs of shape ``(batch, outputs)``.

        Returns:
            Shape ``(batch, rows)``.
        """
        batch, here, changes = len(self.output), self.values().unsqueeze(1), []
        for rows in torch.split(moves, max(1, _ROWS // batch)):
            moved = (self.output.unsqueeze(1) + rows).flatten(0, 1)
            values = self.loss.values(moved, self.target.repeat_interleave(len(rows), 0))
            changes.append(values.view(batch, len(rows)) - here)
        return torch.cat(changes, 1)

    def total_gradient(self) -> Tensor:
        """Gradient of `total` with respect to the output; not to be changed in place."""
        if self._total_gradient is None:
            self._total_gradient = self.loss.total_gradient(self.output, self.target)
        return self._total_gradient


_FUNCTIONALS: dict[Any, type[nn.Module]] = {
    functional.cross_entropy: nn.CrossEntropyLoss,
    functional.nll_loss: nn.NLLLoss,
    functional.mse_loss: nn.MSELoss,
    functional.l1_loss: nn.L1Loss,
    functional.smooth_l1_loss: nn.SmoothL1Loss,
    functional.huber_loss: nn.HuberLoss,
}
"""Functions that are taken as the modules of the same name, which know their reduction and check shapes."""


def local_loss(loss: Loss) -> LocalLoss:
    """Wrap a user's loss.

    Args:
        loss: A loss module with ``reduction="mean"``, a function of ``torch.nn.functional`` that is such a
            loss by default (``cross_entropy``, ``nll_loss``, ``mse_loss``, ``l1_loss``, ``smooth_l1_loss``,
            ``huber_loss``), or any callable ``loss(output, target)``, which is taken as a *mean over the batch*: its
            sum over samples is the batch size times its value.

    Raises:
        TypeError: If ``loss`` is not callable.
        ValueError: If it is a module whose reduction is not ``"mean"``, or that has parameters of its own.
    """
    if isinstance(loss, LocalLoss):
        return loss
    if isinstance(loss, type) or not callable(loss):
        raise TypeError(f"loss must be an instance of a loss module or a function, got {loss!r}")
    loss = _FUNCTIONALS[loss]() if loss in _FUNCTIONALS else loss
    if not isinstance(loss, nn.Module):
        return CallableLoss(loss)
    if any(p.requires_grad for p in loss.parameters()):
        raise ValueError(f"loss {type(loss).__name__} has trainable parameters; make them part of the network")
    reduction = getattr(loss, "reduction", None)
    if reduction is None:
        return CallableLoss(loss)
    if reduction != "mean":
        raise ValueError(
            f"loss.reduction must be 'mean', got {reduction!r}: pass {type(loss).__name__}(reduction='mean'); "
            "the sum over samples that the code step needs is derived from it"
        )
    if type(loss) is nn.CrossEntropyLoss:
        return CrossEntropy(loss)
    if type(loss) is nn.MSELoss:
        return MeanSquaredError(loss)
    return ModuleLoss(loss)


class _AutogradLoss(LocalLoss):
    """Gradients through a graph of the loss alone."""

    def mean_gradient(self, output: Tensor, target: Any) -> Tensor:
        return self._gradient(self.mean, output, target)

    def total_gradient(self, output: Tensor, target: Any) -> Tensor:
        return self._gradient(self.total, output, target)

    @staticmethod
    def _gradient(value: Loss, output: Tensor, target: Any) -> Tensor:
        with torch.enable_grad():
            output = output.detach().requires_grad_()
            scalar = value(output, target)
        return torch.autograd.grad(scalar, output)[0]


class CallableLoss(_AutogradLoss):
    """A function that returns a mean over the batch."""

    def __init__(self, loss: Loss) -> None:
        self._loss = loss

    def mean(self, output: Tensor, target: Any) -> Tensor:
        return self._loss(output, target)

    def total(self, output: Tensor, target: Any) -> Tensor:
        return self._loss(output, target) * output.shape[0]


# They broadcast, which is hardly ever meant.
_ELEMENTWISE = (nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.PoissonNLLLoss, nn.KLDivLoss)


class ModuleLoss(_AutogradLoss):
    """A loss module with a ``reduction``; per-sample values come from a copy with ``reduction="none"``."""

    def __init__(self, loss: nn.Module) -> None:
        self.module: Any = loss
        # The shallow copy shares buffers (class weights), so moving the user's module moves the copy.
        per_sample: Any = copy.copy(loss)
        per_sample.reduction = "none"
        self._per_sample = per_sample

    def check(self, output: Tensor, target: Any) -> None:
        super().check(output, target)
        if isinstance(self.module, _ELEMENTWISE):
            _check_same_shape(type(self.module).__name__, output, target)

    def mean(self, output: Tensor, target: Any) -> Tensor:
        value: Tensor = self.module(output, target)
        return value

    def weight(self, output: Tensor, target: Any) -> Tensor:
        # These two divide by the weights of the labels that are not ignored, and not by the number of samples.
        if isinstance(self.module, nn.CrossEntropyLoss | nn.NLLLoss) and not target.is_floating_point():
            return label_weights(self.module, output, target).sum()
        return super().weight(output, target)

    def total(self, output: Tensor, target: Any) -> Tensor:
        return self.values(output, target).sum()

    def values(self, output: Tensor, target: Any) -> Tensor:
        values = self._per_sample(output, target)
        if values.dim() == 0 or values.shape[0] != output.shape[0]:
            raise ValueError(
                f"loss {type(self.module).__name__} with reduction='none' returned shape {tuple(values.shape)}, not a "
                f"value per sample of {output.shape[0]}: it must read self.reduction when it is called. Or pass it as "
                "a function, loss=lambda output, target: ..., which is taken as a mean over the batch"
            )
        mean: Tensor = values.reshape(values.shape[0], -1).mean(1) if values.dim() > 1 else values
        return mean


class CrossEntropy(ModuleLoss):
    """``nn.CrossEntropyLoss`` in closed form for outputs ``(batch, classes)`` and class-index targets.

    Class weights, ``ignore_index`` and label smoothing are covered; other shapes and soft targets go through
    autograd.
    """

    def mean_gradient(self, output: Tensor, target: Any) -> Tensor:
        if not self._has_closed_form(output, target):
            return super().mean_gradient(output, target)
        return self._sample_gradients(output, target) / self._class_weights(output, target).sum()

    def total_gradient(self, output: Tensor, target: Any) -> Tensor:
        if not self._has_closed_form(output, target):
            return super().total_gradient(output, target)
        return self._sample_gradients(output, target)

    def at(self, output: Tensor, target: Any) -> LossAt:
        if self._has_closed_form(output, target) and self.module.label_smoothing == 0:
            return _HardCrossEntropyAt(self, output, target)
        return super().at(output, target)

    def _has_closed_form(self, output: Tensor, target: Any) -> bool:
        return output.dim() == 2 and not target.is_floating_point()

    def _valid(self, target: Tensor) -> Tensor:
        return target != self.module.ignore_index

    def _class_weights(self, output: Tensor, target: Tensor) -> Tensor:
        return label_weights(self.module, output, target)

    def _sample_gradients(self, output: Tensor, target: Tensor) -> Tensor:
        """Row i: gradient of sample i's loss, ``(1 - e) w_y (p - onehot) + e / C * (p sum(w) - w)``."""
        probabilities = torch.softmax(output, 1)
        smoothing, weight, classes = self.module.label_smoothing, self.module.weight, output.shape[1]
        valid = self._valid(target)
        own = (1.0 - smoothing) * self._class_weights(output, target).unsqueeze(1)
        gradient = probabilities * own
        gradient.scatter_add_(1, target.where(valid, 0).unsqueeze(1), -own)
        if smoothing > 0:
            spread = probabilities * (classes if weight is None else weight.sum()) - (1 if weight is None else weight)
            gradient += (smoothing / classes) * spread * valid.unsqueeze(1)
        return gradient

    def check(self, output: Tensor, target: Any) -> None:
        super().check(output, target)
        if not isinstance(target, Tensor):
            raise TypeError(f"CrossEntropyLoss needs a tensor of targets, got {type(target).__name__}")
        if target.is_floating_point():
            if target.shape != output.shape:
                raise ValueError(
                    f"y holds floats of shape {tuple(target.shape)}; give class indices (dtype long, shape "
                    f"{(output.shape[0], *output.shape[2:])}) or probabilities of shape {tuple(output.shape)}"
                )
            return
        if target.dtype != torch.long or target.shape != (output.shape[0], *output.shape[2:]):
            raise ValueError(
                f"y has dtype {target.dtype} and shape {tuple(target.shape)}; CrossEntropyLoss needs dtype torch.int64 "
                f"and shape {(output.shape[0], *output.shape[2:])} for outputs of shape {tuple(output.shape)}"
            )
        if target.device.type != "cpu" or target.numel() == 0:
            return
        lowest, highest = target.aminmax()
        if (lowest < 0 or highest >= output.shape[1]) and not self.labels_fit(output, target):
            labels = target[self._valid(target)]
            raise ValueError(
                f"y holds labels from {int(labels.min())} to {int(labels.max())} but the network has "
                f"{output.shape[1]} outputs: labels must lie in 0..{output.shape[1] - 1}"
            )

    def readable(self, output: Tensor, target: Any) -> Any:
        if target.is_floating_point():
            return target
        fits = ((target >= 0) & (target < output.shape[1])) | ~self._valid(target)
        return target.where(fits, self.module.ignore_index)

    def labels_fit(self, output: Tensor, target: Tensor) -> Tensor:
        """Whether every label is a class or ignored; a scalar bool tensor on the target's device."""
        return (((target >= 0) & (target < output.shape[1])) | ~self._valid(target)).all()


class _HardCrossEntropyAt(LossAt):
    """Cross-entropy of class indices without smoothing, by the library's own kernels and with one softmax for all."""

    def __init__(self, loss: CrossEntropy, output: Tensor, target: Tensor) -> None:
        super().__init__(loss, output, target)
        self._module = loss.module
        self._weight, self._ignored = loss.module.weight, loss.module.ignore_index
        self._logarithms = torch.log_softmax(output, 1)
        self._mean, self._weight_sum = aten.nll_loss_forward(
            self._logarithms, target, self._weight, _MEAN, self._ignored
        )

    def mean(self) -> Tensor:
        mean: Tensor = self._mean
        return mean

    def mean_gradient(self) -> Tensor:
        return self.total_gradient() / self._weight_sum

    def total_gradient(self) -> Tensor:
        """``w_y (p - onehot)`` per sample."""
        if self._total_gradient is None:
            gradient = aten.nll_loss_backward(
                self._weight_sum.new_ones(()),
                self._logarithms,
                self.target,
                self._weight,
                _SUM,
                self._ignored,
                self._weight_sum,
            )
            self._total_gradient = aten._log_softmax_backward_data(gradient, self._logarithms, 1, self.output.dtype)
        return self._total_gradient

    def changes(self, moves: Tensor) -> Tensor:
        """``w_y (log sum_k p_k exp(m_k) - m_y)`` for each row ``m``: one matrix product for all rows and samples."""
        largest = moves.amax(1)
        sums = self._logarithms.exp() @ (moves - largest.unsqueeze(1)).exp().t()
        logarithms = sums.clamp_min(torch.finfo(sums.dtype).tiny).log() + largest
        labels = self.target.where(self.target != self._ignored, 0)
        return (logarithms - moves.t()[labels]) * label_weights(self._module, self.output, self.target).unsqueeze(1)


class MeanSquaredError(ModuleLoss):
    """``nn.MSELoss`` in closed form."""

    def mean_gradient(self, output: Tensor, target: Any) -> Tensor:
        return (output - target) * (2.0 / output.numel())

    def total_gradient(self, output: Tensor, target: Any) -> Tensor:
        return (output - target) * (2.0 * output.shape[0] / output.numel())

    def check(self, output: Tensor, target: Any) -> None:
        super().check(output, target)
        _check_same_shape("MSELoss", output, target)


def label_weights(loss: Any, output: Tensor, target: Tensor) -> Tensor:
    """Weight of each label's own class in a cross-entropy, 0 where ignored; shape of ``target``."""
    valid = target != loss.ignore_index
    if loss.weight is None:
        return valid.to(output.dtype)
    weights: Tensor = loss.weight[target.where(valid, 0)] * valid
    return weights


def _check_same_shape(loss: str, output: Tensor, target: Any) -> None:
    if not isinstance(target, Tensor) or target.shape != output.shape:
        got = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
        raise ValueError(
            f"y has shape {got} but the network's output has {tuple(output.shape)}; {loss} needs the same shape "
            "(y.unsqueeze(1) for a single output)"
        )
