"""Whether all processes train the same model with the same library: asked once, before the first step."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_altmin.__about__ import __version__

if TYPE_CHECKING:
    from lightning_altmin.altmin import AltMin


@dataclass(frozen=True)
class Signature:
    """What must be equal on all processes."""

    lightning_altmin: str
    torch: str
    model: str
    codes: str
    weights: str
    objective: str
    loss: str
    nonfinite: str
    optimizer: str
    settings: str
    sync_batch_norm: bool
    first_parameters: tuple[float, ...]

    @classmethod
    def of(cls, core: AltMin, settings: str = "") -> Signature:
        """The signature of a model on this process, and of whatever else its owner has set."""
        named = [(name, p.detach()) for name, p in core.network.named_parameters()]
        values = [*(p for _, p in named), *(b for b in core.network.buffers() if b.is_floating_point())]
        return cls(
            lightning_altmin=__version__,
            torch=torch.__version__,
            model=", ".join(f"{name}{tuple(p.shape)} {p.dtype}" for name, p in named),
            codes=repr(core.codes),
            weights=repr(core.weights),
            objective=repr(core.objective),
            loss=repr(core.loss) if isinstance(core.loss, nn.Module) else getattr(core.loss, "__qualname__", ""),
            nonfinite=core.guard.policy,
            optimizer=_described(core.make_optimizer()),
            settings=settings,
            sync_batch_norm=core.processes.samples is not None,
            first_parameters=tuple(_fingerprint(value) for value in values),
        )


def refuse_differences(signature: Signature, group: dist.ProcessGroup | None) -> None:
    """Compare with all other processes; on all of them the same error, if there is one.

    Raises:
        RuntimeError: Naming what differs and on which process.
    """
    every: list[Signature] = [signature] * dist.get_world_size(group)
    dist.all_gather_object(every, signature, group=group)
    for field in fields(Signature):
        values = [getattr(one, field.name) for one in every]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is None:
            continue
        if field.name == "first_parameters":
            raise RuntimeError(
                f"processes 0 and {other} start with different weights: call processes.broadcast(core) once, before "
                "the first batch, or give all of them the same seed"
            )
        raise RuntimeError(
            f"processes 0 and {other} differ in {field.name}: {values[0]!r} and {values[other]!r}. All processes must "
            "run the same script with the same packages"
        )


def _described(optimizer: Optimizer) -> str:
    """Type and settings of each parameter group, as they are made: schedules come later."""
    parts = getattr(optimizer, "children", {"": optimizer}).values()
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return f"{[type(part).__name__ for part in parts]} {groups}"


def _fingerprint(parameter: Tensor) -> float:
    """A number that another seed changes and the order of a sum does not."""
    return float(f"{parameter.double().square().sum().item():.6e}")
