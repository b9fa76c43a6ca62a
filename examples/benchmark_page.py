"""Writes docs/benchmarks.md from the rows in docs/results, which other scripts have measured.

    python examples/benchmark_page.py

Nothing is measured here: each section says which script made its rows. A file that is not
there, or holds nothing but tuning, leaves its table out, and the page says so.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "paper"))
sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import accuracy
import accuracy_per_second
import bcd_mnist
import convergence
import curves
import epochs
import first_epoch
import higgs
import step_time
from intervals import interval
from rows import markdown, read

DOCS = Path(__file__).parent.parent / "docs"
RESULTS = DOCS / "results"
WANTED = 0.95


def accuracies() -> str:
    return accuracy.table(RESULTS / "accuracy.csv")


def samples_to() -> str:
    """Samples seen and seconds of training until the accuracy is first reached, per network and method."""
    runs: dict[tuple[str, str, int], list[accuracy_per_second.Row]] = {}
    for row in read(RESULTS / "accuracy_per_second.csv", accuracy_per_second.Row):
        runs.setdefault((row.network, row.method, row.seed), []).append(row)
    first: dict[tuple[str, str], list[accuracy_per_second.Row | None]] = {}
    for (network, method, _), curve in runs.items():
        curve.sort(key=lambda row: row.batches)
        reached = next((row for row in curve if row.accuracy >= WANTED), None)
        first.setdefault((network, method), []).append(reached)
    lines: list[tuple[object, ...]] = []
    for (network, method), found in first.items():
        reached = [row for row in found if row is not None]
        if len(reached) < len(found):
            lines.append((network, method, len(found), f"not reached by {len(found) - len(reached)}", ""))
            continue
        samples = [accuracy_per_second.BATCH * row.batches / 1000 for row in reached]
        seconds = [row.seconds for row in reached]
        lines.append((network, method, len(found), *(interval(each, ".4g", ".2g") for each in (samples, seconds))))
    samples_to_wanted = f"thousands of samples to {100 * WANTED:.0f} % (95 %)"
    return markdown(("network", "method", "seeds", samples_to_wanted, "seconds (95 %)"), lines)


def time_and_memory() -> str:
    """Seconds per epoch of 60,000 samples and peak memory, from the time of a step."""
    lines = []
    kept = [r for r in step_time.read(RESULTS / "step_time.json") if (r["level"], r["precision"]) == ("core", "fp32")]
    kept = [r for r in kept if "engine" not in r["method"]]
    base = {(r["net"], r["threads"]): r["ms"] for r in kept if r["method"] == "backprop"}
    for row in sorted(kept, key=lambda r: (list(base).index((r["net"], r["threads"])), r["ratio"])):
        steps = 60000 / step_time.NETS[row["net"]][1][0]  # the shape of a batch, its size first
        milliseconds = row["ratio"] * base[row["net"], row["threads"]]  # rows were not all timed on the same day
        peak = f"{row['peak_mb']:.1f}" if "peak_mb" in row else ""
        cells = [row["net"], row["threads"], row["method"], f"{steps * milliseconds / 1000:.2f}", f"{row['ratio']:.2f}"]
        lines.append((*cells, peak))
    columns = ("network", "threads", "method", "seconds per epoch of 60,000", "ratio to backprop", "peak MB")
    return markdown(columns, lines)


def step_costs() -> str:
    """The least and the most that one code step costs, over networks and threads; README says it, too."""
    rows = [r for r in step_time.read(RESULTS / "step_time.json") if r["precision"] == "fp32"]

    def ratios(method: str, level: str) -> str:
        found = [r["ratio"] for r in rows if (r["method"], r["level"]) == (method, level)]
        return f"{min(found):.2f} to {max(found):.2f}"

    eager, compiled = "1 code step", "1 code step, compiled"
    return (
        f"on a CPU an eager step takes {ratios(eager, 'core')} times as long as backprop's and a compiled one "
        f"{ratios(compiled, 'core')} times; through the Trainer {ratios(eager, 'trainer')} and "
        f"{ratios(compiled, 'trainer')} times"
    )


def energy() -> str:
    found = json.loads((RESULTS / "energy.json").read_text())
    if not found["counters"]:
        return "The machine that these results are from has no counter that the script reads, and nothing was measured."
    cells = [(r["net"], r["method"], f"{r['joules']:.3g}", f"{r['ratio']:.2f}") for r in found["rows"]]
    return f"Counters: {', '.join(found['counters'])}.\n\n" + markdown(("network", "method", "joules", "ratio"), cells)


def first_epochs() -> str:
    found = curves.table(read(RESULTS / "first_epoch.csv", curves.Row), first_epoch.COLUMN)
    return found and f"{found}\n\nThe grids:\n\n{first_epoch.grid(first_epoch.METHODS)}"


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
        "examples/paper/accuracy.py",
        "Both methods have the same six rates, chosen on a validation split. The protocol, and which choices were made "
        "after test results were seen, are in [](results.md).",
        accuracies,
    ),
    (
        "Samples to 95 %",
        "accuracy_per_second.csv",
        "examples/accuracy_per_second.py",
        "MNIST, batches of 200, test accuracy, judged every 30 batches (6,000 samples); seconds are those of training "
        "alone, on a machine that was not idle: compare methods, not machines.",
        samples_to,
    ),
    (
        "Time and memory",
        "step_time.json",
        "examples/benchmarks/step_time.py",
        "Backprop's median time of a training step, times the steps of an epoch (batches of 200; LeNet 128, VGG-like "
        "64); others by their ratio to it in paired runs. Data loading and Trainer are not counted. Peak memory is "
        "what a step adds to network, optimizer and batch; of a compiled step it cannot be counted. More in "
        "[](speed.md).",
        time_and_memory,
    ),
    (
        "Energy",
        "energy.json",
        "examples/benchmarks/energy.py",
        "Joules per training step by the machine's own counters, median over rounds, and the ratio to backprop's.",
        energy,
    ),
    (
        "The first epoch, beside offline methods",
        "first_epoch.csv",
        "examples/paper/first_epoch.py",
        "Test accuracy in per cent after so many batches of 200 of MNIST (mlp) and CIFAR-10 (95 % intervals). Every "
        "method has six settings, judged on a validation split by the mean over its marks: three seeds and all marks "
        "for the online methods, one seed and two marks (25 and 100 batches) for ADMM and MAC, whose runs are long. "
        "These are fitted anew at each mark to the samples seen by then, with 30 sweeps over them; they were not run "
        "on CIFAR-10, where AM-mem is 2.6 to 4.3 points ahead of both kinds of Adam at every mark. Two smaller rates, "
        "0.00025 and 0.0005, were tried for these there, as 0.001, the smallest of the grid, had been best. MAC's "
        "best setting is at a corner of its grid. After 5 batches MAC, with 30 sweeps over these 1,000 samples, is "
        "ahead of all online methods; from 25 on AM-mem is ahead of it. On 2x500 a fit of MAC takes 7 minutes of a "
        "core after 100 batches and three times as long after 300.\n\n"
        "![Accuracy over mini-batches](results/first_epoch.svg)",
        first_epochs,
    ),
    (
        "Fifty epochs at a constant rate",
        "epochs.csv",
        "examples/paper/epochs.py",
        "Test accuracy in per cent after so many epochs of MNIST (mlp) and CIFAR-10, batches of 200 (95 % intervals). "
        "The setting of each method is the best of six (the grids above) after 15 epochs of one run judged by a "
        "validation split. The smallest rate of the grid was best on CIFAR-10 for all four that have one, and on "
        "2x100 for both kinds of Adam: there smaller ones may be better still. AM-mem leads after one epoch. After 50 "
        "SGD and AM-SGD do on MNIST; on CIFAR-10 AM-mem's one run is above all other means from the tenth epoch on. "
        "17 of the 25 runs of 2x500 and those of CIFAR-10 (but for AM-mem's) were made on an H200, PyTorch 2.11, the "
        "others on CPUs.\n\n"
        "![Error over epochs](results/epochs.svg)",
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
        "94.92 %, 94.61 % on average. Ours are 0.15 below, which five runs each do not tell from chance (± 0.24, "
        "[](baselines.md)). Ours ran on an H100, up to three at a time; on two CPU cores a sweep takes a minute.",
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

- **Accuracy**: with Adam or SGD in the layers it is nowhere ahead of tuned backprop with the same optimizer by more
  than the noise, very deep networks from PyTorch's default weights aside ([](deep.md)), and mostly a few hundredths
  of a point behind; on CIFAR-10 some half a point, and more than a point in a convolutional network with BatchNorm
  unless `batch_norm="live"` is set.
- **The first thousand samples**: MAC, offline, has 4 to 5 points more after 30 sweeps over them than AM-mem after one
  pass, and AM-mem more than it from 5,000 on (below).
- **Long runs of AM-mem**: it leads in the first epoch; after 50 of MNIST at a constant rate it is behind SGD (below).
- **Time**: with one code step, {step_costs}.
  Several code steps take longer still. On a GPU an eager step takes two to five times as long, and with
  five code steps up to 9.5 times; only CUDA graphs make it as fast ([](speed.md)). A recurrent net's run takes 1.1
  to 2.3 times as long ([](recurrent.md)), a ResNet's 2.5 times ([](blocks.md)).
- **Memory**: with one code step about that of backprop, but 26 to 37 % more in residual networks ([](blocks.md));
  several code steps need more.
- **Binary networks**: the search for better patterns costs two points, so it is off ([](binary.md)).
- **A small RNN read at its last step** (15 units) ends 5 points below the figure reported for it ([](recurrent.md)).
"""


def page() -> str:
    """The whole page."""
    measured = (RESULTS / "step_time.json").exists()
    parts = [HEAD.format(step_costs=step_costs() if measured else "nothing is measured yet")]
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
