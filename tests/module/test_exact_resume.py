"""A run that was interrupted and resumed ends as the uninterrupted one, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_altmin import (
    AltMinModule,
    AltMinObjective,
    BackpropModule,
    DiscreteCodes,
    GradientCodes,
    LeastSquaresCodes,
    LocalGradient,
    ProximalWeights,
)
from lightning_altmin.nn import ElmanRNN, Sign
from lightning_altmin.random_state import random_state, set_random_state
from tests.module.interruption import SaveAt, assert_equal, assert_resumes, final_state
from tests.module.problems import CLASSES, FEATURES, Record, loader, network, residual, samples, trainer

BATCHES = 5
EPOCHS = {"max_epochs": 3}
STEPS = {"max_epochs": -1, "max_steps": 13}


class StatefulLoader:
    """Shuffled batches with a length, resumable after any batch, augmented from the global generator."""

    def __init__(self) -> None:
        self.x, self.y = samples(20)
        self.order: torch.Tensor | None = None
        self.position = 0
        self.resumes = False

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[Any]:
        if not self.resumes:
            self.order, self.position = torch.randperm(20), 0
        self.resumes = False
        return self.batches()

    def batches(self) -> Iterator[Any]:
        assert self.order is not None
        while self.position < BATCHES:
            chosen = self.order[4 * self.position : 4 * self.position + 4]
            self.position += 1
            yield self.x[chosen] + 0.1 * torch.randn(4, 6), self.y[chosen]

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order, self.position, self.resumes = state["order"], state["position"], state["position"] < BATCHES


class Stream(IterableDataset[Any]):
    """Samples of unknown number, in an order drawn when the iterator is asked for the first of them."""

    def __iter__(self) -> Iterator[Any]:
        x, y = samples(20)
        for index in torch.randperm(20):
            yield x[index], y[index]


LOADERS: dict[str, Callable[[], Any]] = {
    "shuffled": lambda: loader(shuffle=True),
    "stream": lambda: DataLoader(Stream(), batch_size=4),
    "stateful": StatefulLoader,
}


def step_schedule(optimizer: torch.optim.Optimizer) -> StepLR:
    """Changes the rate every epoch, so that one epoch more or less shows in the weights."""
    return StepLR(optimizer, 1, 0.8)


def plateau(optimizer: torch.optim.Optimizer) -> ReduceLROnPlateau:
    """Changes the rate at every epoch that does not improve by far."""
    return ReduceLROnPlateau(optimizer, factor=0.8, patience=0, threshold=0.5)


def altmin(**settings: Any) -> AltMinModule:
    """With dropout and BatchNorm, so that the random state and the buffers matter, and a composite optimizer."""
    weights = LocalGradient({"default": torch.optim.Adam, "0": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)})
    return AltMinModule(network(0.3, norm=True), weights=weights, **({"lr_scheduler": step_schedule} | settings))


def least_squares(**settings: Any) -> AltMinModule:
    """Its codes refuse dropout and BatchNorm."""
    return AltMinModule(network(), codes=LeastSquaresCodes(), **({"lr_scheduler": step_schedule} | settings))


def discrete(**settings: Any) -> AltMinModule:
    """Margins and a search, and the curvature of a smooth code below; soft thresholds of Adam's own steps."""
    torch.manual_seed(0)
    layers = (nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 7), Sign(), nn.Linear(7, CLASSES))
    objective, codes = AltMinObjective(mu=0.1, lambda_w=1e-3), DiscreteCodes(flips=3)
    solvers: dict[str, Any] = {"objective": objective, "codes": codes, "weights": ProximalWeights()}
    return AltMinModule(nn.Sequential(*layers), **solvers, **({"lr_scheduler": step_schedule} | settings))


def recurrent(**settings: Any) -> AltMinModule:
    """One sample is a sequence of three steps; one curvature is kept for all of them."""
    torch.manual_seed(0)
    return AltMinModule(ElmanRNN(2, 5, 3), **({"lr_scheduler": step_schedule} | settings))


def traced(**settings: Any) -> AltMinModule:
    """Residual blocks with BatchNorm and dropout that only autograd can differentiate."""
    return AltMinModule(residual(0.3), **({"lr_scheduler": step_schedule} | settings))


def backprop(**settings: Any) -> BackpropModule:
    """The twin, with dropout and BatchNorm as well."""
    return BackpropModule(network(0.3, norm=True), **({"lr_scheduler": step_schedule} | settings))


def data(kind: str, validation: bool) -> Callable[[], dict[str, Any]]:
    """Makes loaders; the validation loader is a torch DataLoader, whose iterator draws from the global generator."""
    val = {"val_dataloaders": loader(8, seed=3)} if validation else {}
    return lambda: {"train_dataloaders": LOADERS[kind](), **val}


both = pytest.mark.parametrize("make", [altmin, backprop, least_squares, discrete, recurrent, traced])


@both
@pytest.mark.parametrize("limit", [EPOCHS, STEPS], ids=["max_epochs", "max_steps"])
@pytest.mark.parametrize(
    ("hook", "validation"), [("on_train_epoch_end", False), ("on_train_epoch_end", True), ("on_validation_end", True)]
)
@pytest.mark.parametrize("kind", ["shuffled", "stream", "stateful"])
def test_at_the_end_of_an_epoch(
    kind: str, hook: str, validation: bool, limit: dict[str, int], make: Any, tmp_path: Path
) -> None:
    """Catches a next epoch in another order, an epoch's batch trained twice, a schedule or a dropout mask off by one.

    Lightning resumes in different ways after these checkpoints: it uses the loader's first iterator or drops it, calls
    the epoch's last hooks again or not, and under max_steps without validation would train on in the finished epoch.
    """
    assert_resumes(make, data(kind, validation), hook, 2, tmp_path / "saved.ckpt", **limit)


@both
@pytest.mark.parametrize("limit", [EPOCHS, STEPS], ids=["max_epochs", "max_steps"])
@pytest.mark.parametrize("kind", ["shuffled", "stateful"])
def test_in_the_last_batch_of_an_epoch(kind: str, limit: dict[str, int], make: Any, tmp_path: Path) -> None:
    """Catches a schedule step, or a draw, that the run without interruption makes after the checkpoint is written."""
    assert_resumes(make, data(kind, False), "on_train_batch_end", BATCHES, tmp_path / "saved.ckpt", **limit)


@both
@pytest.mark.parametrize("limit", [EPOCHS, STEPS], ids=["max_epochs", "max_steps"])
@pytest.mark.parametrize("validation", [False, True])
@pytest.mark.parametrize("batch", [1, 3, BATCHES + 2])
def test_inside_an_epoch(batch: int, validation: bool, limit: dict[str, int], make: Any, tmp_path: Path) -> None:
    """Catches a random state put back too early (the iterator then draws) or too late (the batch is then drawn)."""
    assert_resumes(make, data("stateful", validation), "on_train_batch_end", batch, tmp_path / "saved.ckpt", **limit)


@both
def test_after_a_validation_inside_an_epoch(make: Any, tmp_path: Path) -> None:
    """Catches a validation that moves the random state, or one that is run again after the resume."""
    assert_resumes(
        make, data("stateful", True), "on_validation_end", 3, tmp_path / "saved.ckpt", val_check_interval=2, **EPOCHS
    )


@both
@pytest.mark.parametrize("limit", [EPOCHS, STEPS], ids=["max_epochs", "max_steps"])
@pytest.mark.parametrize(("batch", "interval"), [(BATCHES, 1.0), (2, 2)])
@pytest.mark.filterwarnings("ignore:the checkpoint was written between a batch and the validation")
def test_between_a_batch_and_its_validation(
    batch: int, interval: float, limit: dict[str, int], make: Any, tmp_path: Path
) -> None:
    """Catches training that depends on whether that validation, which Lightning drops, was run."""
    flags = {"val_check_interval": interval, **limit}
    assert_resumes(make, data("stateful", True), "on_train_batch_end", batch, tmp_path / "saved.ckpt", **flags)


def test_a_dropped_validation_is_reported(tmp_path: Path) -> None:
    """Catches early stopping or a plateau schedule that silently misses a value."""
    with pytest.warns(UserWarning, match="written between a batch and the validation due after it"):
        assert_resumes(
            altmin, data("stateful", True), "on_train_batch_end", BATCHES, tmp_path / "saved.ckpt", max_epochs=2
        )


@both
@pytest.mark.parametrize("limit", [EPOCHS, STEPS], ids=["max_epochs", "max_steps"])
@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_validation_end"])
def test_plateau_schedule(hook: str, limit: dict[str, int], make: Any, tmp_path: Path) -> None:
    """Catches a value seen twice (the epoch's last hooks run again), never (they do not), or asked for too early."""
    module = lambda: make(lr_scheduler=plateau, lr_monitor="val_loss")  # noqa: E731
    assert_resumes(module, data("shuffled", True), hook, 1, tmp_path / "saved.ckpt", **limit)


@pytest.mark.parametrize("batch", [1, 2, 3, BATCHES, BATCHES + 1])
def test_inside_an_accumulation(batch: int, tmp_path: Path) -> None:
    """Catches gradients of accumulated batches that are lost, or zeroed by Lightning after they were restored."""
    module = lambda: altmin(accumulate_batches=3)  # noqa: E731
    assert_resumes(module, data("stateful", False), "on_train_batch_end", batch, tmp_path / "saved.ckpt", **EPOCHS)


def test_mu_and_the_code_rate_come_from_the_checkpoint(tmp_path: Path) -> None:
    """Catches constants of the objective that a schedule has changed and a resumed run forgets."""

    def module() -> AltMinModule:
        return AltMinModule(network(), codes=GradientCodes(lr=0.5))

    first = module()
    fit = trainer(max_epochs=1)
    fit.fit(first, loader())
    first.core.objective.mu.fill_(0.7)
    first.core.codes.lr.fill_(0.25)  # type: ignore[operator]
    fit.save_checkpoint(tmp_path / "saved.ckpt")
    second = module()
    trainer(max_epochs=2).fit(second, loader(), ckpt_path=tmp_path / "saved.ckpt", weights_only=True)
    assert float(second.core.objective.mu) == 0.7
    assert float(second.core.codes.lr) == 0.25  # type: ignore[arg-type]


@both
def test_a_finished_run_can_be_continued(make: Any, tmp_path: Path) -> None:
    """Catches a checkpoint written after fit that lacks something one written inside it has."""
    seed_everything(1, verbose=False)
    whole = trainer(max_epochs=3)
    module = make()
    whole.fit(module, loader(shuffle=True))
    expected = final_state(whole, module)

    seed_everything(1, verbose=False)
    first = trainer(max_epochs=2)
    first.fit(make(), loader(shuffle=True))
    first.save_checkpoint(tmp_path / "saved.ckpt")
    seed_everything(5, verbose=False)
    second, module = trainer(max_epochs=3), make()
    second.fit(module, loader(shuffle=True), ckpt_path=tmp_path / "saved.ckpt", weights_only=True)
    assert_equal(expected, final_state(second, module))


def test_the_checkpoint_is_plain(tmp_path: Path) -> None:
    """Catches arbitrary objects in the file, which torch.load(weights_only=True) refuses."""
    module = altmin(accumulate_batches=4, lr_scheduler=plateau, lr_monitor="val_loss")
    fit = trainer(max_epochs=1, limit_val_batches=None)
    fit.fit(module, loader(), loader(8, seed=3))
    fit.save_checkpoint(tmp_path / "saved.ckpt")
    checkpoint = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    assert torch.equal(checkpoint["state_dict"]["core.network.0.weight"], module.network[0].weight)  # type: ignore[index]


def test_random_state_round_trip() -> None:
    """Catches a generator that is left out or put back differently, the cached normal of each one included."""
    import random

    import numpy as np

    def draws() -> list[float]:
        values = [random.gauss(0, 1), random.random(), float(np.random.normal()), float(np.random.uniform())]
        return [*values, float(torch.rand(())), float(torch.randn(()))]

    draws()  # leaves a cached second normal in Python's and NumPy's generators
    state = copy.deepcopy(random_state())
    expected = draws()
    draws()
    set_random_state(state)
    assert draws() == expected


@pytest.mark.parametrize("make", [altmin, backprop])
def test_loading_weights_alone_does_not_touch_the_random_state(make: Any, tmp_path: Path) -> None:
    """Catches a new run that is no longer governed by its own seed because its weights came from a checkpoint."""
    first = trainer(max_epochs=1)
    first.fit(make(), loader())
    first.save_checkpoint(tmp_path / "saved.ckpt")
    module_class: type[LightningModule] = type(make())
    flags = {"lr_scheduler": step_schedule}
    finals = []
    for seed in (1, 2):
        module: Any = module_class.load_from_checkpoint(
            tmp_path / "saved.ckpt", network=network(0.3, norm=True), weights_only=True, **flags
        )
        seed_everything(seed, verbose=False)
        trainer(max_epochs=1).fit(module, loader())
        finals.append(module.network[0].weight.detach().clone())
    assert not torch.equal(finals[0], finals[1])


def test_a_second_fit_begins_anew() -> None:
    """Catches state of an earlier run in a later one: pending gradients, loss sums, the epoch a plateau has seen."""

    class Break(Exception):  # noqa: N818
        pass

    class Fails(AltMinModule):
        fails = True

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if self.fails and batch_idx == 1:
                raise Break

    settings: Any = {
        "codes": GradientCodes(),
        "accumulate_batches": 3,
        "lr_scheduler": plateau,
        "lr_monitor": "val_loss",
    }
    module = Fails(network(), **settings)
    with pytest.raises(Break):
        trainer(max_epochs=1).fit(module, loader())
    module.fails = False
    fresh = AltMinModule(network(), **settings)
    for each in (module, fresh):  # no step was made before the failure, so both begin from the same weights
        fit = trainer(max_epochs=1, limit_val_batches=None)
        fit.fit(each, loader(), loader(8, seed=3))
        assert fit.lr_scheduler_configs[0].scheduler.last_epoch == 1
        again = trainer(max_epochs=1, limit_val_batches=None)
        again.fit(each, loader(), loader(8, seed=3))
        assert again.lr_scheduler_configs[0].scheduler.last_epoch == 1
    assert_equal(module.state_dict(), fresh.state_dict())


def test_epochs_of_a_single_batch(tmp_path: Path) -> None:
    """Catches off-by-one in an epoch of a single batch, which is first and last at once."""
    x, y = samples(4)
    make_data = lambda: {"train_dataloaders": DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)}  # noqa: E731
    for hook in ("on_train_epoch_end", "on_train_batch_end"):
        assert_resumes(altmin, make_data, hook, 1, tmp_path / "saved.ckpt", **EPOCHS)


@pytest.mark.parametrize("kind", [AltMinModule, BackpropModule])
def test_the_training_loss_goes_on_between_log_points(kind: Any, tmp_path: Path) -> None:
    """Catches batches before the interruption that the first mean after it leaves out: a run watches its loss."""
    whole, rest, path = Record(), Record(), tmp_path / "a.ckpt"
    for logger, callbacks, ckpt in ((whole, [SaveAt("on_train_batch_end", 6, path)], None), (rest, [], path)):
        seed_everything(1, verbose=False)
        flags = {"callbacks": callbacks, "enable_checkpointing": bool(callbacks), "log_every_n_steps": 4}
        fit = trainer(logger=logger, **EPOCHS, **flags)
        fit.fit(kind(network()), StatefulLoader(), ckpt_path=ckpt, weights_only=True if ckpt else None)
    losses = whole.values("train_loss")
    assert [step for step, _ in losses] == [3, 7, 11]
    assert rest.values("train_loss") == losses[1:]
