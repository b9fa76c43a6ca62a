"""Oracle: single precision. In mixed precision products run in 16 bits; codes, moves and weights stay as they are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_altmin import AltMin, AltMinModule, CodedNetwork, CurvatureCodes
from lightning_altmin.nn import MLP, LeNet5
from tests.module.problems import loader, network, trainer

HALVES = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)


def gradients(module: nn.Module, x: Tensor, y: Tensor, half: torch.dtype | None = None) -> tuple[AltMin, list[Tensor]]:
    core = AltMin(module, nn.CrossEntropyLoss())
    with torch.autocast("cpu", half, enabled=half is not None):
        step = core.encode(x, y)
        core.solve_codes(step)
        core.fill_gradients(step)
    assert {t.dtype for t in (*step.codes_forward, *step.moves, step.output, step.loss)} == {torch.float32}
    return core, [p.grad for p in core.network.parameters() if p.grad is not None]


NETWORKS: dict[str, tuple[Any, float]] = {
    "mlp": (lambda: MLP(20, [30] * 6, 5), 0.99),
    "lenet": (LeNet5, 0.99),
    "batch-norm": (lambda: MLP(20, [50] * 5, 5, batch_norm=True), 0.98),
}


@HALVES
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_point_the_same_way(name: str, half: torch.dtype) -> None:
    """Catches codes stored in 16 bits, whose moves would be rounding noise: directions would be unrelated."""
    torch.manual_seed(0)
    make, cosine = NETWORKS[name]
    module = make()
    shape = (32, 1, 28, 28) if isinstance(module[0], nn.Conv2d) else (32, 20)
    x, y = torch.randn(shape), torch.randint(5, (32,))
    _, full = gradients(copy.deepcopy(module), x, y)
    _, mixed = gradients(module, x, y, half)
    for ours, theirs in zip(mixed, full, strict=True):
        assert ours.dtype == torch.float32
        if float(theirs.norm()) > 1e-6:  # a bias in front of a BatchNorm has the gradient 0
            assert float(torch.cosine_similarity(ours.flatten(), theirs.flatten(), 0)) > cosine


@HALVES
def test_products_do_run_in_sixteen_bits(half: torch.dtype) -> None:
    """Catches a precision flag that does nothing."""
    module = network()
    x, y = torch.randn(32, 6), torch.randint(3, (32,))
    _, full = gradients(copy.deepcopy(module), x, y)
    _, mixed = gradients(module, x, y, half)
    assert not torch.equal(full[0], mixed[0])


def test_moves_below_the_range_of_float16() -> None:
    """Catches underflow: the moves of a small share through many layers are zeros in float16, which ends at 6e-8."""
    torch.manual_seed(0)
    module = MLP(20, [30] * 6, 5)
    x, y = torch.randn(32, 20), torch.randint(5, (32,))
    found = []
    for half in (None, torch.float16):
        core = AltMin(copy.deepcopy(module), nn.CrossEntropyLoss(), codes=CurvatureCodes(share=0.01))
        with torch.autocast("cpu", half, enabled=half is not None):
            step = core.encode(x, y)
            core.solve_codes(step)
        found.append(step.moves[0])
    assert float(found[0].abs().max()) < 6e-8
    exact, ours = (move.flatten() / found[0].abs().max() for move in found)
    assert float(torch.cosine_similarity(exact, ours, 0)) > 0.99


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_the_trainer_learns_under_it(precision: Any) -> None:
    """Catches a flag that Lightning applies and the module undoes, parameters cast to 16 bits, and a gradient scaler
    that asks for a scaled loss which never was.
    """
    x = torch.randn(64, 6)
    data = DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=16)
    module = AltMinModule(network())
    # Lightning makes a scaler on accelerators only; given one, its CPU path is the same.
    scaler = torch.amp.GradScaler("cpu") if precision == "16-mixed" else None
    plugin = MixedPrecision(precision, "cpu", scaler)
    fit = trainer(max_epochs=100, plugins=[plugin])
    fit.fit(module, data)
    assert fit.precision == precision
    assert plugin.scaler is scaler  # and is there for the next module
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    accuracy = float((module.network.eval()(x).argmax(1) == x[:, :3].argmax(1)).float().mean())
    assert accuracy > 0.8


def test_blocks_differentiated_by_autograd_are_refused() -> None:
    """Catches a stage whose output is rounded to 16 bits before its change is taken."""
    module = AltMinModule(CodedNetwork(network(), "autograd"))
    with pytest.raises(MisconfigurationException, match=r"stages \['0', '2', '4'\] are differentiated by autograd"):
        trainer(max_epochs=1, precision="bf16-mixed").fit(module, loader())
