"""Sparsity against accuracy: exact zeros in the weights and in the codes by soft thresholds, on MNIST.

    python examples/sparse.py --root data
    python examples/sparse.py --table

784-300-100-10 of ReLU, batch 200, Adam at rate 0.002 with a cosine to zero, 5 epochs; 50,000 images train, 10,000
validate at the end, and the test set is asked once per run. Each run has another lambda_w (ProximalWeights) or lambda_c
(ProximalCodes). `--methods subgradient` runs the subgradient of the same l1 term, which makes weights and codes small
but not zero; it is not run by default, and sparse.csv has no rows of it.
Rows are appended to docs/results/sparse.csv as runs end.
"""

from __future__ import annotations

import argparse
import functools
import warnings
from pathlib import Path
from typing import Any

import torch
from figures import pyplot, save
from lightning.pytorch import seed_everything
from rows import append_values, finished, markdown, read_values
from runs import judged, timed_fit
from torch import Tensor, nn

from lightning_altmin import (
    AltMinModule,
    AltMinObjective,
    CodeSolver,
    GradientCodes,
    LocalGradient,
    ProximalCodes,
    ProximalWeights,
)
from lightning_altmin.data import VisionDataModule
from lightning_altmin.nn import MLP
from lightning_altmin.weights import ProximalAdam

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "sparse.csv"
COLUMNS = ("of", "method", "lambda", "seed", "zeros", "val_accuracy", "test_accuracy", "seconds_per_epoch")
EPOCHS = 5
WEIGHT_LAMBDAS = (0.0, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 2e-4)
CODE_LAMBDAS = (0.0, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0)
STEPS, RATE, MU = 3, 0.1, 1.0  # of the code step


def codes(proximal: bool) -> CodeSolver:
    return ProximalCodes(STEPS, RATE, accelerated=False) if proximal else GradientCodes(STEPS, RATE)


def make_module(of: str, proximal: bool, strength: float, steps: int) -> AltMinModule:
    make: Any = ProximalAdam if of == "weights" and proximal and strength > 0 else torch.optim.Adam
    adam = functools.partial(make, lr=0.002, fused=True)
    sparse_weights = make is ProximalAdam
    lambdas = {"lambda_w": strength} if of == "weights" else {"lambda_c": strength}
    return AltMinModule(
        MLP(784, [300, 100], 10),
        codes=codes(of == "codes" and proximal),
        weights=ProximalWeights(adam) if sparse_weights else LocalGradient(adam),
        objective=AltMinObjective(mu=MU, **lambdas),
        lr_scheduler=functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps),
        lr_interval="step",
    )


def zeros_of_weights(module: AltMinModule) -> float:
    weights = [m.weight for m in module.network if isinstance(m, nn.Linear)]
    return sum(float((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def zeros_of_codes(module: AltMinModule, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Share of exact zeros among the moved codes of some training batches; nothing is trained."""
    zero, count = 0, 0
    for x, y in batches:
        step = module.core.encode(x, y)
        module.core.solve_codes(step)
        for code in step.codes:
            zero, count = zero + int((code == 0).sum()), count + code.numel()
    return zero / count


def measure(of: str, method: str, strength: float, seed: int, data: VisionDataModule) -> None:
    """Train once and append a row."""
    seed_everything(seed, verbose=False)
    data.setup("fit")
    module = make_module(of, method == "proximal", strength, EPOCHS * len(data.train_dataloader()))
    pace = timed_fit(module, data, EPOCHS) / EPOCHS
    val, test = judged(module, data, "val")["val_acc"], judged(module, data, "test")["test_acc"]
    if of == "weights":
        zeros = zeros_of_weights(module)
    else:
        loader = iter(data.train_dataloader())
        zeros = zeros_of_codes(module.train(), [next(loader) for _ in range(5)])
    numbers = (f"{strength:g}", seed, f"{zeros:.4f}", f"{val:.4f}", f"{test:.4f}", f"{pace:.1f}")
    append_values(RESULTS, COLUMNS, [(of, method, *numbers)])


def table() -> str:
    """What docs/sparse.md shows, from the committed rows."""
    rows = read_values(RESULTS)
    lines = []
    for row in sorted(rows, key=lambda row: (row["of"], row["method"], float(row["lambda"]))):
        zeros, accuracy = 100 * float(row["zeros"]), 100 * float(row["test_accuracy"])
        pace = float(row["seconds_per_epoch"])
        lines.append((row["of"], row["method"], row["lambda"], f"{zeros:.1f}", f"{accuracy:.1f}", f"{pace:.0f}"))
    columns = ("l1 term", "method", "lambda", "exact zeros %", "test accuracy %", "seconds per epoch")
    return markdown(columns, lines)


def plot() -> None:
    rows = read_values(RESULTS)
    figure, both = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axes, of in zip(both, ("weights", "codes"), strict=True):
        for method, marker in (("proximal", "o-"), ("subgradient", "x")):
            points = sorted(
                (100 * float(r["zeros"]), 100 * float(r["test_accuracy"]), float(r["lambda"]))
                for r in rows
                if r["of"] == of and r["method"] == method
            )
            if points:
                axes.plot([p[0] for p in points], [p[1] for p in points], marker, label=method)
        axes.set(xlabel=f"exact zeros among the {of}, %", title=f"l1 term of the {of} (below 90 % not drawn)")
        axes.grid(alpha=0.3)
        axes.legend()
    both[0].set(ylabel="test accuracy, %", ylim=(90, 99))
    save(figure, RESULTS.with_suffix(".svg"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder of MNIST")
    parser.add_argument("--of", nargs="+", choices=("weights", "codes"), default=("weights", "codes"))
    parser.add_argument("--methods", nargs="+", choices=("proximal", "subgradient"), default=("proximal",))
    parser.add_argument("--strengths", type=float, nargs="+", help="lambdas, in place of those of the page")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="print the table of the rows there are, and plot them")
    arguments = parser.parse_args()
    if arguments.table:
        plot()
        print(table())
        return
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    data = VisionDataModule("MNIST", root=arguments.root, batch_size=200, val_split=1 / 6)
    done = finished(RESULTS, "of", "method", "lambda", "seed")
    for of in arguments.of:
        for method in arguments.methods:
            for strength in arguments.strengths or (WEIGHT_LAMBDAS if of == "weights" else CODE_LAMBDAS):
                if (of, method, f"{strength:g}", str(arguments.seed)) not in done:
                    measure(of, method, strength, arguments.seed, data)


if __name__ == "__main__":
    main()
