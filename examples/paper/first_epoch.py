"""Test accuracy by number of mini-batches in the first epoch: the paper's first figure, online beside offline methods.

    python examples/paper/first_epoch.py tune  --suite mlp_100 --root data
    python examples/paper/first_epoch.py final --suite mlp_100 --root data
    python examples/paper/first_epoch.py table
    python examples/paper/first_epoch.py plot

Networks 784-100-100-10 (mlp_100) and 784-500-500-10 (mlp_500) on MNIST, 3072-500-500-10 on CIFAR-10 (cifar10_mlp),
ReLU, no BatchNorm, mini-batches of 200.
AM-Adam, AM-SGD and AM-mem are AltMin with Adam, with SGD (momentum 0.9) and with the co-activation memory; Adam and SGD
are backprop. The offline methods ADMM and MAC cannot see a mini-batch once: at each mark they are fitted anew to all
samples that the online methods have seen by then, with as many sweeps over them as `SWEEPS` says, so they are given far
more passes over the data.

Every method has six settings (`METHODS`), both kinds of Adam two more on CIFAR-10 (`SMALLER`); `tune` judges them by
a sixth of the training set held out, and the one with the highest mean accuracy over the marks is used by `final`,
which trains on the whole training set, is judged by the test set, and uses other seeds. `--small` does all of it with
one seed, fewer marks, and another results file. `--workers N` runs N at a time, `--device cuda` on a GPU. Every
finished run is written at once to docs/results/first_epoch.csv; a run whose rows exist is not repeated, so an
interrupted command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))  # examples/memory.py has the data, judge and steps
import curves
import memory
from curves import Row, Run, best, plot, table
from rows import markdown, read

from lightning_altmin import AltMin, LocalGradient
from lightning_altmin.baselines import ADMMModule, Hinge, MACModule, SquaredError
from lightning_altmin.guard import NonFiniteError

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "first_epoch.csv"
BATCH = 200
MARKS = (5, 10, 25, 50, 100, 200, 300)
OFFLINE_MARKS = {"tune": (25, 100), "final": (5, 25, 100, 300)}
SWEEPS = 30
HELD_OUT = {"tune": 1 / 6, "final": 0.0}
TUNE_SEEDS = {"online": 3, "offline": 1}
ADAM = ("0.001", "0.002", "0.004", "0.006", "0.008", "0.012")
SGD = ("0.02", "0.05", "0.1", "0.15", "0.2", "0.3")
METHODS = {
    "AM-Adam": ADAM,
    "AM-SGD": SGD,
    "AM-mem": tuple(f"step={s} ridge={r} every=10" for s, r in itertools.product((0.4, 0.8, 1.0), (0.3, 1.0))),
    "Adam": ADAM,
    "SGD": SGD,
    "ADMM": tuple(f"loss={loss} gamma={g}" for loss, g in itertools.product(("hinge", "squared"), (1, 10, 100))),
    "MAC": tuple(f"mu={mu} growth={growth}" for mu, growth in itertools.product((0.01, 0.1, 1.0), (1.5, 4.0))),
}
SMALLER = ("0.00025", "0.0005")
"""Also tried with both kinds of Adam on CIFAR-10, where the smallest of `ADAM` was best."""
OFFLINE = ("ADMM", "MAC")
ONLINE = tuple(method for method in METHODS if method not in OFFLINE)
COLUMN = "{} batches"


def step_of(network: nn.Module, method: str, setting: str) -> memory.Step:
    """The training step of an online method."""
    if method == "AM-mem":
        return memory.memory(network, setting)
    rate = float(setting)
    if not method.startswith("AM-"):
        return memory.backprop(network, method, rate)
    optimizer: Callable[..., torch.optim.Optimizer] = (
        functools.partial(torch.optim.Adam, lr=rate, fused=True)
        if method == "AM-Adam"
        else functools.partial(torch.optim.SGD, lr=rate, momentum=0.9, fused=True)
    )
    core = AltMin(network, nn.CrossEntropyLoss(), weights=LocalGradient(optimizer))
    return lambda x, y: core.step(x, y, keep_codes=False)


def stepper(run: Run, device: str) -> tuple[nn.Module, memory.Step]:
    """The network of an online run and its training step."""
    suite, _, method, setting, seed = run
    torch.manual_seed(seed)  # the same weights and the same order of batches for all methods
    network = memory.SUITES[suite].network().to(device)
    return network, step_of(network, method, setting)


def online(run: Run, samples: memory.Samples, marks: tuple[int, ...], device: str) -> Iterator[tuple[int, float]]:
    """Accuracy at each mark of one pass."""
    network, step = stepper(run, device)
    for number, (x, y) in enumerate(samples.batches(BATCH, marks[-1], by_class=False), 1):
        step(x, y)
        if number in marks:
            yield number, memory.judge(network, samples.judged)[0]


def offline_module(method: str, setting: str, network: nn.Module) -> ADMMModule | MACModule:
    values = memory.parsed(setting)
    if method == "MAC":
        return MACModule(network, every=2, **values)
    return ADMMModule(network, Hinge() if values.pop("loss") == "hinge" else SquaredError(), **values)


def offline(run: Run, samples: memory.Samples, marks: tuple[int, ...], device: str) -> Iterator[tuple[int, float]]:
    """Accuracy at each mark, fitted anew to the samples that the online methods have seen by then."""
    suite, _, method, setting, seed = run
    for mark in marks:
        torch.manual_seed(seed)
        network = memory.SUITES[suite].network()
        batches = list(samples.batches(BATCH, mark, by_class=False))
        seen = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
        trainer = Trainer(
            accelerator="gpu" if device == "cuda" else "cpu",
            max_epochs=SWEEPS,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        one_batch: DataLoader[Any] = DataLoader([seen], batch_size=None)  # type: ignore[arg-type]
        trainer.fit(offline_module(method, setting, network), one_batch)
        yield mark, memory.judge(network.to(device), samples.judged)[0]


@functools.cache
def loaded(suite: str, root: str, held_out: float, device: str = "cpu") -> memory.Samples:
    """The samples, read once in a process, or in the one it was forked from."""
    return memory.Samples(suite, root, held_out) if device == "cpu" else loaded(suite, root, held_out).to(device)


def marks_of(suite: str, phase: str, method: str, small: bool) -> tuple[int, ...]:
    """After how many batches the method is judged."""
    last = 25 if small else memory.SUITES[suite].marks[-1]
    return tuple(mark for mark in (OFFLINE_MARKS[phase] if method in OFFLINE else MARKS) if mark <= last)


def train(run: Run, marks: tuple[int, ...], root: str, device: str) -> list[Row]:
    """One run's rows, a mark each."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    suite, phase, method, setting, seed = run
    samples = loaded(suite, root, HELD_OUT[phase], device)
    found: dict[int, float] = dict.fromkeys(marks, 0.0)
    try:
        for mark, accuracy in (offline if method in OFFLINE else online)(run, samples, marks, device):
            found[mark] = accuracy
    except (NonFiniteError, torch.linalg.LinAlgError) as error:  # diverged: its rows from here on say 0
        print(f"{run}: {error}", flush=True)
    return [Row(suite, phase, method, setting, seed, mark, accuracy) for mark, accuracy in found.items()]


def planned(phase: str, suite: str, rows: list[Row], seeds: int, wanted: list[str]) -> list[Run]:
    if phase == "final":
        return [(suite, phase, m, best(rows, suite, m), seed) for seed in range(seeds) for m in wanted]
    return [
        (suite, phase, method, setting, 100 + seed)
        for method in wanted
        for seed in range(min(seeds, TUNE_SEEDS["offline" if method in OFFLINE else "online"]))
        for setting in settings(suite, method)
    ]


def settings(suite: str, method: str) -> tuple[str, ...]:
    """What is tried."""
    smaller = SMALLER if suite == "cifar10_mlp" and method in ("AM-Adam", "Adam") else ()
    return smaller + METHODS[method]


def grid(methods: Iterable[str]) -> str:
    """The settings that are tried."""
    return markdown(("method", "settings tried"), [(method, "; ".join(METHODS[method])) for method in methods])


def execute(arguments: argparse.Namespace) -> None:
    rows = read(arguments.results, Row)
    if arguments.command == "tune":
        print(grid(arguments.methods), flush=True)
    runs = planned(arguments.command, arguments.suite, rows, arguments.seeds, arguments.methods)
    loaded(arguments.suite, arguments.root, HELD_OUT[arguments.command])
    one = functools.partial(train, root=arguments.root, device=arguments.device)
    judged = functools.partial(marks_of, arguments.suite, arguments.command, small=arguments.small)
    online = [run for run in runs if run[2] not in OFFLINE]
    curves.execute(online, functools.partial(one, marks=judged(ONLINE[0])), arguments.results, arguments.workers)
    for mark in judged(OFFLINE[0]):  # each mark is a fit of its own, and the later ones take long
        fit = functools.partial(one, marks=(mark,))
        offline = [run for run in runs if run[2] in OFFLINE]
        curves.execute(offline, fit, arguments.results, arguments.workers, at=mark)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("tune", "final", "table", "plot"))
    parser.add_argument("--suite", choices=("mlp_100", "mlp_500", "cifar10_mlp"), default="mlp_100")
    parser.add_argument("--root", default="data", help="folder of the data set")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1, help="processes that train")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.small:
        arguments.seeds = 1
    if arguments.results is None:
        arguments.results = RESULTS.with_stem("first_epoch_small") if arguments.small else RESULTS
    if arguments.command == "table":
        print(table(read(arguments.results, Row), COLUMN))
    elif arguments.command == "plot":
        figure = arguments.results.with_suffix(".svg")
        plot(read(arguments.results, Row), figure, "mini-batches of 200 seen", squares=OFFLINE)
    else:
        execute(arguments)


if __name__ == "__main__":
    main()
