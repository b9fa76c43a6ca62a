"""Which torchmetrics a module logs when the user names none."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy

from lightning_altmin.losses.wrapping import as_module

Metrics = Metric | MetricCollection | Mapping[str, Metric]


class LogitBinaryAccuracy(BinaryAccuracy):
    """Binary accuracy of logits: torchmetrics would take logits that all lie in [0, 1] for probabilities."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        super().update((preds > 0).int(), (target > 0.5).int())


class MidpointAccuracy(BinaryAccuracy):
    """Binary accuracy of an output that is asked to be 0 or 1, and that may lie beyond both."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        super().update((preds > 0.5).int(), (target > 0.5).int())


class ClassAccuracy(MulticlassAccuracy):
    """Share of samples whose largest output is at their class; soft targets count as their most probable class."""

    def __init__(self, ignore_index: int | None = None) -> None:
        super().__init__(num_classes=None, average="micro", ignore_index=ignore_index)

    def update(self, preds: Tensor, target: Tensor) -> None:
        super().update(preds.argmax(1), target.argmax(1) if target.is_floating_point() else target)


def metric_collection(metrics: Metrics | None, loss: object) -> MetricCollection:
    """The user's metrics as a collection, or accuracy for class targets and binary targets.

    Args:
        metrics: One metric (logged as ``acc``), a dictionary of metrics, a collection, or ``None`` for the default.
        loss: The loss, by which the default is chosen.

    Raises:
        TypeError: If ``metrics`` is something else.
    """
    if metrics is None:
        return MetricCollection(_defaults(loss))
    if isinstance(metrics, MetricCollection):
        return metrics
    if isinstance(metrics, Metric):
        return MetricCollection({"acc": metrics})
    if isinstance(metrics, Mapping) and all(isinstance(m, Metric) for m in metrics.values()):
        return MetricCollection(dict(metrics))
    raise TypeError(
        f"metrics must be a torchmetrics Metric, MetricCollection or a dictionary of Metrics, got {metrics!r}"
    )


def _defaults(loss: object) -> dict[str, Metric | MetricCollection]:
    loss = as_module(loss)
    if isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss):
        return {"acc": ClassAccuracy(loss.ignore_index)}
    if isinstance(loss, nn.BCEWithLogitsLoss) or loss is functional.binary_cross_entropy_with_logits:
        return {"acc": LogitBinaryAccuracy()}
    return {}
