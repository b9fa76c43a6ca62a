"""Synchronised BatchNorm: processes that share a batch take the step that one process takes on the whole batch.

The oracle is the same model on one process, whose BatchNorms know nothing of processes.
"""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
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
from lightning_altmin.parallel import DataParallel, ProcessLostError
from lightning_altmin.processes import Processes
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
    equals_one_process(case)


def test_processes_take_equally_many_code_steps() -> None:
    """Catches a process that ends its code steps with the last of its own samples, while others wait for it."""
    equals_one_process((2, "normed mlp", "live", "gradient, adaptive", "sgd", "auto"), seconds=20.0)


def equals_one_process(case: Case, **limit: float) -> None:
    world, kind = case[:2]
    data = data_of(world, kind)

    def share(rank: int) -> Any:
        core = model(case, DataParallel(sync_batch_norm=True))
        return train(core, [part(batch, sizes, rank) for batch, sizes in zip(data, SIZES[world], strict=True)])

    expected = train(model(case), data)
    assert any("running_var" in name and not torch.equal(v, torch.ones_like(v)) for name, v in expected.items())
    # By autograd a small move is a difference of two outputs, which has half the digits: one process that is given its
    # samples in another order then differs from itself by more than 1e-12, too.
    by_autograd = kind == "normed residual" or case[5] == "autograd"
    compare(launch(world, join_gloo(share), **limit), expected, 1e-10 if by_autograd else 1e-12)


def whole_and_part(kind: str, rank: int, sizes: tuple[int, ...] = (4, 4)) -> Any:
    (whole,) = batches(NORMED[kind][1], sum(sizes), 1, torch.float64)
    return part(whole, sizes, rank)


def exchanges(action: Any) -> dict[str, int]:
    """How often each collective is called."""
    calls = dict.fromkeys(("all_reduce", "all_gather", "all_gather_object", "broadcast", "barrier"), 0)
    originals = {name: getattr(dist, name) for name in calls}

    def counted(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return originals[name](*args, **kwargs)

        return call

    for name in calls:
        setattr(dist, name, counted(name))
    try:
        action()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return {name: count for name, count in calls.items() if count}


@pytest.mark.parametrize("engine", ["auto", "autograd"])
def test_exchanges_of_a_batch(engine: str) -> None:
    """Catches moments that are exchanged one by one, fixed statistics that are asked for again, and exchanges in eval
    mode, for which nobody may be waiting.
    """

    def share(rank: int) -> list[dict[str, int]]:
        case: Case = (2, "normed mlp", "fixed", "curvature", "sgd", engine)
        core = model(case, DataParallel(sync_batch_norm=True))
        batch = whole_and_part("normed mlp", rank)
        core.step(*batch)  # which also asks whether all processes train the same model
        step = core.encode(*batch)
        found = [exchanges(lambda: core.encode(*batch)), exchanges(lambda: core.solve_codes(step))]
        if rank == 0:  # alone
            core.network.eval()
            found.append(exchanges(lambda: core(batch[0])))
            core.network.train()
            found.append(exchanges(lambda: core.explain(batch[0])))
            found.append(exchanges(lambda: core.verify(*batch)))
        return found

    first, second = launch(2, join_gloo(share))
    assert first == [{"all_gather": 4}, {}, {}, {}, {}]
    assert second == first[:2]


def test_a_frozen_batch_norm_asks_nobody() -> None:
    """Catches running statistics that move, or an exchange, where a BatchNorm is held in eval mode."""

    def share(rank: int) -> tuple[dict[str, int], bool]:
        core = model((2, "normed conv", "live", "curvature", "sgd", "auto"), DataParallel(sync_batch_norm=True))
        norms = [m for m in core.network if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.eval()
        batch = whole_and_part("normed conv", rank)
        core.step(*batch)
        found = exchanges(lambda: core.step(*batch))
        return found, all(not norm.running_mean.any() for norm in norms)

    assert launch(2, join_gloo(share)) == [({"all_reduce": 1}, True)] * 2


def test_another_process_is_missing() -> None:
    """Catches an exchange that fails in encode and is taken for an input of the wrong shape."""

    def share(rank: int) -> str:
        core = model((2, "normed mlp", "fixed", "curvature", "sgd", "auto"), DataParallel(sync_batch_norm=True))
        batch = whole_and_part("normed mlp", rank)
        core.step(*batch)
        if rank == 1:
            return "gone"
        with pytest.raises(ProcessLostError, match="in batch 1 ") as caught:
            core.step(*batch)
        return str(caught.value)

    first, second = launch(2, join_gloo(share))
    assert "another process has ended" in first
    assert second == "gone"


def test_processes_of_different_minds_are_refused() -> None:
    """Catches a process that waits for moments which another one never sends."""

    def share(rank: int) -> bool:
        processes = DataParallel(sync_batch_norm=rank == 0)
        core = model((2, "normed mlp", "fixed", "curvature", "sgd", "auto"), processes)
        with pytest.raises(RuntimeError, match="processes 0 and 1 differ in sync_batch_norm: True and False"):
            core.step(*whole_and_part("normed mlp", rank))
        return True

    assert launch(2, join_gloo(share)) == [True, True]


def test_a_compiled_batch_is_refused() -> None:
    """Catches a graph that was traced around an exchange, whether processes come with the model or later."""
    case: Case = (2, "normed mlp", "fixed", "curvature", "sgd", "auto")

    def share(rank: int) -> bool:
        with pytest.raises(ValueError, match=r"compile=True makes one graph .* stage '0'"):
            model(case, DataParallel(sync_batch_norm=True), compile=True)
        core = model(case, compile=True)
        with pytest.raises(ValueError, match=r"compile=True makes one graph .* stage '0'"):
            core.processes = DataParallel(sync_batch_norm=True)
        return True

    assert launch(2, join_gloo(share)) == [True, True]


def test_a_process_alone_is_as_without_processes() -> None:
    """Catches an exchange of one process with itself, and statistics that stay shared when a run is over."""
    case: Case = (2, "normed conv", "live", "curvature", "sgd", "auto")

    def share(rank: int) -> dict[str, int]:
        core = model(case, DataParallel(sync_batch_norm=True))
        core.step(*whole_and_part("normed conv", rank))
        core.processes = Processes()
        return exchanges(lambda: core.step(*whole_and_part("normed conv", rank)))

    def alone(rank: int) -> dict[str, int]:
        core = model(case, DataParallel(sync_batch_norm=True))
        core.step(*whole_and_part("normed conv", rank))
        return exchanges(lambda: core.step(*whole_and_part("normed conv", rank)))

    assert launch(2, join_gloo(share)) == [{}, {}]
    assert launch(1, join_gloo(alone)) == [{"all_reduce": 1}]
