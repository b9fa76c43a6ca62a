"""``Trainer(strategy="ddp")``: the run that one process makes with the same global batches, and nothing to set up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import TorchSyncBatchNorm
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_altmin import AltMinModule, CurvatureCodes, LocalGradient
from lightning_altmin.baselines import BackpropModule
from lightning_altmin.data import CSVDataModule, IndexedDataModule, Sources, TensorSource
from lightning_altmin.guard import NonFiniteError
from lightning_altmin.trainer.layer_sync import CoreLayerSync
from tests.distributed.gloo import launch
from tests.distributed.problems import EVERY, NETWORKS, NORMED, OPTIMIZERS, TOLERANCE, batches, part

pytestmark = pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no")  # on purpose
State = dict[str, Tensor]
SIZES = ((4, 4), (4, 4), (5, 3), (4, 4), (2, 1))  # of each batch on each process; the last ones uneven
SETTINGS: dict[str, dict[str, Any]] = {
    "adam": {},
    "sgd": {"weights": LocalGradient(OPTIMIZERS["sgd"])},
    "accumulation": {"accumulate_batches": 2},
    "clipping": {"gradient_clip_norm": 0.01},
    "weight steps": {"weights": LocalGradient(OPTIMIZERS["adam"], steps=2)},
    "schedule": {
        "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3),
        "lr_interval": "step",
    },
}


class Batches(Dataset[Any]):
    """Batches as they are: what a process sees of each."""

    def __init__(self, data: list[tuple[Tensor, Tensor]]) -> None:
        self.data = data

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        return self.data[number]

    def __len__(self) -> int:
        return len(self.data)


def loader(data: list[tuple[Tensor, Tensor]]) -> DataLoader[Any]:
    return DataLoader(Batches(data), batch_size=None)


def trainer(**flags: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0}
    quiet |= {"enable_checkpointing": False, "accelerator": "cpu", "precision": "64-true", "max_epochs": 2}
    return Trainer(**(quiet | flags))


def ddp(**flags: Any) -> Trainer:
    return trainer(**({"strategy": "ddp", "devices": 2, "use_distributed_sampler": False} | flags))


def whole(count: int = len(SIZES), kind: str = "mlp") -> list[tuple[Tensor, Tensor]]:
    data = batches(EVERY[kind][1], 8, count, torch.float64)
    return [(x[: sum(sizes)], y[: sum(sizes)]) for (x, y), sizes in zip(data, SIZES, strict=False)]


def parts(data: list[tuple[Tensor, Tensor]], rank: int) -> list[tuple[Tensor, Tensor]]:
    return [part(batch, sizes, rank) for batch, sizes in zip(data, SIZES, strict=False)]


def state(module: AltMinModule, fit: Trainer) -> State:
    """Everything a run leaves behind, by name."""
    found = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    for index, values in enumerate(fit.optimizers[0].state.values()):
        found |= {f"optimizer.{index}.{n}": v for n, v in values.items() if isinstance(v, Tensor)}
    found |= fit.callback_metrics
    return found | {"lr": torch.tensor(fit.optimizers[0].param_groups[0]["lr"], dtype=torch.float64)}


def compare(found: list[State], expected: State, tolerance: float = 1e-12) -> None:
    for one in found:
        assert one.keys() == expected.keys()
        for name, value in one.items():
            difference = (value - expected[name]).abs().max() / (1 + expected[name].abs().max())
            assert difference <= tolerance, f"{name} differs from one process by {difference:.2e}"
            assert torch.equal(value, found[0][name]), f"{name} differs between processes"


def module(kind: str = "mlp", **settings: Any) -> AltMinModule:
    return AltMinModule(EVERY[kind][0]().double(), codes=CurvatureCodes(every=2), **settings)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("name", SETTINGS)
def test_equals_one_process(name: str, kind: str) -> None:
    """Catches every way in which a step, a schedule, a clipped norm or a logged loss is one process's own."""
    data = whole(kind=kind)
    flags = {"log_every_n_steps": 1}

    def share(rank: int) -> State:
        torch.manual_seed(rank)  # DDP gives all processes the weights of the first
        model, fit = module(kind, **SETTINGS[name]), ddp(**flags)
        fit.fit(model, loader(parts(data, rank)))
        return state(model, fit)

    model, fit = module(kind, **SETTINGS[name]), trainer(devices=1, **flags)
    fit.fit(model, loader(data))
    compare(launch(2, share), state(model, fit), TOLERANCE[kind])


def test_single_precision() -> None:
    """Catches what only shows in the precision that is used: 1e-6 after two epochs."""
    data = [(x.float(), y) for x, y in whole()]
    weights = SETTINGS["sgd"]

    def share(rank: int) -> State:
        model, fit = module(**weights).float(), ddp(precision="32-true")
        fit.fit(model, loader(parts(data, rank)))
        return state(model, fit)

    model, fit = module(**weights).float(), trainer(devices=1, precision="32-true")
    fit.fit(model, loader(data))
    found, expected = launch(2, share), state(model, fit)
    for one in (*found, expected):  # a ratio of two sums, each of them rounded
        one["core.codes.curvature"] = one["core.codes.curvature"].float().round(decimals=4)
    compare(found, expected, 1e-6)


def test_bf16_mixed() -> None:
    """Catches gradients that are averaged in sixteen bits, or weights that differ between processes.

    A sample's code is the same number on any process; what is left is the rounding of sums: 2e-3 of the largest weight.
    """
    data = [(x.float(), y) for x, y in whole()]

    def run(fit: Trainer, part: Any) -> State:
        model = module(weights=LocalGradient(OPTIMIZERS["sgd"])).float()
        fit.fit(model, loader(part))
        return {name: value for name, value in model.state_dict().items() if "network" in name}

    start = {name: value for name, value in module().float().state_dict().items() if "network" in name}
    found = launch(2, lambda rank: run(ddp(precision="bf16-mixed"), parts(data, rank)))
    expected = run(trainer(devices=1, precision="bf16-mixed"), data)
    assert all(value.dtype == torch.float32 for value in found[0].values())
    assert all(float((value - expected[name]).abs().max()) > 0.01 for name, value in start.items()), "nothing trained"
    compare(found, expected, 2e-3)


@pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders")
def test_lightnings_own_sampler_and_validation(tmp_path: Path) -> None:
    """Catches a monitored value that differs between processes: a checkpoint or a plateau would then, too."""
    x, y = batches((6,), 24, 1, torch.float64)[0]
    rest = batches((6,), 11, 1, torch.float64)[0]  # 6 and 5 samples: padded to 6 and 6 by Lightning's sampler

    def data() -> DataLoader[Any]:
        return DataLoader(TensorDataset(rest[0][:10], rest[1][:10]), batch_size=3)

    def share(rank: int) -> tuple[dict[str, float], dict[str, float]]:
        plateau: Any = lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)  # noqa: E731
        best = ModelCheckpoint(tmp_path, monitor="val_loss")
        sampled = {"use_distributed_sampler": True, "limit_val_batches": None}
        fit = ddp(enable_checkpointing=True, callbacks=[best], **sampled)
        (untrained,) = fit.validate(module(), data(), verbose=False)
        fit.fit(module(lr_scheduler=plateau, lr_monitor="val_loss"), DataLoader(TensorDataset(x, y), 4), data())
        return untrained, {name: float(value) for name, value in fit.callback_metrics.items()}

    (untrained, first), (_, second) = launch(2, share)
    assert first == second
    (alone,) = trainer(devices=1, limit_val_batches=None).validate(module(), data(), verbose=False)
    assert untrained == pytest.approx(alone, abs=1e-12)


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_a_bad_batch_on_one_process(policy: Any) -> None:
    """Catches a process that goes on while another stops, and weights that the batch has reached."""
    data = whole()
    data[2][0][6, 1] = float("nan")  # the second process's part

    def share(rank: int) -> Any:
        model, fit = module(nonfinite=policy), ddp(max_epochs=1)
        if policy == "raise":
            with pytest.raises(NonFiniteError, match="batch 2 "):
                fit.fit(model, loader(parts(data, rank)))
            return {name: value for name, value in model.state_dict().items() if "weight" in name}
        fit.fit(model, loader(parts(data, rank)))
        assert model.core.guard.skipped == 1
        return state(model, fit)

    model, fit = module(nonfinite=policy), trainer(devices=1, max_epochs=1)
    if policy == "skip":
        fit.fit(model, loader(data))
        compare(launch(2, share), state(model, fit))
    else:
        fit.fit(model, loader(data[:2]))
        compare(launch(2, share), {name: value for name, value in model.state_dict().items() if "weight" in name})


def test_collectives_per_batch() -> None:
    """Measures what a training step sends: one all-reduce."""
    data = whole()

    def share(rank: int) -> dict[str, int]:
        calls = dict.fromkeys(("all_reduce", "broadcast", "barrier", "all_gather_object", "reduce"), 0)
        originals = {name: getattr(dist, name) for name in calls}
        model, fit = module(), ddp(max_epochs=1)

        def counted(name: str) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                calls[name] += 1
                return originals[name](*args, **kwargs)

            return call

        step = model.training_step

        def training_step(batch: Any, batch_idx: int) -> Any:
            for name in calls:
                setattr(dist, name, counted(name))
            try:
                return step(batch, batch_idx)
            finally:
                for name, original in originals.items():
                    setattr(dist, name, original)

        model.training_step = training_step  # type: ignore[method-assign]
        fit.fit(model, loader(parts(data, rank)))
        return calls

    for calls in launch(2, share):
        # the gathered object is asked for once, before the first batch: whether all processes train the same model
        expected = {"all_reduce": len(SIZES), "all_gather_object": 1, "broadcast": 0, "barrier": 0, "reduce": 0}
        assert calls == expected


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_checkpoints_resume_bit_equal(tmp_path: Path) -> None:
    """Catches a checkpoint that holds one process's share of something."""
    data = whole()
    kept = tmp_path / "run.ckpt"

    def straight(rank: int) -> State:
        seed_everything(3, verbose=False)
        model, fit = module(), ddp()
        fit.fit(model, loader(parts(data, rank)))
        return state(model, fit)

    def first(rank: int) -> None:
        seed_everything(3, verbose=False)
        kept_here = ModelCheckpoint(tmp_path, "run")
        fit = ddp(max_epochs=1, enable_checkpointing=True, callbacks=[kept_here])
        fit.fit(module(), loader(parts(data, rank)))

    def resumed(rank: int) -> State:
        model, fit = module(), ddp()
        fit.fit(model, loader(parts(data, rank)), ckpt_path=kept, weights_only=True)
        return state(model, fit)

    expected = launch(2, straight)
    launch(2, first)
    for one, other in zip(launch(2, resumed), expected, strict=True):
        assert [name for name, value in other.items() if not torch.equal(one[name], value)] == []
    model, fit = module(), trainer(devices=1)  # and on one process
    fit.fit(model, loader(data), ckpt_path=kept, weights_only=True)
    compare([state(model, fit)], expected[0])


SYNCHRONISED = [(kind, "adam") for kind in NORMED] + [("normed conv", "accumulation"), ("normed mlp", "weight steps")]


@pytest.mark.parametrize(("kind", "name"), SYNCHRONISED)
def test_synchronised_batch_norm(kind: str, name: str) -> None:
    """Catches a flag that is passed over, and modules that Lightning exchanges behind the back of the closed forms."""
    data = whole(kind=kind)

    def share(rank: int) -> State:
        torch.manual_seed(rank)
        model, fit = module(kind, **SETTINGS[name]), ddp(sync_batchnorm=True)
        before = list(model.network.modules())
        fit.fit(model, loader(parts(data, rank)))
        assert all(one is other for one, other in zip(model.network.modules(), before, strict=True))
        return state(model, fit)

    model, fit = module(kind, **SETTINGS[name]), trainer(devices=1)
    fit.fit(model, loader(data))
    compare(launch(2, share), state(model, fit), TOLERANCE[kind])


def test_other_modules_are_synchronised_by_lightning() -> None:
    """Catches a Trainer that trains another kind of module afterwards, silently without what it was asked for."""
    sync = CoreLayerSync(TorchSyncBatchNorm())
    core = module("normed mlp")
    assert type(sync.apply(core).network[1]) is nn.BatchNorm1d
    assert type(sync.revert(core).network[1]) is nn.BatchNorm1d
    assert type(sync.apply(BackpropModule(EVERY["normed mlp"][0]())).network[1]) is nn.SyncBatchNorm


def test_unknown_layer_synchronisation_is_refused() -> None:
    """Catches a plugin that exchanges modules which the closed forms know."""

    class Other(TorchSyncBatchNorm):
        pass

    def share(rank: int) -> bool:
        with pytest.raises(MisconfigurationException, match="plugin Other would put other modules"):
            ddp(plugins=[Other()]).fit(module("normed mlp"), loader(parts(whole(kind="normed mlp"), rank)))
        return True

    assert launch(2, share) == [True, True]


def test_compiled_synchronised_batch_norm_is_refused() -> None:
    """Catches a refusal that comes after the first batch."""

    def share(rank: int) -> bool:
        with pytest.raises(ValueError, match=r"compile=True .*Trainer\(sync_batchnorm=False\)"):
            ddp(sync_batchnorm=True).fit(module("normed mlp", compile=True), loader([]))
        return True

    assert launch(2, share) == [True, True]


class Drawn(IndexedDataModule):
    """22 samples of six features: shuffled, in a last batch of 6."""

    num_classes = 3
    input_shape = (6,)

    def load_sources(self) -> Sources:
        return Sources(TensorSource(*batches((6,), 22, 1, torch.float64)[0]), val=TensorSource(*whole()[0]))


def stream(folder: Path, samples: int = 22) -> Any:
    """Makes data modules that stream as many samples from a file, shuffled in blocks."""
    x, y = batches((6,), samples, 1, torch.float64)[0]
    table = torch.cat([y[:, None].double(), x], 1).tolist()
    (folder / "rows.csv").write_text("".join(",".join(map(repr, row)) + "\n" for row in table))

    def make(batch_size: int, eval_batch_size: int) -> CSVDataModule:
        settings = {"num_classes": 3, "val_rows": 4, "dtype": "float64", "shuffle_buffer": 7}
        return CSVDataModule(folder / "rows.csv", batch_size, eval_batch_size, **settings)

    return make


@pytest.mark.parametrize("kind", ["in memory", "stream"])
def test_data_modules_deal_out_the_batches_of_one_process(kind: str, tmp_path: Path) -> None:
    """Catches processes that shuffle differently or evaluate the same samples: the run must be that of one process."""
    make = Drawn if kind == "in memory" else stream(tmp_path)

    def run(fit: Trainer, seed: int, size: int) -> State:
        model = module()
        seed_everything(seed, verbose=False)
        fit.fit(model, datamodule=make(batch_size=size, eval_batch_size=4))
        return state(model, fit)

    def share(rank: int) -> State:
        return run(ddp(limit_val_batches=None), 5 + rank, 4)  # only the first process's draw counts

    compare(launch(2, share), run(trainer(devices=1, limit_val_batches=None), 5, 8))
