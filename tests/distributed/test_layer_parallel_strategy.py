"""``Trainer(strategy="altmin_layer_parallel")``: the run of one process, its layers on several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric, SumMetric
from torchmetrics.classification import MulticlassAUROC

from lightning_altmin import (
    AltMinModule,
    CoactivationMemory,
    CurvatureCodes,
    LayerwiseWeights,
    LineSearchCodes,
    LocalGradient,
)
from lightning_altmin.callbacks import MuSchedule
from lightning_altmin.guard import NonFiniteError
from tests.distributed.gloo import launch
from tests.distributed.layer_parallel_problems import MODELS, State, data, layers, module, state
from tests.distributed.problems import CLASSES, OPTIMIZERS, batches
from tests.distributed.test_ddp import Drawn, compare, loader, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no"),  # on purpose
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


SETTINGS: dict[str, Any] = {
    "adam": lambda: {},
    "line search": lambda: {"codes": LineSearchCodes()},
    "sgd": lambda: {"weights": LocalGradient(OPTIMIZERS["sgd"])},
    "accumulation": lambda: {"accumulate_batches": 2},
    "clipping": lambda: {"gradient_clip_norm": 0.01},
    "schedule": lambda: {
        "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3),
        "lr_interval": "step",
    },
    "memory": lambda: {"weights": CoactivationMemory(every=2)},
    "memory, solved": lambda: {"weights": CoactivationMemory("solve", every=3)},
    "memory below the output": lambda: {
        "weights": LayerwiseWeights({"output": LocalGradient(), "default": CoactivationMemory(every=2)})
    },
    "optimizers by layer": lambda: {
        "weights": LocalGradient({"0": OPTIMIZERS["sgd"], "default": OPTIMIZERS["adam"]}),
    },
}


@pytest.mark.parametrize(
    ("kind", "world", "name"),
    [*(("mlp", 2, name) for name in SETTINGS), ("mlp", 3, "adam"), ("mlp", 3, "memory"), ("lenet", 2, "adam")],
)
def test_equals_one_process(name: str, kind: str, world: int) -> None:
    """Catches whatever of a run is one process's own: a step, a schedule, a clipped norm, a memory, a logged loss."""
    flags = {"log_every_n_steps": 1}

    def share(rank: int) -> State:
        torch.manual_seed(rank)  # all get the weights of the first
        model, fit = module(kind, **SETTINGS[name]()), layers(world, **flags)
        fit.fit(model, loader(data(kind)))
        return state(model, fit)

    model, fit = module(kind, **SETTINGS[name]()), trainer(devices=1, **flags)
    fit.fit(model, loader(data(kind)))
    compare(launch(world, share), state(model, fit))


def test_bf16_mixed() -> None:
    """Catches codes or moves that cross a border in sixteen bits, or a process that computes in another precision.

    Every sample is computed on its own layer's process by the same products; what is left is the rounding of sums.
    """
    single = [(x.float(), y) for x, y in data()]

    def run(fit: Trainer) -> State:
        model = module(weights=LocalGradient(OPTIMIZERS["sgd"])).float()
        fit.fit(model, loader(single))
        return {name: value for name, value in model.state_dict().items() if "network" in name}

    start = {name: value for name, value in module().float().state_dict().items() if "network" in name}
    found = launch(2, lambda rank: run(layers(precision="bf16-mixed")))
    expected = run(trainer(devices=1, precision="bf16-mixed"))
    assert all(value.dtype == torch.float32 for value in found[0].values())
    assert all(float((value - expected[name]).abs().max()) > 0.01 for name, value in start.items()), "nothing trained"
    compare(found, expected, 2e-3)


class Held(Callback):
    """Notes what a process holds while it trains: numbers of parameters, optimizer state and memory."""

    found: tuple[int, int, int]

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        def size(tensors: Any) -> int:
            return sum(t.untyped_storage().nbytes() // t.element_size() for t in tensors if t.dim() > 0)

        states = trainer.optimizers[0].state.values()
        kept = size(pl_module.core.parameters()), size(v for s in states for v in s.values())
        memories = size(b for b in pl_module.core.weights.buffers() if b.numel() > 1)
        # what is let go is one number with strides of zero
        gone = sum(1 for p in pl_module.core.parameters() if p.stride() == (0,) * p.dim())
        gone_buffers = sum(1 for b in pl_module.core.weights.buffers() if b.numel() > 1 and set(b.stride()) == {0})
        self.found = kept[0] - gone, kept[1], memories - gone_buffers


def test_a_process_holds_its_own_layers_only() -> None:
    """Catches parameters, optimizer state and memories of layers that another process owns."""

    def share(rank: int) -> Any:
        held = Held()
        layers(max_epochs=1, callbacks=[held]).fit(module(), loader(data()))
        remembering = Held()
        fit = layers(max_epochs=1, callbacks=[remembering])
        fit.fit(module(weights=CoactivationMemory("solve", every=3)), loader(data()))
        return held.found[:2], (remembering.found[0], remembering.found[2])

    # 6x8+8 = 56 | 8x7+7 = 63 and 7x3+3 = 24; Adam keeps two moments of each
    # A and B of 7 inputs (a bias's among them) and 8 outputs: 49 + 56 | 81 + 63 and 64 + 24
    assert launch(2, share) == [((56, 112), (56, 105)), ((87, 174), (87, 232))]


class Half(nn.Sequential):
    """A block that only autograd can differentiate, and that draws random numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self[0](x), 0.5, self.training)


def with_dropout(kind: str) -> AltMinModule:
    torch.manual_seed(0)
    middle = [nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 7)] if kind == "rule" else [Half(nn.Linear(8, 7))]
    network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), *middle, nn.ReLU(), nn.Linear(7, CLASSES)).double()
    return AltMinModule(nn.Sequential(*network[:2], nn.Dropout(0.3), *network[2:]))


@pytest.mark.parametrize("kind", ["rule", "autograd"])
def test_random_layers_do_not_depend_on_the_number_of_processes(kind: str) -> None:
    """Catches masks that follow the process, and generators that drift apart, after which processes read other data."""

    def share(rank: int, world: int) -> tuple[State, Tensor]:
        seed_everything(7, verbose=False)
        model, fit = with_dropout(kind), layers(world, limit_val_batches=None)
        fit.fit(model, datamodule=Drawn(batch_size=8, eval_batch_size=4))
        return state(model, fit), torch.get_rng_state()

    ((expected, generator),) = launch(1, share, 1)
    for found, other in (*launch(2, share, 2), *launch(3, share, 3)):
        compare([found], expected)
        assert torch.equal(generator, other)


def entries(checkpoint: Any, name: str = "") -> dict[str, Any]:
    """A checkpoint's leaves by their path."""
    if isinstance(checkpoint, dict | list | tuple):
        pairs = checkpoint.items() if isinstance(checkpoint, dict) else enumerate(checkpoint)
        return {k: v for key, value in pairs for k, v in entries(value, f"{name}.{key}").items()}
    return {name: checkpoint}


def interrupted(fit: Trainer, kept: Path, **settings: Any) -> None:
    """The run until a checkpoint in the middle of its second epoch."""
    seed_everything(3, verbose=False)
    fit.fit(module(**settings), datamodule=Drawn(batch_size=4, eval_batch_size=4))
    fit.save_checkpoint(kept)


def resumed(fit: Trainer, kept: Path, **settings: Any) -> State:
    model = module(**settings)
    fit.fit(model, datamodule=Drawn(batch_size=4, eval_batch_size=4), ckpt_path=kept, weights_only=True)
    return state(model, fit)


CHECKPOINTED: dict[str, Any] = {
    "adam": SETTINGS["adam"],
    "optimizers by layer": SETTINGS["optimizers by layer"],
    "accumulation": lambda: {"accumulate_batches": 4},
    "memory": SETTINGS["memory"],
}


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpoints_are_those_of_one_process(name: str, tmp_path: Path) -> None:
    """Catches a checkpoint with a hole, and one that only as many processes can go on from."""
    settings = CHECKPOINTED[name]
    accumulated = name == "accumulation"  # 6 batches an epoch make 2 steps: the last has 2

    class Stop(Callback):
        """In the middle of the second epoch, where gradients are pending if they are accumulated."""

        def on_train_batch_end(self, trainer: Trainer, *rest: Any) -> None:
            if trainer.fit_loop.total_batch_idx == 7:
                trainer.save_checkpoint(tmp_path / f"{trainer.world_size}.ckpt")

    def first(rank: int) -> State:
        seed_everything(3, verbose=False)
        model, fit = module(**settings()), layers(callbacks=[Stop()])
        fit.fit(model, datamodule=Drawn(batch_size=4, eval_batch_size=4))
        return state(model, fit)

    def resume(rank: int, world: int) -> State:
        return resumed(layers(world), tmp_path / "2.ckpt", **settings())

    straight = launch(2, first)
    seed_everything(3, verbose=False)
    model, fit = module(**settings()), trainer(devices=1, callbacks=[Stop()])
    fit.fit(model, datamodule=Drawn(batch_size=4, eval_batch_size=4))
    expected = state(model, fit)
    compare(straight, expected)

    ours, theirs = (entries(torch.load(tmp_path / f"{world}.ckpt", weights_only=True)) for world in (2, 1))
    assert [name for name in ours if name not in theirs] == [name for name in theirs if name not in ours] == []
    assert any("pending" in entry for entry in ours) == accumulated
    for entry, value in theirs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            torch.testing.assert_close(ours[entry], value, rtol=1e-12, atol=1e-12)
        elif isinstance(value, Tensor):
            assert torch.equal(ours[entry], value), entry
        else:
            assert ours[entry] == value or "timer" in entry.lower(), entry

    for found, other in zip(launch(2, resume, 2), straight, strict=True):
        assert [name for name, value in other.items() if not torch.equal(found[name], value)] == []
    compare(launch(3, resume, 3), expected)
    compare([resumed(trainer(devices=1), tmp_path / "2.ckpt", **settings())], expected)


def test_a_checkpoint_of_one_process_goes_on_here(tmp_path: Path) -> None:
    """Catches a process that does not find its own layers in what one process has written."""
    kept = tmp_path / "one.ckpt"
    interrupted(trainer(devices=1, max_epochs=1), kept)

    def resume(rank: int) -> State:
        return resumed(layers(), kept)

    compare(launch(2, resume), resumed(trainer(devices=1), kept))


class Metered(AltMinModule):
    """Logs metrics whose values would double if processes were summed."""

    def __init__(self) -> None:
        super().__init__(
            MODELS["mlp"][0]().double(), codes=CurvatureCodes(every=2), metrics={"auroc": MulticlassAUROC(CLASSES)}
        )
        self.samples, self.largest = SumMetric(), MeanMetric()

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().validation_step(batch, batch_idx)
        self.samples.update(len(batch[0]))
        self.log("val_samples", self.samples, on_epoch=True)
        self.log("val_sum", float(len(batch[0])), on_epoch=True, reduce_fx="sum", sync_dist=True)
        self.log("val_max", loss, on_epoch=True, reduce_fx="max", sync_dist=True)
        return loss


def test_validation_and_logging_are_those_of_one_process(tmp_path: Path) -> None:
    """Catches samples that count once per process, a metric of part of the network, and processes that disagree."""

    def run(fit: Trainer) -> tuple[dict[str, float], Any, int]:
        seed_everything(5, verbose=False)
        model, samples = Metered(), Drawn(batch_size=4, eval_batch_size=3)
        before = fit.validate(Metered(), samples, verbose=False)
        fit.fit(model, samples)
        logged = {name: float(value) for name, value in fit.callback_metrics.items()}
        outputs = fit.predict(model, DataLoader(TensorDataset(*batches((6,), 11, 1, torch.float64)[0]), batch_size=4))
        assert isinstance(outputs, list)
        again = fit.validate(model, samples, verbose=False)
        best = Path(fit.checkpoint_callback.best_model_path).name  # type: ignore[union-attr]
        return (
            logged | {"before": before[0]["val_loss"], "again": again[0]["val_loss"]},
            (outputs, best),
            fit.global_step,
        )

    def flags(folder: Path) -> dict[str, Any]:
        stopping = EarlyStopping("val_loss", patience=1, min_delta=0.05)
        saving = ModelCheckpoint(folder / "checkpoints", "{epoch}", monitor="val_auroc", mode="max")
        callbacks = [stopping, saving, LearningRateMonitor(), MuSchedule(multiply=1.2)]
        logger = CSVLogger(str(folder / "log"), name="", version="")
        return {
            "max_epochs": 6,
            "limit_val_batches": None,
            "callbacks": callbacks,
            "logger": logger,
            "enable_checkpointing": True,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 2,
        }

    def share(rank: int) -> Any:
        return run(layers(**flags(tmp_path / "two")))

    values, (outputs, best), steps = run(trainer(devices=1, **flags(tmp_path / "one")))
    assert values["val_samples"] == values["val_sum"] == 8
    for found, (found_outputs, found_best), found_steps in launch(2, share):
        assert found == pytest.approx(values, abs=1e-12)
        assert (found_best, found_steps) == (best, steps)
        for one, other in zip(found_outputs, outputs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    one, two = ((tmp_path / folder / "log" / "metrics.csv").read_text().splitlines() for folder in ("one", "two"))
    assert len(one) == len(two)
    assert one[0] == two[0]  # every layer's rate is among the columns


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_a_bad_batch_changes_nothing_anywhere(policy: Any) -> None:
    """Catches a process that goes on while another stops, and a module that is not whole after the error."""
    spoiled = data()
    spoiled[0][0][:, 0] = 1e200  # weights of zero hide it from the layers above; the lowest gradient's square overflows

    def run(fit: Trainer) -> State:
        model = module(nonfinite=policy, weights=LocalGradient(OPTIMIZERS["sgd"]))
        model.network[0].weight.data[:, 0] = 0  # type: ignore[index, union-attr]
        if policy == "raise":
            with pytest.raises(NonFiniteError, match="batch 0 "):
                fit.fit(model, loader(spoiled))
        else:
            fit.fit(model, loader(spoiled))
            assert model.core.guard.skipped == 1
        return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}

    def share(rank: int) -> State:
        return run(layers(max_epochs=1))

    compare(launch(2, share), run(trainer(devices=1, max_epochs=1)))


def test_costs_follow_the_operations() -> None:
    """Catches groups balanced by parameters where convolutions, with few of them, do most of the work."""

    def share(rank: int) -> tuple[int, int]:
        model, seen = module("lenet"), []

        class Look(Callback):
            def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
                seen.append((pl_module.dealt_out.first, pl_module.dealt_out.last))

        model.example_input_array = data("lenet")[0][0]
        layers(max_epochs=1, callbacks=[Look()]).fit(model, loader(data("lenet")))
        return seen[0]

    # Multiply-adds per sample of 16 x 16 pixels, 2 passes of the first layer and 4 of others. Convolutions:
    # 12 * 12 * 6 * 25 * 2 = 43,200 and 2 * 2 * 16 * 150 * 4 = 38,400; linear: 16 * 120 * 4 = 7,680,
    # 120 * 84 * 4 = 40,320 and 84 * 3 * 4 = 1,008. Balanced are 81,600 and 49,008;
    # by parameters it would be stages 0 to 2, and 3 and 4.
    assert launch(2, share) == [(0, 1), (2, 4)]
