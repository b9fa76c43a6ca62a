"""BatchNorm inside a block that only autograd can differentiate: its batch statistics captured, held, or left alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

BatchNorm: TypeAlias = _BatchNorm
Statistics = dict[int, tuple[Tensor, Tensor]]
"""Index of a BatchNorm in its stage -> (mean, biased variance) over the batch, each of shape ``(channels,)``."""


def batch_norms(modules: Sequence[nn.Module]) -> list[BatchNorm]:
    """Every BatchNorm inside ``modules``, in definition order."""
    return [m for module in modules for m in module.modules() if isinstance(m, _BatchNorm)]


def uses_batch_statistics(norm: BatchNorm) -> bool:
    """Whether this BatchNorm normalises by the batch (training mode, or no running statistics to use)."""
    return norm.training or norm.running_mean is None


def count_batch(norm: BatchNorm) -> float | None:
    """Count this batch; the share that running statistics take of it, or ``None`` where they do not follow batches."""
    if not (norm.training and norm.track_running_stats):
        return None
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    if norm.momentum is not None:
        return norm.momentum
    assert norm.num_batches_tracked is not None
    # momentum=None is the cumulative average of the batches; the count of a resumed run is in the buffer
    return 1.0 / float(norm.num_batches_tracked)


@torch.no_grad()
def follow(norm: BatchNorm, mean: Tensor, variance: Tensor, count: Tensor) -> None:
    """Let the running statistics take their share of a batch with this mean and biased variance of ``count`` values."""
    share = count_batch(norm)
    if share is None or norm.running_mean is None or norm.running_var is None:
        return
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
    norm.running_var.lerp_((variance * count / (count - 1)).to(norm.running_var.dtype), share)


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of ``x`` of shape ``(batch, channels, *positions)`` over batch and positions."""
    variance, mean = torch.var_mean(x, dim=[d for d in range(x.dim()) if d != 1], correction=0)
    return mean, variance


def refuse_second_use(index: int, statistics: Statistics, norm: nn.Module) -> None:
    """Refuse a BatchNorm that is applied twice, for there is then no single fixed affine map.

    Raises:
        ValueError: If there are statistics of it.
    """
    if index in statistics:
        raise ValueError(f"{norm} is applied more than once in one stage; give each use its own BatchNorm")


@contextmanager
def captured(norms: Sequence[BatchNorm]) -> Iterator[Statistics]:
    """Record each BatchNorm's batch statistics while the block runs once.

    Raises:
        ValueError: If one BatchNorm is applied twice in the block, for there is then no single fixed affine map.
    """
    statistics: Statistics = {}
    handles = []
    for index, norm in enumerate(norms):
        if not uses_batch_statistics(norm):
            continue

        def record(module: nn.Module, args: tuple[Tensor, ...], index: int = index) -> None:
            refuse_second_use(index, statistics, module)
            statistics[index] = batch_statistics(args[0])

        handles.append(norm.register_forward_pre_hook(record))
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def held(norms: Sequence[BatchNorm], statistics: Statistics) -> Iterator[None]:
    """Make each BatchNorm the fixed affine map of the given batch statistics."""
    before = [(norm, norm.training, norm.running_mean, norm.running_var) for norm in norms]
    try:
        for index, (mean, variance) in statistics.items():
            norms[index].training = False
            norms[index].running_mean = mean
            norms[index].running_var = variance
        yield
    finally:
        for norm, training, running_mean, running_var in before:
            norm.training = training
            norm.running_mean = running_mean
            norm.running_var = running_var


@contextmanager
def untracked(norms: Sequence[BatchNorm]) -> Iterator[None]:
    """Let each BatchNorm use batch statistics without touching its running ones."""
    before = [(norm, norm.track_running_stats) for norm in norms]
    try:
        for norm in norms:
            # In training mode `track_running_stats=False` means: batch statistics, running buffers not passed on.
            if norm.training:
                norm.track_running_stats = False
        yield
    finally:
        for norm, track in before:
            norm.track_running_stats = track
