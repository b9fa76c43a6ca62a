"""Small networks of staircases, and their codes solved for."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_altmin import (
    AltMin,
    AltMinObjective,
)
from lightning_altmin.codes import CodeProblem, CodeSolver
from lightning_altmin.nn import HardThreshold, Heaviside, Quantise, Sign


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


STAIRCASES = {"sign": Sign, "step": lambda: Heaviside(0.1), "hard": lambda: HardThreshold(0.3), "2 bits": Quantise}


def network(make: Any = Sign, widths: tuple[int, ...] = (5, 4, 6), outputs: int = 3, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for below, width in itertools.pairwise(widths):
        layers += [nn.Linear(below, width), make()]
    module = nn.Sequential(*layers, nn.Linear(widths[-1], outputs)).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2)
    return module


def data(seed: int = 0, batch: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 5, generator=generator).double(), torch.randint(3, (batch,), generator=generator)


def solved(
    module: nn.Module, codes: CodeSolver, mu: float = 0.01, seed: int = 0, loss: Any = None
) -> tuple[AltMin, Any, list[CodeProblem]]:
    """A core, its step with solved codes, and the problems of the codes from the top down."""
    core = AltMin(module, nn.CrossEntropyLoss() if loss is None else loss, AltMinObjective(mu=mu), codes)
    x, y = data(seed)
    if isinstance(loss, nn.MSELoss):
        y = functional.one_hot(y, 3).double()
    step, problems = core.encode(x, y), []
    with torch.no_grad():
        for problem, level in core.code_problems(step):
            step.moves[level] = codes.solve(problem)
            step.margins[level] = problem.margins
            problems.append(problem)
    return core, step, problems
