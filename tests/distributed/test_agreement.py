"""Processes stay one model: buffers that samples move are averaged, and settings that differ are refused.

The oracle of the buffers is one process on the whole batch.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_altmin import AltMin, CoactivationMemory, LocalGradient
from lightning_altmin.parallel import DataParallel
from lightning_altmin.processes import Processes
from tests.distributed.gloo import join_gloo, launch
from tests.distributed.problems import CLASSES, batches, part
from tests.distributed.test_data_parallel import compare, train


class Watched(nn.Module):
    """Passes its input on and keeps a running mean of it; ``fixed`` is a buffer that nothing moves."""

    mean: Tensor
    fixed: Tensor

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inplace = inplace
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("fixed", torch.full((8,), 1 / 3))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            moved = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            if self.inplace:
                self.mean.copy_(moved)
            else:
                self.mean = moved
        return x


@pytest.mark.parametrize("inplace", [True, False])
def test_buffers_of_any_module_are_those_of_one_process(inplace: bool) -> None:
    """Catches running values other than BatchNorm's that each process keeps for itself, so that models differ."""
    data = batches((6,), 8, 4, torch.float64)

    def run(processes: Processes | None, batch: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(6, 8), Watched(inplace), nn.Tanh(), nn.Linear(8, CLASSES)).double()
        return train(AltMin(network, nn.CrossEntropyLoss(), processes=processes), batch)

    def share(rank: int) -> dict[str, Tensor]:
        return run(DataParallel(), [part(batch, (5, 3), rank) for batch in data])

    expected = run(None, data)
    assert bool(expected["network.1.mean"].any())
    compare(launch(2, join_gloo(share)), expected, 1e-12)


def core(processes: Processes, lr: float = 0.1, **settings: Any) -> AltMin:
    torch.manual_seed(0)
    weights = LocalGradient(functools.partial(torch.optim.SGD, lr=lr))
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    return AltMin(network, processes=processes, **({"loss": nn.CrossEntropyLoss(), "weights": weights} | settings))


DIFFERENT: dict[str, tuple[Any, str]] = {
    "rate": (lambda rank: core(DataParallel(), lr=0.1 + rank), r"optimizer: .*'lr': 0\.1.*'lr': 1\.1"),
    "loss": (lambda rank: core(DataParallel(), loss=[nn.CrossEntropyLoss(), nn.MultiMarginLoss()][rank]), "loss"),
    "policy": (lambda rank: core(DataParallel(), nonfinite=["raise", "skip"][rank]), "nonfinite"),
    "memory": (
        lambda rank: core(DataParallel(), weights=CoactivationMemory(ridge=0.1 + rank)),
        "weights: .*ridge=0.1.*ridge=1.1",
    ),
    "clip": (lambda rank: core(DataParallel(settings=f"gradient_clip_norm={rank}")), "settings: .*norm=0.*norm=1"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_settings_that_differ_are_refused(name: str) -> None:
    """Catches processes that average the same gradients and take different steps, apart from the first batch on."""
    make, message = DIFFERENT[name]
    data = batches((6,), 8, 1, torch.float32)

    def share(rank: int) -> bool:
        with pytest.raises(RuntimeError, match=f"(?s)processes 0 and 1 differ in {message}"):
            make(rank).step(*part(data[0], (4, 4), rank))
        return True

    assert launch(2, join_gloo(share)) == [True, True]
