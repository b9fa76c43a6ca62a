"""Oracle: backprop's gradients by autograd, times the inverse of the inputs' second moments, written down."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_altmin import (
    AltMin,
    AltMinObjective,
    CoactivationMemory,
    CodedNetwork,
    CurvatureCodes,
    GradientCodes,
    LayerwiseWeights,
    LocalGradient,
)
from lightning_altmin.guard import NonFiniteError
from lightning_altmin.weights.limited_descent import LimitedDescent


def mlp(width: int = 7) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 5), nn.ReLU(), nn.Linear(5, 4)).double()


def normed() -> nn.Sequential:
    """BatchNorm below a layer, in its transfer. One above a layer is in `test_batch_norm_above`."""
    return nn.Sequential(
        nn.Linear(6, 7), nn.ReLU(), nn.BatchNorm1d(7, affine=False), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 4)
    ).double()


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, stride=2), nn.Tanh(), nn.Conv2d(3, 4, 2, bias=False), nn.ReLU(), nn.Flatten(),
        nn.Linear(16, 4),
    ).double()  # fmt: skip


def batch(network: nn.Module, count: int = 9) -> tuple[Tensor, Tensor]:
    shape = (2, 6, 6) if isinstance(next(network.children()), nn.Conv2d) else (6,)
    return torch.randn(count, *shape, dtype=torch.float64), torch.randint(4, (count,))


def layers(network: nn.Module) -> list[Any]:
    return [m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d)]


def rows(layer: Any, x: Tensor) -> tuple[Tensor, int]:
    """A layer's inputs as rows, and how many a sample has."""
    if isinstance(layer, nn.Conv2d):
        patches = functional.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        found, count = patches.transpose(1, 2).flatten(0, 1), patches.shape[2]
    else:
        found, count = x, 1
    return (found if layer.bias is None else torch.cat([found, found.new_ones(len(found), 1)], 1)), count


class Oracle:
    """Backprop preconditioned by A, with autograd and hooks."""

    def __init__(self, network: nn.Module, step: float, ridge: float, forgetting: float, power: float = 0.5) -> None:
        self.network, self.step, self.ridge, self.forgetting, self.power = network, step, ridge, forgetting, power
        self.sums: dict[Any, Tensor] = {}
        self.counts: dict[Any, float] = {}
        self.inverses: dict[Any, Tensor] = {}

    def train(self, x: Tensor, y: Tensor, measures: bool) -> None:
        inputs: dict[Any, Tensor] = {}
        hooks = [m.register_forward_pre_hook(lambda m, a: inputs.update({m: a[0].detach()})) for m in layers(self.network)]
        functional.cross_entropy(self.network(x), y).backward()
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            for layer in layers(self.network):
                a, positions = rows(layer, inputs[layer])
                if measures:
                    self.sums[layer] = self.forgetting * self.sums.get(layer, 0) + a.t() @ a
                    self.counts[layer] = self.forgetting * self.counts.get(layer, 0) + len(a)
                    A = self.sums[layer] / self.counts[layer]
                    damping = self.ridge * A.diagonal().mean() * torch.eye(len(A), dtype=A.dtype)
                    self.inverses[layer] = torch.linalg.inv(A + damping)
                parts = [p.grad.reshape(len(p), -1) for p in layer.parameters()]
                direction = torch.cat(parts, 1) @ self.inverses[layer] / positions**self.power
                size = layer.weight[0].numel()
                layer.weight -= self.step * direction[:, :size].reshape(layer.weight.shape)
                if layer.bias is not None:
                    layer.bias -= self.step * direction[:, size]
        self.network.zero_grad()


NETWORKS = {"mlp": mlp, "more outputs than samples": lambda: mlp(20), "BatchNorm": normed, "conv": convolutional}


@pytest.mark.parametrize("engine", ["closed_form", "autograd"])
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS.keys())
def test_is_backprop_preconditioned_by_second_moments(make: Any, engine: str) -> None:
    """Catches moved inputs, a missing 1/mu or share, a mean over features, a sum over positions, stale or misplaced
    statistics, a bias left out, and a wrong product where the inputs are preconditioned in place of the gradient.
    """
    network = make()
    twin = copy.deepcopy(network)
    oracle = Oracle(twin, step=0.3, ridge=0.5, forgetting=0.7)
    memory = CoactivationMemory(step=0.3, ridge=0.5, forgetting=0.7, every=3, limit=None)
    codes = GradientCodes(steps=1, lr=1.0)
    # A fixed BatchNorm is not differentiated through in the code step; a live one is, as in backprop.
    coded = CodedNetwork(network, engine, batch_norm="live")
    core = AltMin(coded, nn.CrossEntropyLoss(), AltMinObjective(mu=0.2), codes, memory)
    for number in range(8):
        x, y = batch(network)
        oracle.train(x, y, measures=number in (0, 1, 2, 3, 6))  # every third, and 1 and 2 before
        core.step(x, y, keep_codes=bool(number % 2))
        for ours, expected in zip(network.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


def test_positions_may_count_as_their_mean() -> None:
    """Catches `positions` without effect."""
    network = convolutional()
    twin = copy.deepcopy(network)
    memory = CoactivationMemory(step=0.3, ridge=0.5, positions="mean", limit=None)
    core = AltMin(network, nn.CrossEntropyLoss(), AltMinObjective(), GradientCodes(1, 1.0), memory)
    x, y = batch(network)
    core.step(x, y)
    Oracle(twin, 0.3, 0.5, 1.0, power=1.0).train(x, y, measures=True)
    for ours, expected in zip(network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


def test_varying_code_steps_are_divided_out() -> None:
    """Catches a direction that shrinks with the code solver's share: one plain step of any share asks for the same."""
    x, y = batch(mlp())
    results = []
    for codes in (GradientCodes(1, 1.0), CurvatureCodes(share=0.05)):
        torch.manual_seed(1)
        network = mlp()
        memory = CoactivationMemory(limit=None)
        AltMin(network, nn.CrossEntropyLoss(), AltMinObjective(mu=5.0), codes, memory).step(x, y)
        results.append(list(network.parameters()))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_batch_norm_above() -> None:
    """Catches a BatchNorm behind a layer whose own scales are preconditioned, or not trained at all."""
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 4)).double()
    twin = copy.deepcopy(network)
    memory = CoactivationMemory(limit=None, optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    coded = CodedNetwork(network, batch_norm="live")
    core = AltMin(coded, nn.CrossEntropyLoss(), AltMinObjective(), GradientCodes(1, 1.0), memory)
    names = [group["name"] for group in core.optimizer.param_groups]
    assert names == ["0", "3", "0 (rest)"]
    x, y = batch(network)
    scales = torch.autograd.grad(functional.cross_entropy(twin(x), y), list(twin[1].parameters()))
    expected = [p - 0.1 * g for p, g in zip(twin[1].parameters(), scales, strict=True)]
    Oracle(twin, 0.8, 1.0, 0.95).train(x, y, measures=True)
    core.step(x, y)
    torch.testing.assert_close(list(network[1].parameters()), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(network[0].weight, twin[0].weight, rtol=1e-9, atol=1e-11)


def test_a_layer_moves_at_most_its_share() -> None:
    """Catches a bound that counts weight and bias apart, ignores the rate, or also shortens steps below the bound."""
    weight, bias = nn.Parameter(torch.tensor([[3.0]])), nn.Parameter(torch.tensor([4.0]))  # together of norm 5
    zero = nn.Parameter(torch.zeros(2))
    optimizer = LimitedDescent([{"params": [weight, bias]}, {"params": [zero]}], lr=0.5, limit=0.2)
    weight.grad, bias.grad, zero.grad = torch.tensor([[6.0]]), torch.tensor([-8.0]), torch.ones(2)
    optimizer.step()  # 0.5 * 10 is asked for, 0.2 * 5 allowed
    torch.testing.assert_close(weight.detach(), torch.tensor([[3.0 - 0.6]]))
    torch.testing.assert_close(bias.detach(), torch.tensor([4.0 + 0.8]))
    torch.testing.assert_close(zero.detach(), torch.full((2,), -0.5))  # of no size yet: no bound
    weight.grad, bias.grad, zero.grad = torch.tensor([[0.1]]), None, None
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([[2.4 - 0.05]]))


def test_low_rank_of_all_directions_is_the_memory_itself() -> None:
    """Catches a low-rank memory that is not used, or used with another ridge: with little beyond `rank` directions in
    the data, both take the same steps.
    """
    torch.manual_seed(1)
    networks = [nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)).double()]
    networks.append(copy.deepcopy(networks[0]))
    few = torch.randn(3, 12, dtype=torch.float64)
    cores = [
        AltMin(n, nn.CrossEntropyLoss(), weights=CoactivationMemory(rank=r, every=1))
        for n, r in zip(networks, (None, 4), strict=True)
    ]
    for _ in range(5):
        x, y = torch.randn(30, 3, dtype=torch.float64) @ few, torch.randint(4, (30,))
        for core in cores:
            core.step(x, y)
    # The first layer's inputs have 3 directions and the appended one; the second layer's do not fit into 4.
    torch.testing.assert_close(networks[0][0].weight, networks[1][0].weight, rtol=0.02, atol=1e-3)
    assert "13x4" in cores[1].explain()
    assert "13x13" in cores[0].explain()


@pytest.mark.parametrize("policy", ["raise", "skip"])
@pytest.mark.parametrize("memory", [{}, {"rank": 2}, {"form": "solve"}, {"form": "solve", "every": 1}])
def test_a_bad_batch_leaves_no_trace(memory: dict[str, Any], policy: Any) -> None:
    """Catches NaN in the statistics, which no later batch would take out again, and a batch remembered by halves."""
    network = mlp()
    core = AltMin(network, nn.CrossEntropyLoss(), weights=CoactivationMemory(**memory), nonfinite=policy)
    for number in range(4):
        core.step(*batch(network))
        before = {k: v.clone() for k, v in core.state_dict().items() if "extra" not in k}
        x, y = batch(network)
        x[number] = torch.nan
        if policy == "raise":
            with pytest.raises(NonFiniteError):
                core.step(x, y)
        else:
            core.step(x, y)
        after = {k: v for k, v in core.state_dict().items() if "extra" not in k}
        torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("memory", [{}, {"every": 3}, {"rank": 2}, {"form": "solve"}, {"form": "solve", "solver": "bcd"}])
def test_saved_and_loaded_it_goes_on_bit_for_bit(memory: dict[str, Any]) -> None:
    """Catches state outside the buffers: the inverse, the number of batches, what is measured next."""
    data = [batch(mlp()) for _ in range(12)]

    def core() -> AltMin:
        torch.manual_seed(2)
        return AltMin(mlp(), nn.CrossEntropyLoss(), weights=CoactivationMemory(**memory))

    straight, interrupted = core(), core()
    for x, y in data:
        straight.step(x, y)
    for x, y in data[:5]:
        interrupted.step(x, y)
    file = io.BytesIO()
    torch.save(interrupted.state_dict(), file)
    file.seek(0)
    resumed = core()
    resumed.load_state_dict(torch.load(file))
    for x, y in data[5:]:
        resumed.step(x, y)
    for name, value in straight.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0)


def test_solvers_per_layer() -> None:
    """Catches a layer that gets another's solver, and a bias or group that gets lost: each layer of the mixed network
    ends where it does in a network trained by its solver alone (one step, so layers do not meet).
    """
    networks = [mlp()]
    networks += [copy.deepcopy(networks[0]) for _ in range(2)]

    def gradient() -> LocalGradient:
        return LocalGradient(lambda params: torch.optim.SGD(params, lr=0.1), inputs="forward")

    solvers = [
        LayerwiseWeights({"2": gradient(), "output": gradient(), "default": CoactivationMemory()}),
        CoactivationMemory(),
        gradient(),
    ]
    x, y = batch(networks[0])
    for network, weights in zip(networks, solvers, strict=True):
        core = AltMin(network, nn.CrossEntropyLoss(), weights=weights)
        core.step(x, y)
    mixed, memory, plain = networks
    for index, expected in ((0, memory), (2, plain), (4, plain)):
        torch.testing.assert_close(mixed[index].state_dict(), expected[index].state_dict(), rtol=1e-12, atol=1e-14)


def test_schedules_change_the_step() -> None:
    """Catches a step that is not the optimizer's rate."""
    network = mlp()
    core = AltMin(network, nn.CrossEntropyLoss(), weights=CoactivationMemory(step=0.4))
    assert [group["lr"] for group in core.optimizer.param_groups] == [0.4] * 3
    for group in core.optimizer.param_groups:
        group["lr"] = 0.0
    before = copy.deepcopy(network.state_dict())
    core.step(*batch(network))
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"form": "other"}, "form must be 'innovation' or 'solve', got 'other'"),
    ({"solver": "bcd"}, "solver='bcd'.* belong to form='solve'"),
    ({"form": "solve", "solver": "qr"}, "solver must be 'cholesky' or 'bcd', got 'qr'"),
    ({"lambda_w": 0.1}, "lambda_w=0.1 belong to form='solve'"),
    ({"form": "solve", "lambda_w": 0.1}, "lambda_w=0.1 belongs to solver='bcd'"),
    ({"form": "solve", "solver": "bcd", "ridge": 0.1}, "ridge belongs to solver='cholesky'"),
    ({"form": "solve", "step": 0.1}, "step belongs to form='innovation'"),
    ({"form": "solve", "ridge": -1.0}, "ridge must lie in"),
    ({"ridge": 0.0}, r"ridge must lie in \[0.1, 10\], got 0.0"),
    ({"step": 0.0}, r"step must lie in \(0, 1\], got 0.0"),
    ({"step": float("nan")}, "step must lie in"),
    ({"forgetting": 0.0}, r"forgetting must lie in \(0, 1\], got 0.0"),
    ({"every": 0}, "every must be an integer >= 1, got 0"),
    ({"limit": 0.0}, "limit must be a positive number or None, got 0.0"),
    ({"positions": "sum"}, "positions must be 'root' or 'mean', got 'sum'"),
    ({"rank": 0}, "rank must be an integer >= 1"),
    ({"form": "solve", "rank": 5}, "with form='innovation', got 5 with form='solve'"),
    ({"inputs": "both"}, "inputs must be 'moved' or 'forward', got 'both'"),
]


@pytest.mark.parametrize(("settings", "message"), BAD, ids=[str(s) for s, _ in BAD])
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    """Catches a setting out of its range, or of the other form, that would be silently ignored."""
    with pytest.raises(ValueError, match=message):
        CoactivationMemory(**settings)


def test_layers_it_cannot_serve_are_refused() -> None:
    """Catches a grouped convolution solved as if it had one matrix, and blocks that least squares cannot see into."""
    grouped = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(ValueError, match=r"stage '0' has groups=2; .*LayerwiseWeights"):
        AltMin(grouped, nn.CrossEntropyLoss(), weights=CoactivationMemory())
    embedded = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    with pytest.raises(ValueError, match="stage '0' has Embedding"):
        AltMin(embedded, nn.CrossEntropyLoss(), weights=CoactivationMemory())
    AltMin(
        embedded, nn.CrossEntropyLoss(), weights=LayerwiseWeights({"0": LocalGradient(), "default": CoactivationMemory()})
    )  # the way out that the message names


def test_other_misuse_is_refused() -> None:
    """Catches compilation of a solver with a memory, a memory shared by two models, and an l1 term that is dropped."""
    with pytest.raises(ValueError, match="cannot hold what CoactivationMemory keeps"):
        AltMin(mlp(), nn.CrossEntropyLoss(), weights=CoactivationMemory(), compile=True)
    shared = CoactivationMemory()
    AltMin(mlp(), nn.CrossEntropyLoss(), weights=shared)
    with pytest.raises(ValueError, match="belongs to another model"):
        AltMin(mlp(), nn.CrossEntropyLoss(), weights=shared)
    core = AltMin(mlp(), nn.CrossEntropyLoss(), AltMinObjective(lambda_w=0.1), weights=CoactivationMemory())
    with pytest.raises(ValueError, match=r"lambda_w=0.1, which a memory does not follow"):
        core.step(*batch(core.network))
    with pytest.raises(ValueError, match="keeps no targets to solve for"):
        shared.solve()


@pytest.mark.parametrize(
    ("solvers", "error", "message"),
    [
        ({}, ValueError, "at least one"),
        ({"default": nn.ReLU()}, TypeError, r"solvers\['default'\] must be a WeightSolver"),
        ({"0": LocalGradient(steps=2), "default": LocalGradient()}, ValueError, "same number of weight steps"),
        ({"9": LocalGradient(), "default": CoactivationMemory()}, ValueError, r"unknown stages \['9'\]"),
        ({"0": LocalGradient()}, ValueError, "gives nothing for stage '2'"),
    ],
)
def test_bad_solvers_per_layer_are_named(solvers: Any, error: type[Exception], message: str) -> None:
    """Catches a layer without a solver, and a solver without a layer."""
    with pytest.raises(error, match=message):
        AltMin(mlp(), nn.CrossEntropyLoss(), weights=LayerwiseWeights(solvers))
