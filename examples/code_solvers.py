"""Which code step? One epoch of MNIST by each, several seeds, judged on a validation part of the training set.

    python examples/code_solvers.py --root data

Network 784-100-100-10, batch 200, fused Adam at rate 0.008 with a cosine to zero, everything else at its default.
Adds to docs/results/code_solvers.csv what is not there yet, and prints the table that docs/results.md shows. The last
row reads forward inputs: with one plain step of rate 1 that is backprop's gradient by another route, shown as a check
and not as AltMin.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from intervals import interval
from lightning.pytorch import seed_everything
from rows import append, finished, markdown, read
from runs import judged, timed_fit

from lightning_altmin import (
    AltMinModule,
    BackpropModule,
    CodeSolver,
    CurvatureCodes,
    GradientCodes,
    LineSearchCodes,
    LocalGradient,
)
from lightning_altmin.data import VisionDataModule
from lightning_altmin.nn import MLP

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "code_solvers.csv"
SOLVERS: dict[str, tuple[CodeSolver, str] | None] = {
    "backprop": None,
    "curvature (default)": (CurvatureCodes(), "moved"),
    "curvature, share 1": (CurvatureCodes(share=1.0), "moved"),
    "curvature, 5 steps": (CurvatureCodes(steps=5), "moved"),
    "line search": (LineSearchCodes(), "moved"),
    "line search, relaxation 0.2": (LineSearchCodes(relaxation=0.2), "moved"),
    "line search, 3 steps": (LineSearchCodes(steps=3), "moved"),
    "5 steps of 0.2": (GradientCodes(5, 0.2), "moved"),
    "5 steps of 0.1": (GradientCodes(5, 0.1), "moved"),
    "up to 20 steps of 0.2, to a tenth of the gradient": (GradientCodes(20, 0.2, tol=0.1), "moved"),
    "1 step of 1": (GradientCodes(1, 1.0), "moved"),
    "1 step of 0.1": (GradientCodes(1, 0.1), "moved"),
    "1 step of 1, forward inputs (= backprop)": (GradientCodes(1, 1.0), "forward"),
}


@dataclass(frozen=True)
class Row:
    """One run."""

    solver: str
    seed: int
    val_accuracy: float
    seconds: float


def run(solver: tuple[CodeSolver, Any] | None, seed: int, data: VisionDataModule) -> tuple[float, float]:
    """Validation accuracy after one epoch, and the seconds of training."""
    seed_everything(seed, verbose=False)
    network = MLP(784, [100, 100], 10)
    optimizer = functools.partial(torch.optim.Adam, lr=0.008, fused=True)
    data.setup("fit")
    batches = len(data.train_dataloader())
    schedule: dict[str, Any] = {
        "lr_scheduler": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, batches),
        "lr_interval": "step",
    }
    module: AltMinModule | BackpropModule
    if solver is None:
        module = BackpropModule(network, optimizer=optimizer, **schedule)
    else:
        module = AltMinModule(
            network, codes=copy.deepcopy(solver[0]), weights=LocalGradient(optimizer, inputs=solver[1]), **schedule
        )
    seconds = timed_fit(module, data, 1)
    return judged(module, data, "val")["val_acc"], seconds


def table() -> str:
    """What docs/results.md shows, from the committed rows."""
    rows, lines = read(RESULTS, Row), []
    for name in SOLVERS:
        mine = [row for row in rows if row.solver == name]
        accuracy = interval([100 * row.val_accuracy for row in mine])
        lines.append((name, accuracy, f"{statistics.median(row.seconds for row in mine):.1f}"))
    return markdown(("code step", "validation accuracy %", "seconds"), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder of MNIST")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    data = VisionDataModule("MNIST", root=arguments.root, batch_size=200, val_split=1 / 6)
    done = finished(RESULTS, "solver", "seed")
    for name, solver in SOLVERS.items():
        for seed in range(arguments.seeds):
            if (name, str(seed)) not in done:
                append(RESULTS, [Row(name, seed, *run(solver, seed, data))])
    print(table())


if __name__ == "__main__":
    main()
