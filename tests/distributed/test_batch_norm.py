"""Synchronised BatchNorm: processes that share a batch take the step that one process takes on the whole batch.

The oracle is the same model on one process, whose BatchNorms know nothing of processes.
"""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from lightning_altmin import (
    AltMin,
    CoactivationMemory,
    CodedNetwork,
    CurvatureCodes,
    GradientCodes,
    LineSearchCodes,
    LocalGradient,
)
from lightning_altmin.processes import Processes
from lightning_altmin.strategies import DataParallel
from tests.distributed.gloo import join_gloo, launch
from tests.distributed.problems import NORMED, OPTIMIZERS, batches, part
from tests.distributed.test_data_parallel import WEIGHTED, compare, train

SIZES = {  # of each batch on each process; the last ones uneven
    2: ((4, 4), (5, 3), (4, 4), (6, 2), (4, 4), (2, 1)),
    4: ((2, 2, 2, 2), (1, 3, 2, 2), (2, 2, 2, 2), (3, 1, 3, 1), (2, 2, 2, 2), (1, 2, 1, 1)),
}
CODES: dict[str, Any] = {
    "curvature": lambda: CurvatureCodes(every=2),
    "gradient, adaptive": lambda: GradientCodes(steps=4, lr=0.5, tol=0.3),
    "line search": lambda: LineSearchCodes(steps=2, relaxation=0.8),
}
WEIGHTS: dict[str, Any] = {
    "adam": lambda: LocalGradient(OPTIMIZERS["adam"]),
    "sgd": lambda: LocalGradient(OPTIMIZERS["sgd"]),
    "adam, twice": lambda: LocalGradient(OPTIMIZERS["adam"], steps=2),
    "memory": lambda: CoactivationMemory(every=2),
}
Case = tuple[int, str, Literal["fixed", "live"], str, str, str]
CASES: list[Case] = [
    (world, kind, statistics, "curvature", weights, "auto")
    for world, weights in ((2, "adam"), (4, "sgd"), (4, "memory"))
    for kind in NORMED
    for statistics in ("fixed", "live")
    if (kind, weights) != ("normed residual", "memory")  # memories refuse blocks
]
CASES += [
    (2, "normed mlp", "live", "gradient, adaptive", "sgd", "auto"),
    (2, "normed conv", "live", "line search", "sgd", "auto"),
    (2, "normed mlp", "live", "curvature", "adam, twice", "auto"),
    (2, "normed mlp", "live", "curvature", "sgd", "autograd"),
    (2, "normed conv", "fixed", "curvature", "sgd", "autograd"),
]


def model(case: Case, processes: Processes | None = None, **settings: Any) -> AltMin:
    _, kind, statistics, codes, weights, engine = case
    network = CodedNetwork(NORMED[kind][0]().double(), engine=engine, batch_norm=statistics)
    # Class weights, so that what the output layer's mean divides by is not the number of samples.
    loss = nn.CrossEntropyLoss(weight=WEIGHTED)
    return AltMin(network, loss, codes=CODES[codes](), weights=WEIGHTS[weights](), processes=processes, **settings)


def data_of(world: int, kind: str) -> list[tuple[Tensor, Tensor]]:
    whole = batches(NORMED[kind][1], 8, len(SIZES[world]), torch.float64)
    return [(x[: sum(sizes)], y[: sum(sizes)]) for (x, y), sizes in zip(whole, SIZES[world], strict=True)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_equals_one_process(case: Case) -> None:
    """Catches moments of one process's samples, a mean of means, derivatives that stop at the border of a process."""
    world, kind = case[:2]
    data = data_of(world, kind)

    def share(rank: int) -> Any:
        core = model(case, DataParallel(sync_batch_norm=True))
        return train(core, [part(batch, sizes, rank) for batch, sizes in zip(data, SIZES[world], strict=True)])

    expected = train(model(case), data)
    assert any("running_var" in name and not torch.equal(v, torch.ones_like(v)) for name, v in expected.items())
    # By autograd a small move is a difference of two outputs: one process with its samples in another order differs from
    # itself by 2e-11.
    by_autograd = kind == "normed residual" or case[5] == "autograd"
    compare(launch(world, join_gloo(share)), expected, 1e-10 if by_autograd else 1e-12)
