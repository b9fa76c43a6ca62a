"""The co-activation memory in the Trainer: resumed exactly, and combined per layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_altmin import AltMinModule, CoactivationMemory, LayerwiseWeights, LocalGradient
from tests.module.interruption import assert_resumes
from tests.module.problems import Record, loader, network, trainer

SOLVERS: dict[str, Any] = {
    "innovation": lambda: CoactivationMemory(every=3),
    "low rank": lambda: CoactivationMemory(every=2, rank=3),
    "diagonal": lambda: CoactivationMemory(every=2, rank=0),
    "mixed": lambda: LayerwiseWeights({"output": LocalGradient(), "default": CoactivationMemory(every=4)}),
    "solved output": lambda: LayerwiseWeights(
        {"output": CoactivationMemory("solve", every=4, window=2), "default": CoactivationMemory()}
    ),
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("epoch", [1, 2])
def test_resumes_bit_for_bit(solver: str, epoch: int, tmp_path: Path) -> None:
    """Catches statistics, an inverse or a place in the cycle of measurements that a checkpoint does not hold: an epoch
    has five batches, so the cycles go on across its end.
    """

    def make() -> AltMinModule:
        return AltMinModule(network(0.3, norm=True), weights=SOLVERS[solver]())

    data = {"train_dataloaders": loader()}
    assert_resumes(make, lambda: data, "on_train_epoch_end", epoch, tmp_path / "saved.ckpt", max_epochs=3)


def test_layers_have_named_groups() -> None:
    """Catches groups of one name, which learning-rate monitors refuse, in a network with BatchNorm behind a layer."""
    record = Record()
    module = AltMinModule(network(norm=True), weights=CoactivationMemory(step=0.5))
    watch = LearningRateMonitor("step")
    trainer(max_epochs=1, logger=record, callbacks=[watch], log_every_n_steps=1).fit(module, loader())
    names = {group["name"] for group in module.optimizers().param_groups}
    assert names == {"0", "0 (rest)", "3", "5"}


def test_statistics_follow_the_module() -> None:
    """Catches statistics that are no buffers, and layers that the optimizer of a new fit takes for another model's."""
    module = AltMinModule(network(), weights=CoactivationMemory(every=1))
    for _ in range(2):
        trainer(max_epochs=1).fit(module, loader())
    held = [name for name in module.state_dict() if name.startswith("core.weights.")]
    assert len(held) == 3 * 3  # A, the rows and the inverse of three layers
    assert isinstance(module.network, nn.Sequential)
    module.to(torch.float64)
    assert all(module.state_dict()[name].dtype == torch.float64 for name in held)


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({}, torch.float32),
        ({"rank": 3}, torch.float32),
        ({"rank": 0}, torch.float32),
        ({"form": "solve"}, torch.float64),
        ({"form": "solve", "solver": "bcd", "every": 1}, torch.float64),
    ],
)
def test_mixed_precision_does_not_reach_the_statistics(settings: dict[str, Any], dtype: torch.dtype) -> None:
    """Catches sums of products in 16 bits: of the first layer, whose inputs are the data, they are exact."""
    layer, x = nn.Linear(4, 5), torch.arange(48.0).reshape(12, 4) + 257  # no bfloat16, nor are the products
    module = AltMinModule(
        nn.Sequential(layer, nn.Tanh(), nn.Linear(5, 3)), weights=CoactivationMemory(inputs="forward", **settings)
    )
    data = DataLoader(TensorDataset(x, torch.randint(3, (12,))), batch_size=12)
    trainer(max_epochs=1, precision="bf16-mixed").fit(module, data)
    state = {name: value for name, value in module.state_dict().items() if "_statistics.0." in name}
    assert {value.dtype for value in state.values()} == {dtype}
    a = torch.cat([x, torch.ones(12, 1)], 1).double()
    exact = {"A": a.t() @ a, "trace": a.square().sum(), "squares": a.square().sum(0)}
    kept = [name for name in exact if f"core.weights._statistics.0.{name}" in state]
    assert len(kept) == 1
    found = state[f"core.weights._statistics.0.{kept[0]}"].double()
    torch.testing.assert_close(found, exact[kept[0]], rtol=1e-6, atol=0)


@pytest.mark.parametrize("settings", [{"accumulate_batches": 2}, {"gradient_clip_norm": 1.0}])
def test_solutions_are_not_clipped_or_averaged(settings: Any) -> None:
    """Catches weights that end somewhere on the way to their solution, in a memory of one layer among others, too."""
    for weights in (
        CoactivationMemory("solve"),
        LayerwiseWeights({"output": LocalGradient(), "default": CoactivationMemory("solve")}),
    ):
        with pytest.raises(ValueError, match="cannot be averaged or clipped on the way"):
            AltMinModule(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), weights=weights, **settings)
