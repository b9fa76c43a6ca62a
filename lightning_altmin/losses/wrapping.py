"""The local loss of what a user gives as a loss."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn import functional

from lightning_altmin.losses.base import LocalLoss, Loss
from lightning_altmin.losses.by_autograd import CallableLoss, ModuleLoss
from lightning_altmin.losses.class_labels import ClassLabelLoss
from lightning_altmin.losses.cross_entropy import CrossEntropy
from lightning_altmin.losses.mean_squared_error import MeanSquaredError

_FUNCTIONALS: dict[Any, type[nn.Module]] = {
    functional.cross_entropy: nn.CrossEntropyLoss,
    functional.nll_loss: nn.NLLLoss,
    functional.mse_loss: nn.MSELoss,
    functional.l1_loss: nn.L1Loss,
    functional.smooth_l1_loss: nn.SmoothL1Loss,
    functional.huber_loss: nn.HuberLoss,
    functional.poisson_nll_loss: nn.PoissonNLLLoss,
    functional.kl_div: nn.KLDivLoss,
    functional.soft_margin_loss: nn.SoftMarginLoss,
    functional.hinge_embedding_loss: nn.HingeEmbeddingLoss,
    functional.multilabel_soft_margin_loss: nn.MultiLabelSoftMarginLoss,
}
"""Functions that are taken as the modules of the same name, which know their reduction and check shapes."""

_FORWARDS_OF_LABELS = (nn.CrossEntropyLoss.forward, nn.NLLLoss.forward, nn.MultiMarginLoss.forward)
"""What these take for a label is known; a subclass with a forward of its own may take something else."""


def as_module(loss: Any) -> Any:
    """The module of the same name where ``loss`` is a function of ``torch.nn.functional`` that has one."""
    # Compared one by one: a callable of the user's need not be hashable.
    return next((module() for function, module in _FUNCTIONALS.items() if function is loss), loss)


def local_loss(loss: Loss) -> LocalLoss:
    """Wrap a user's loss.

    Args:
        loss: A loss module with ``reduction="mean"``, a function of ``torch.nn.functional`` that is such a
            loss by default (``cross_entropy``, ``nll_loss``, ``mse_loss``, ``l1_loss``, ``smooth_l1_loss``,
            ``huber_loss``, ``poisson_nll_loss``, ``kl_div``, ``soft_margin_loss``, ``hinge_embedding_loss``,
            ``multilabel_soft_margin_loss``), or any callable ``loss(output, target)``, which is taken as a *mean over
            the batch*: its sum over samples is the batch size times its value.

    Raises:
        TypeError: If ``loss`` is not callable.
        ValueError: If it is a module whose reduction is not ``"mean"``, or that has parameters of its own.
    """
    if isinstance(loss, LocalLoss):
        return loss
    if isinstance(loss, type) or not callable(loss):
        raise TypeError(f"loss must be an instance of a loss module or a function, got {loss!r}")
    loss = as_module(loss)
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
    if type(loss).forward in _FORWARDS_OF_LABELS:
        return ClassLabelLoss(loss)
    return ModuleLoss(loss)
