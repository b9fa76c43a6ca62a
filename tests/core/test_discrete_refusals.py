"""What `DiscreteCodes` cannot do is refused by name, and so are its networks by solvers that need a derivative."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from lightning_altmin import (
    AltMin,
    AltMinObjective,
    CodedNetwork,
    CurvatureCodes,
    DiscreteCodes,
    GradientCodes,
    LeastSquaresCodes,
    LineSearchCodes,
    ProximalCodes,
)
from lightning_altmin.codes import CodeSolver
from lightning_altmin.nn import MLP, Sign
from lightning_altmin.weights import WeightProblem
from tests.core.staircase_problems import network, solved


@pytest.mark.parametrize(
    "codes", [CurvatureCodes(), GradientCodes(), LineSearchCodes(), ProximalCodes(), LeastSquaresCodes()]
)
def test_solvers_that_need_a_derivative_refuse(codes: CodeSolver) -> None:
    """Catches a network that is trained at its top layer only, without a word."""
    with pytest.raises(ValueError, match="Sign"):
        AltMin(network(), nn.CrossEntropyLoss(), codes=codes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AltMin(MLP(4, [3], 2), nn.CrossEntropyLoss(), codes=DiscreteCodes()), "found no staircase"),
        (
            lambda: AltMin(network(), nn.CrossEntropyLoss(), AltMinObjective.reference(), DiscreteCodes()),
            "needs AltMinObjective",
        ),
        (
            lambda: AltMin(network(), nn.CrossEntropyLoss(), AltMinObjective(lambda_c=0.1), DiscreteCodes()),
            r"lambda_c=0\.1",
        ),
        (
            lambda: AltMin(
                MLP(4, [3, 3], 2, activation=Sign, dropout=0.1), nn.CrossEntropyLoss(), codes=DiscreteCodes()
            ),
            "directly between two layers",
        ),
        (
            lambda: AltMin(
                nn.Sequential(nn.Linear(3, 4), nn.PReLU(), Sign(), nn.Linear(4, 2)),
                nn.CrossEntropyLoss(),
                codes=DiscreteCodes(),
            ),
            "directly between two layers",
        ),
        (
            lambda: AltMin(
                nn.Sequential(Sign(), nn.Linear(3, 4), Sign(), nn.Linear(4, 2)),
                nn.CrossEntropyLoss(),
                codes=DiscreteCodes(),
            ),
            "directly between two layers",
        ),
        (
            lambda: AltMin(nn.Sequential(*network(), nn.LogSoftmax(1)), nn.NLLLoss(), codes=DiscreteCodes()),
            "one Linear as output stage",
        ),
        (
            lambda: AltMin(network(), lambda output, target: output.mean(), codes=DiscreteCodes()),
            "returns the mean of a batch",
        ),
        (
            lambda: AltMin(CodedNetwork(network(), batch_norm="live"), nn.CrossEntropyLoss(), codes=DiscreteCodes()),
            "batch_norm='fixed'",
        ),
        (
            lambda: AltMin(CodedNetwork(network(), engine="autograd"), nn.CrossEntropyLoss(), codes=DiscreteCodes()),
            r"has engine='autograd'; use CodedNetwork\(engine='auto'\)",
        ),
        (lambda: DiscreteCodes(flips=-1), "flips must be an integer >= 0"),
        (lambda: DiscreteCodes(rounds=0), "rounds must be an integer >= 1"),
        (lambda: DiscreteCodes(margin=0.0), "margin must be a positive number"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(make: Any, message: str) -> None:
    """Catches a model that trains something else than what was asked for."""
    with pytest.raises(ValueError, match=message):
        make()


def test_a_solver_of_targets_refuses_margins() -> None:
    """Catches a memory that fits squared targets where the code is judged by margins."""
    core, step, _ = solved(network(), DiscreteCodes())
    problem: WeightProblem = core.weight_problem(step, 0)
    with pytest.raises(ValueError, match="has no target"):
        _ = problem.target
