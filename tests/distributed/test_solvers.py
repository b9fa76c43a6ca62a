"""Every code solver, weight solver and engine on several processes takes the steps of one process."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from lightning_altmin import (
    AltMin,
    AltMinObjective,
    CoactivationMemory,
    CodedNetwork,
    CodedRecurrentNetwork,
    CurvatureCodes,
    GradientCodes,
    LayerwiseWeights,
    LeastSquaresCodes,
    LineSearchCodes,
    LocalGradient,
    ProximalCodes,
)
from lightning_altmin.parallel import DataParallel
from lightning_altmin.processes import Processes
from tests.distributed.gloo import join_gloo, launch
from tests.distributed.problems import NETWORKS, OPTIMIZERS, TOLERANCE, batches, part
from tests.distributed.test_data_parallel import STEPS, compare, train

SGD = LocalGradient(OPTIMIZERS["sgd"])
SPARSE = {"objective": AltMinObjective(mu=2.0, lambda_c=0.01)}
CODES: dict[str, dict[str, Any]] = {
    "gradient": {"codes": lambda: GradientCodes(steps=3, momentum=0.5, nesterov=True)},
    # Samples stop at different steps, and each process ends with the last of its own.
    "gradient, adaptive": {"codes": lambda: GradientCodes(steps=20, lr=0.5, tol=0.1)},
    "line search": {"codes": lambda: LineSearchCodes(steps=2, relaxation=0.8)},
    "curvature": {"codes": lambda: CurvatureCodes(steps=2, every=2)},
    "least squares": {"codes": lambda: LeastSquaresCodes()},
    "proximal": {"codes": lambda: ProximalCodes(steps=3), **SPARSE},
    "proximal, plain": {"codes": lambda: ProximalCodes(steps=2, accelerated=False), **SPARSE},
}
WEIGHTS: dict[str, Any] = {
    "sgd": lambda: SGD,
    "adam, twice": lambda: LocalGradient(OPTIMIZERS["adam"], steps=2),
    "forward inputs": lambda: LocalGradient(OPTIMIZERS["sgd"], inputs="forward"),
    "memory": lambda: CoactivationMemory(every=2),
    "memory by layer": lambda: LayerwiseWeights(
        {"output": LocalGradient(OPTIMIZERS["sgd"]), "default": CoactivationMemory(form="solve", every=3)}
    ),
}


def _together() -> Iterator[tuple[str, str, str]]:
    """Solvers, engines and networks, without those that refuse each other."""
    for name, engine, kind in itertools.product(CODES, ["closed_form", "autograd"], NETWORKS):
        if not (name == "least squares" and kind != "mlp") and not (engine == "closed_form" and kind == "residual"):
            yield name, engine, kind


def model(
    kind: str, codes: dict[str, Any], weights: Any, engine: str, processes: Processes | None = None, **flags: Any
) -> AltMin:
    coded = CodedRecurrentNetwork if kind == "rnn" else CodedNetwork
    network = coded(NETWORKS[kind][0]().double(), engine=engine)
    settings = {**codes, "codes": codes["codes"](), "weights": weights()}
    return AltMin(network, nn.CrossEntropyLoss(), processes=processes, **settings, **flags)


def equals_one_process(kind: str, sizes: tuple[int, ...], *what: Any, tolerance: float = 1e-12, **flags: Any) -> None:
    data = batches(NETWORKS[kind][1], sum(sizes), STEPS, torch.float64)

    def share(rank: int) -> Any:
        core = model(kind, *what, DataParallel(), **flags)
        return train(core, [part(batch, sizes, rank) for batch in data])

    compare(launch(len(sizes), join_gloo(share)), train(model(kind, *what, **flags), data), tolerance)


@pytest.mark.parametrize(("name", "engine", "kind"), list(_together()))
def test_code_solvers(name: str, engine: str, kind: str) -> None:
    """Catches a solver that asks a whole batch something: where to stop, how far to go, how steep it is."""
    # By autograd a small move is a difference of two outputs, and each step in time loses some of its digits.
    tolerance = 1e-9 if (kind, engine) == ("rnn", "autograd") else TOLERANCE[kind]
    equals_one_process(kind, (5, 3), CODES[name], WEIGHTS["sgd"], engine, tolerance=tolerance)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weight_solvers(name: str) -> None:
    """Catches gradients or statistics of one process's samples, on four processes with unequal parts."""
    equals_one_process("conv", (2, 3, 1, 4), CODES["curvature"], WEIGHTS[name], "auto", tolerance=1e-11)


def test_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a compiled batch whose gradients or measurements never reach the other processes.

    The graph is traced and then run as it is: what a compiler makes of it is no matter of processes.
    """
    monkeypatch.setattr(torch, "compile", functools.partial(_traced, torch.compile))
    always = {"codes": lambda: CurvatureCodes(every=1)}  # which makes one graph
    equals_one_process("mlp", (4, 4), always, WEIGHTS["sgd"], "closed_form", compile=True)


def _traced(compile: Any, function: Any, options: Any, **settings: Any) -> Any:
    return compile(function, backend="aot_eager", **settings)
