"""The offline methods under the Trainer: they learn, count sweeps, resume exactly, and refuse what cannot work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_altmin.baselines import ADMMModule, BCDModule, MACModule, SquaredError
from lightning_altmin.baselines.offline import OfflineModule
from lightning_altmin.data import DigitsDataModule
from lightning_altmin.nn import MLP, LeNet5
from lightning_altmin.trainer.checkpoint_files import CheckpointError
from tests.module.problems import loader, network, samples, trainer

METHODS: list[type[Any]] = [ADMMModule, BCDModule, MACModule]


@pytest.mark.parametrize("method", METHODS)
def test_it_learns_handwritten_digits(method: type[Any]) -> None:
    """Catches a method that lowers its own objective and learns nothing: chance is 10 %, least squares 93 %."""
    data = DigitsDataModule(batch_size=2000)
    seed_everything(0, verbose=False)
    module = method(MLP(64, [60], 10))
    fitted = trainer(max_epochs=30, log_every_n_steps=1)
    fitted.fit(module, datamodule=data)
    assert fitted.global_step == 30
    assert "train_objective" in fitted.logged_metrics
    assert trainer().test(module, datamodule=data, verbose=False)[0]["test_acc"] > 0.8


def test_the_accuracy_of_a_single_output() -> None:
    """Catches the largest of one output taken for a class, with which any network is right about everything."""
    zero = MLP(2, [3], 1)
    for parameter in zero.parameters():
        nn.init.zeros_(parameter)
    x, y = torch.randn(8, 2), torch.tensor([1.0, 0, 0, 1, 1, 1, 1, 0]).unsqueeze(1)
    data = DataLoader(TensorDataset(x, y), batch_size=8)
    (logged,) = trainer().test(ADMMModule(zero), data, verbose=False)
    assert logged["test_acc"] == 3 / 8  # 0 is below the middle: class 0 throughout
    for module in (ADMMModule(zero, SquaredError()), BCDModule(zero), MACModule(zero, nn.MSELoss())):
        (logged,) = trainer().test(module, data, verbose=False)
        assert list(logged) == ["test_loss"]  # of numbers there is no accuracy


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_the_uninterrupted_one(method: type[Any], tmp_path: Path) -> None:
    """Catches variables, samples, multiplier or mu that a checkpoint forgets; the loader shuffles the samples anew."""

    def fresh() -> OfflineModule:
        return method(network(seed=2), **({"every": 1} if method is MACModule else {}))

    def batches() -> DataLoader[Any]:
        return loader(20, batch_size=20, shuffle=True)

    torch.manual_seed(0)
    whole = fresh()
    trainer(max_epochs=14).fit(whole, batches())

    torch.manual_seed(0)
    begun, path = trainer(max_epochs=12), tmp_path / "a.ckpt"

    class Saving(method):  # type: ignore[valid-type,misc]
        def on_train_epoch_end(self) -> None:
            super().on_train_epoch_end()
            if self.trainer.current_epoch == 11:
                self.trainer.save_checkpoint(path)

    part = Saving(network(seed=2), **({"every": 1} if method is MACModule else {}))
    begun.fit(part, batches())
    resumed = fresh()
    trainer(max_epochs=14).fit(resumed, batches(), ckpt_path=path, weights_only=True)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)
    assert whole.variables.keys() == resumed.variables.keys() != set()
    for name, tensors in whole.variables.items():
        for a, b in zip(tensors, resumed.variables[name], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_second_fit_begins_anew() -> None:
    """Catches samples of an earlier run that stay: other samples would be refused."""
    module = BCDModule(network())
    trainer(max_epochs=1).fit(module, loader(20, batch_size=20, seed=1))
    trainer(max_epochs=1).fit(module, loader(12, batch_size=12, seed=2))
    assert module.variables["u"][0].shape[0] == 12


def test_a_second_fit_begins_with_the_first_penalty() -> None:
    """Catches a schedule of mu that goes on where an earlier run ended: 0.5 * 2 * 2, and again."""
    module = MACModule(network(), mu=0.5, growth=2.0, every=1)
    for _ in range(2):
        trainer(max_epochs=2).fit(module, loader(12, batch_size=12))
        assert float(module.mu) == 2.0


def test_centred_samples_are_known_in_any_order() -> None:
    """Catches samples recognised by sums that are nothing but rounding, which another order changes."""
    x, y = samples(40)
    x = x.double()
    data = TensorDataset((x - x.mean(0)) / x.std(0), y)
    shuffled = DataLoader(data, batch_size=40, shuffle=True)
    run = trainer(max_epochs=8, precision="64-true")
    run.fit(BCDModule(network().double()), shuffled)
    assert run.current_epoch == 8  # every sweep took its batch for the first one


def test_what_a_checkpoint_brought_is_put_beside_the_weights() -> None:
    """Catches samples and variables that stay on the CPU, where Lightning loads them, below weights on a device."""
    module = MACModule(network())
    module.trainer = trainer()
    module.trainer.fit_loop.epoch_loop.max_batches = module.trainer.fit_loop.max_batches = 1
    module._samples, module.variables = (torch.ones(4, 6), torch.zeros(4)), {"z": [torch.ones(4, 5)]}
    module.to("meta").on_train_start()
    kept = [*module._samples, *module.variables["z"]]  # type: ignore[misc]
    assert {tensor.device.type for tensor in kept} == {"meta"}


def test_several_batches_are_refused() -> None:
    """Catches a run whose variables belong to whichever batch came first."""
    with pytest.raises(MisconfigurationException, match="5 batches; BCDModule needs the whole training set in one"):
        trainer(max_epochs=1).fit(BCDModule(network()), loader(20, batch_size=4))


def test_other_samples_are_refused() -> None:
    """Catches augmentation, which would train each sample's variables on other inputs every time."""

    class Changing(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> Any:
            return torch.randn(6), index % 3

    with pytest.raises(ValueError, match="does not hold the samples of the first one"):
        trainer(max_epochs=2).fit(BCDModule(network()), DataLoader(Changing(), batch_size=8))


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches processes that would each solve a problem of their own and never speak of it."""
    module = BCDModule(network())
    module.trainer = trainer()
    monkeypatch.setattr(type(module.trainer), "world_size", 2)
    with pytest.raises(MisconfigurationException, match="BCDModule runs in one process, the Trainer has 2: devices=1"):
        module.setup("fit")


@pytest.mark.parametrize(
    ("odd", "name"),
    [
        (LeNet5(), "Conv2d"),
        (nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Tanh(), nn.Linear(4, 3)), "Tanh"),
        (nn.Sequential(nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 3)), "GELU"),
        (MLP(6, [4], 3, batch_norm=True), "BatchNorm1d"),
        (nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3), nn.Softmax(1)), "Softmax"),
    ],
)
def test_other_networks_are_refused(odd: nn.Module, name: str) -> None:
    """Catches a module that would be left out of the problem without a word."""
    with pytest.raises(ValueError, match=f"offline methods need at most one activation .* has {name}"):
        BCDModule(odd)


@pytest.mark.parametrize("method", METHODS)
def test_frozen_layers_are_refused(method: type[Any]) -> None:
    """Catches a layer that is trained although it is frozen, from the start or after the module was made."""
    frozen = network()
    frozen[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"parameters \['0.weight', '0.bias'\] have requires_grad=False"):
        method(frozen)
    module = method(network())
    module.network[2].bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"parameters \['2.bias'\] have requires_grad=False"):
        trainer(max_epochs=1).fit(module, loader(8, batch_size=8))


@pytest.mark.parametrize("method", METHODS)
def test_damaged_checkpoints_are_named(method: type[Any], tmp_path: Path) -> None:
    """Catches a setup without that of the base: a cut-off file would be an error of the zip reader, or none."""
    module, fit, path = method(network()), trainer(max_epochs=1), tmp_path / "a.ckpt"
    fit.fit(module, loader(8, batch_size=8))
    fit.save_checkpoint(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cut off or damaged"):
        trainer(max_epochs=2).fit(method(network()), loader(8, batch_size=8), ckpt_path=path)


def test_weights_that_are_not_finite_are_an_error() -> None:
    """Catches a run that goes on with NaN and reports chance."""
    x, y = samples(8)
    x[3, 2] = float("inf")
    with pytest.raises((RuntimeError, ValueError), match="NaN or inf"):
        trainer(max_epochs=1).fit(BCDModule(network()), DataLoader(TensorDataset(x, y), batch_size=8))
