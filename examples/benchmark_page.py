"""Writes docs/benchmarks.md from the rows in docs/results, which other scripts have measured.

    python examples/benchmark_page.py

Nothing is measured here: each section says which script made its rows. A file that is not
there, or holds nothing but tuning, leaves its table out, and the page says so.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "paper"))
import accuracy
import bcd_mnist
import convergence
import curves
import epochs
import first_epoch
import higgs
from intervals import interval
from rows import markdown, read

DOCS = Path(__file__).parent.parent / "docs"
RESULTS = DOCS / "results"
WANTED = 0.95


def rows(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open() as file:
        return list(csv.DictReader(file))


def accuracies() -> str:
    return accuracy.table(RESULTS / "accuracy.csv")


def samples_to() -> str:
    """Samples seen and seconds of training until the accuracy is first reached, per network and method."""
    batch = 200
    runs: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for row in rows("accuracy_per_second.csv"):
        runs.setdefault((row["network"], row["method"], row["seed"]), []).append(row)
    first: dict[tuple[str, str], list[dict[str, str] | None]] = {}
    for (network, method, _), curve in runs.items():
        curve.sort(key=lambda row: int(row["batches"]))
        reached = next((row for row in curve if float(row["accuracy"]) >= WANTED), None)
        first.setdefault((network, method), []).append(reached)
    lines: list[tuple[object, ...]] = []
    for (network, method), found in first.items():
        reached = [row for row in found if row is not None]
        if len(reached) < len(found):
            lines.append((network, method, len(found), f"not reached by {len(found) - len(reached)}", ""))
            continue
        samples = [batch * int(row["batches"]) / 1000 for row in reached]
        seconds = [float(row["seconds"]) for row in reached]
        lines.append((network, method, len(found), *(interval(each, ".4g", ".2g") for each in (samples, seconds))))
    samples_to_wanted = f"thousands of samples to {100 * WANTED:.0f} % (95 %)"
    return markdown(("network", "method", "seeds", samples_to_wanted, "seconds (95 %)"), lines)


def time_and_memory() -> str:
    """Seconds per epoch of 60,000 samples and peak memory, from the time of a step."""
    measured = json.loads((RESULTS / "step_time.json").read_text())
    lines = []
    kept = [r for r in measured["rows"] if (r["level"], r["precision"]) == ("core", "fp32")]
    kept = [r for r in kept if "engine" not in r["method"]]
    base = {(r["net"], r["threads"]): r["ms"] for r in kept if r["method"] == "backprop"}
    for row in sorted(kept, key=lambda r: (list(base).index((r["net"], r["threads"])), r["ratio"])):
        steps = 60000 / (128 if row["net"] == "LeNet" else 200)
        milliseconds = row["ratio"] * base[row["net"], row["threads"]]  # rows were not all timed on the same day
        peak = f"{row['peak_mb']:.1f}" if "peak_mb" in row else ""
        cells = [row["net"], row["threads"], row["method"], f"{steps * milliseconds / 1000:.2f}", f"{row['ratio']:.2f}"]
        lines.append((*cells, peak))
    columns = ("network", "threads", "method", "seconds per epoch of 60,000", "ratio to backprop", "peak MB")
    return markdown(columns, lines)


def first_epochs() -> str:
    return curves.table(read(RESULTS / "first_epoch.csv", curves.Row), first_epoch.COLUMN)


def fifty_epochs() -> str:
    return curves.table(read(RESULTS / "epochs.csv", curves.Row), epochs.COLUMN, epochs.SHOWN)


def one_pass() -> str:
    return curves.table(read(RESULTS / "higgs.csv", curves.Row), higgs.COLUMN)


def offline() -> str:
    return bcd_mnist.table(RESULTS / "bcd_mnist.csv")


def error_near_an_optimum() -> str:
    return convergence.table(RESULTS / "convergence.csv")


SECTIONS: tuple[tuple[str, str, str, str, Callable[[], str]], ...] = (
    (
        "Accuracy beside tuned backprop",
        "accuracy.csv",
        "examples/accuracy.py",
        "Both methods have the same six rates, chosen on a validation split. The protocol, and which choices were made "
        "after test results were seen, are in [](results.md), and what was wrong with the ConvNet's rows.",
        accuracies,
    ),
    (
        "Samples to 95 %",
        "accuracy_per_second.csv",
        "examples/accuracy_per_second.py",
        "MNIST, batches of 200, test accuracy; seconds are those of training alone, on a machine that was not idle: "
        "compare methods, not machines.",
        samples_to,
    ),
    (
        "Time and memory",
        "step_time.json",
        "examples/benchmarks/step_time.py",
        "Backprop's median time of a training step, times the steps of an epoch; others by their ratio to it "
        "in paired runs. Data loading and Trainer are not counted. Peak memory is what a step "
        "adds to network, optimizer and batch. More in [](speed.md). Energy: the machine reports none.",
        time_and_memory,
    ),
    (
        "The first epoch, beside offline methods",
        "first_epoch.csv",
        "examples/paper/first_epoch.py",
        "Test accuracy in per cent after so many batches of 200 of MNIST (95 % intervals), six settings tuned "
        "for every method on a validation split. ADMM and MAC are fitted anew at each mark to the samples seen by "
        "then, with 30 sweeps over them.\n\n![Accuracy over mini-batches](results/first_epoch.svg)",
        first_epochs,
    ),
    (
        "Fifty epochs at a constant rate",
        "epochs.csv",
        "examples/paper/epochs.py",
        "Test accuracy in per cent after so many epochs of MNIST, batches of 200 (95 % intervals). The setting of each "
        "method is the best of six after 15 epochs of one run judged by a validation split; on 2x100 AM-Adam's is "
        "the smallest of its six. On 2x100 AM-mem leads after one epoch and falls behind later; on 2x500, with "
        "one run of each, it leads for ten epochs, and SGD in the end.\n\n![Error over epochs](results/epochs.svg)",
        fifty_epochs,
    ),
    (
        "A stream of the shape of HIGGS, in one pass",
        "higgs.csv",
        "examples/paper/higgs.py",
        "Accuracy in per cent on 50,000 held-out rows after so many rows, each seen once, in batches of 200 (95 % "
        "intervals); 28-300-300-2, six settings tuned for every method on the first 200,000 rows. **The rows are "
        "synthetic**: 28 features, two classes drawn with the probabilities of a fixed random network. For HIGGS "
        "itself give the script the file.\n\n![Accuracy over rows](results/higgs.svg)",
        one_pass,
    ),
    (
        "Block coordinate descent at its published setting",
        "bcd_mnist.csv",
        "examples/paper/bcd_mnist.py",
        "`BCDModule`, full batch. The authors' five runs end, after 50 sweeps of the large network, between 94.39 and "
        "94.92 %, 94.61 % on average. Ours ran on an H100, up to three at a time; on two CPU cores a sweep takes a "
        "minute.",
        offline,
    ),
    (
        "The error near an optimum",
        "convergence.csv",
        "examples/convergence.py",
        "What [](convergence.md) derives, measured through `AltMin.step`.",
        error_near_an_optimum,
    ),
)

HEAD = """# Benchmarks

<!-- Written by examples/benchmark_page.py from docs/results; do not edit. -->

Every table is made from rows in `docs/results` by `python examples/benchmark_page.py`; the script that measured them
stands under each. All of it ran on 2 CPU cores, unless a section says otherwise.

## Where AltMin loses

- **Accuracy**: it is nowhere ahead of tuned backprop by more than the noise, and mostly a few hundredths of a point
  behind; on CIFAR-10 up to half a point, and more than a point in a convolutional network with BatchNorm unless
  `batch_norm="live"` is set.
- **Time**: on a CPU an eager step takes longer than backprop's; a compiled one takes from about as
  long to half longer, and several code steps longer still; by how much is in the table.
- **Memory**: with one code step about that of backprop; several code steps need more.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, name, script, text, make in SECTIONS:
        parts.append(f"## {title}\n")
        table = make() if (RESULTS / name).exists() else ""
        if table:
            parts.append(f"{text}\n\n{table}\n\nMeasured by `{script}`; rows in `results/{name}`.\n")
        else:
            parts.append(f"Not measured yet: `{script}` writes `results/{name}`.\n")
    return "\n".join(parts)


if __name__ == "__main__":
    (DOCS / "benchmarks.md").write_text(page(), encoding="utf-8")
    print(f"wrote {DOCS / 'benchmarks.md'}")
