"""Accumulated batches are one larger batch; every layer's gradient is clipped by its own norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_altmin import AltMin, AltMinModule, GradientCodes, LocalGradient
from lightning_altmin.optim import clip_per_group
from tests.module.problems import loader, network, samples, trainer

RATE = 0.5


def sgd(params: Any) -> torch.optim.Optimizer:
    """SGD, whose step shows the gradient it was given."""
    return torch.optim.SGD(params, lr=RATE)


def module_for(**settings: Any) -> AltMinModule:
    """In float64, with a fixed rate of the codes: the default's rate follows the batches, and so depends on them."""
    return AltMinModule(network().double(), codes=GradientCodes(), **settings)


def fit(module: AltMinModule, count: int, batch_size: int, epochs: int = 1) -> list[torch.Tensor]:
    """Train in float64 and return the parameters."""
    x, y = samples(count)
    data = DataLoader(TensorDataset(x.double(), y), batch_size=batch_size)
    trainer(max_epochs=epochs).fit(module, data)
    return list(module.network.parameters())


def largest_difference(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """Over all entries of all tensors."""
    return max(float((x - y).detach().abs().max()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("batches", "count", "epochs"), [(3, 24, 2), (4, 16, 1)])
def test_accumulated_batches_are_one_larger_batch(batches: int, count: int, epochs: int) -> None:
    """Catches gradients summed instead of averaged, codes that depend on the batch size, and stale gradients.

    Without BatchNorm a sample's codes do not depend on its batch, and every gradient is a mean over samples: the mean
    of the means of n equal batches is the mean over all their samples.
    """
    split = module_for(weights=LocalGradient(sgd), accumulate_batches=batches)
    whole = module_for(weights=LocalGradient(sgd))
    a, b = fit(split, count, 4, epochs), fit(whole, count, 4 * batches, epochs)
    assert largest_difference(a, b) < 1e-12
    assert largest_difference(a, list(network().double().parameters())) > 1e-3


def test_leftover_batches_are_averaged_over_their_number() -> None:
    """Catches division by accumulate_batches where the epoch's end left fewer: 5 batches are 3 and 2."""
    split = module_for(weights=LocalGradient(sgd), accumulate_batches=3)
    got = fit(split, 20, 4)
    x, y = samples(20)
    plain = AltMin(network().double(), nn.CrossEntropyLoss(), codes=GradientCodes(), weights=LocalGradient(sgd))
    plain.step(x[:12].double(), y[:12])
    plain.step(x[12:].double(), y[12:])
    assert largest_difference(got, list(plain.network.parameters())) < 1e-12


def layer_updates(module: AltMinModule, **flags: Any) -> dict[str, torch.Tensor]:
    """Each layer's change in one SGD step, divided by the rate: its gradient as it was applied, flattened."""
    before = [p.detach().clone() for p in module.network.parameters()]
    fit(module, **flags)
    changes = [(b - p.detach()) / RATE for b, p in zip(before, module.network.parameters(), strict=True)]
    return {name: torch.cat([changes[2 * i].flatten(), changes[2 * i + 1]]) for i, name in enumerate(("0", "2", "4"))}


def test_every_layer_is_clipped_by_its_own_norm() -> None:
    """Catches one norm over all layers, a bound on single parameters, and clipping that changes the direction."""
    free = layer_updates(module_for(weights=LocalGradient(sgd)), count=8, batch_size=8)
    norms = {name: float(update.norm()) for name, update in free.items()}
    bound = sorted(norms.values())[1]  # one layer is below, one at it, one above
    module = AltMinModule(
        network().double(), codes=GradientCodes(), weights=LocalGradient(sgd), gradient_clip_norm=bound
    )
    clipped = layer_updates(module, count=8, batch_size=8)
    assert min(norms.values()) < bound < max(norms.values())
    for name, update in clipped.items():
        expected = free[name] * min(1.0, bound / norms[name])
        torch.testing.assert_close(update, expected, rtol=1e-4, atol=1e-8)  # torch divides by norm + 1e-6


def test_bounds_by_name_leave_other_layers_alone() -> None:
    """Catches bounds applied to the wrong layer or to all."""
    free = layer_updates(module_for(weights=LocalGradient(sgd)), count=8, batch_size=8)
    bound = float(free["2"].norm()) / 3
    module = module_for(weights=LocalGradient(sgd), gradient_clip_norm={"2": bound})
    clipped = layer_updates(module, count=8, batch_size=8)
    torch.testing.assert_close(clipped["2"], free["2"] / 3, rtol=1e-4, atol=1e-8)
    assert torch.equal(clipped["0"], free["0"])
    assert torch.equal(clipped["4"], free["4"])


def test_the_averaged_gradient_is_clipped() -> None:
    """Catches clipping of each accumulated batch, or of the sum before it is divided."""
    whole = layer_updates(module_for(weights=LocalGradient(sgd)), count=8, batch_size=8)
    bound = float(whole["0"].norm()) / 2
    module = module_for(weights=LocalGradient(sgd), accumulate_batches=2, gradient_clip_norm={"0": bound})
    clipped = layer_updates(module, count=8, batch_size=4)
    torch.testing.assert_close(clipped["0"], whole["0"] / 2, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(clipped["4"], whole["4"], rtol=1e-10, atol=1e-12)


def test_clipping_scales_a_gradient_of_known_norm() -> None:
    """Catches a wrong norm: (3, 4) and (12,) of one group have norm 13 together."""
    a, b, c = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [a, b], "name": "first"}, {"params": [c], "name": "second"}], lr=1.0)
    a.grad, b.grad, c.grad = torch.tensor([3.0, 4.0]), torch.tensor([12.0]), torch.tensor([2.0])
    clip_per_group(optimizer, 6.5)
    torch.testing.assert_close(a.grad, torch.tensor([1.5, 2.0]))
    torch.testing.assert_close(b.grad, torch.tensor([6.0]))
    torch.testing.assert_close(c.grad, torch.tensor([2.0]))


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        ({"9": 1.0}, r"gradient_clip_norm names unknown layers \['9'\]; the network has \['0', '2', '4'\]"),
        (0.0, "gradient_clip_norm must be a positive number, or numbers by layer name, got 0.0"),
        ({"0": -1.0}, r"gradient_clip_norm\['0'\] must be a positive number, got -1.0"),
        ({"0": 1.0, "2": "1"}, r"gradient_clip_norm\['2'\] must be a positive number, got '1' of type str"),
        (True, "gradient_clip_norm must be a positive number, or numbers by layer name, got True"),
        ([1.0], r"gradient_clip_norm must be .* by layer name, got \[1.0\] of type list"),
        (float("nan"), "gradient_clip_norm must be a positive number"),
    ],
)
def test_unusable_bounds_are_refused(clip: Any, message: str) -> None:
    """Catches a misspelt layer that would silently never be clipped, and bounds that stop training or are none."""
    with pytest.raises(ValueError, match=message):
        AltMinModule(network(), gradient_clip_norm=clip)


@pytest.mark.parametrize("batches", [0, -1, 2.5])
def test_unusable_accumulation_is_refused(batches: Any) -> None:
    """Catches a number of batches that would never, or always, step."""
    with pytest.raises(ValueError, match="accumulate_batches must be an integer >= 1"):
        AltMinModule(network(), accumulate_batches=batches)


def test_accumulation_of_several_weight_steps_is_refused() -> None:
    """Catches a combination whose inner steps would use gradients of earlier batches."""
    with pytest.raises(ValueError, match=r"needs one weight step per batch, weights\.steps is 2"):
        AltMinModule(network(), weights=LocalGradient(steps=2), accumulate_batches=2)


def test_validation_inside_an_accumulation_keeps_its_gradients() -> None:
    """Catches Lightning's zero_grad before a validation in mid-epoch, which would drop the first batches."""

    def weights_after(**flags: Any) -> list[torch.Tensor]:
        module = AltMinModule(network(), weights=LocalGradient(sgd), accumulate_batches=2)
        trainer(max_epochs=1, limit_val_batches=None, **flags).fit(module, loader(), loader(seed=3))
        return list(module.network.parameters())

    assert largest_difference(weights_after(val_check_interval=1), weights_after()) == 0


def test_accumulation_into_cuda_graphs_is_refused() -> None:
    """Catches gradients of earlier batches that a CUDA graph's next run overwrites; ``True`` makes no such graph."""
    with pytest.raises(ValueError, match=r"accumulate_batches=2 needs compile=True or False, got .*'reduce-overhead'"):
        AltMinModule(network(), accumulate_batches=2, compile="reduce-overhead")
    assert AltMinModule(network(), accumulate_batches=2, compile=True).accumulate_batches == 2
    assert AltMinModule(network(), compile="reduce-overhead").accumulate_batches == 1
