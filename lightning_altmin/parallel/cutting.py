"""A batch cut into parts that go through the layers one by one: what can be cut, and what cannot."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_altmin.altmin import AltMin
from lightning_altmin.codes import DiscreteCodes
from lightning_altmin.engines.batch_norm_state import uses_batch_statistics
from lightning_altmin.processes import Processes


def cut(x: Tensor, y: Any, parts: int) -> list[tuple[Tensor, Any]]:
    """The parts of a batch; fewer if it has fewer samples.

    Raises:
        TypeError: If the targets are no tensor.
        ValueError: If they are not as many as the samples.
    """
    if not isinstance(y, Tensor):
        if parts == 1:
            return [(x, y)]
        raise TypeError(
            f"LayerParallel cuts targets along their first dimension, got {type(y).__name__} for a tensor: use "
            "micro_batches=1"
        )
    if y.dim() == 0 or y.shape[0] != x.shape[0]:
        raise ValueError(
            f"y has shape {tuple(y.shape)} for a batch of {x.shape[0]} samples: give one target per sample"
        )
    return list(zip(x.chunk(parts), y.chunk(parts), strict=True))


def mark_of(x: Tensor, y: Any) -> Tensor:
    """A number by which batches that differ are told apart; what is not finite says nothing."""
    mark = x.sum(dtype=torch.float64)
    if isinstance(y, Tensor):
        mark = mark + y.sum(dtype=torch.float64)
    return torch.nan_to_num(mark / x.numel(), nan=0.0, posinf=0.0, neginf=0.0)


def refuse_batch_statistics(core: AltMin) -> None:
    """Refuse a BatchNorm that would normalise each part by itself.

    Raises:
        ValueError: If there is one.
    """
    if any(uses_batch_statistics(norm) for norm in core.norms):
        raise ValueError(
            "LayerParallel cuts a batch into parts, and a BatchNorm in training mode would normalise each part by "
            "itself: use LayerNorm or GroupNorm, put the BatchNorm into eval mode, or use DataParallel"
        )


def refuse_uncuttable(core: AltMin, world: int) -> None:
    """Refuse a model that cannot be trained in parts, layer by layer.

    Raises:
        ValueError: Saying why, and what to use.
    """
    refuse_batch_statistics(core)
    running = [m for m in core.network.modules() if isinstance(m, nn.modules.instancenorm._InstanceNorm)]
    if any(norm.training and norm.track_running_stats for norm in running):
        raise ValueError(
            "LayerParallel cuts a batch into parts, each of which would move the running statistics of an "
            "InstanceNorm: use track_running_stats=False"
        )
    if not core.coded.one_code_per_stage:
        raise ValueError("LayerParallel needs a code per layer, and a recurrent layer has one per time step")
    if core.weights.steps > 1:
        raise ValueError(f"LayerParallel takes one weight step per batch, weights.steps is {core.weights.steps}")
    if core.compiled is not None:
        raise ValueError("LayerParallel runs the phases of a batch on several processes: use compile=False")
    if isinstance(core.codes, DiscreteCodes):
        raise ValueError("LayerParallel hands down moves and shares, not the margins of codes=DiscreteCodes")
    if not core.objective.per_sample:
        raise ValueError(f"{type(core.objective).__name__} depends on the size of a batch, which LayerParallel cuts up")
    if type(core.processes) is not Processes:
        raise ValueError(
            f"the model shares its batches by processes={core.processes!r}, and data and layer parallelism are not "
            "combined; use either"
        )
    if world > len(core.coded.stages):
        raise ValueError(
            f"{len(core.coded.stages)} layers cannot be dealt out to {world} processes: use fewer, or DataParallel "
            "(Trainer(strategy='ddp')); layer and data parallelism are not combined"
        )
