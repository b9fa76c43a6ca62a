"""What only a CUDA device can show. Oracles: the CPU, the eager phases, the plain core without a process group.

Run by ``pytest tests/gpu`` on a machine with one NVIDIA GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn

from lightning_altmin import AltMin, AltMinModule, CoactivationMemory, CurvatureCodes, GradientCodes, LocalGradient
from lightning_altmin.baselines import ADMMModule, BCDModule
from lightning_altmin.continual import SynapticIntelligence
from lightning_altmin.guard import NonFiniteError
from lightning_altmin.nn import MLP, ConvNet
from lightning_altmin.parallel import DataParallel
from tests.continual.problems import backprop, blob_data
from tests.continual.problems import fit as fit_stream
from tests.continual.recording import SaveAt
from tests.module.problems import loader, network

# Shown, and not errors as elsewhere: no CI sees what CUDA's and torch's releases warn of on such a machine.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
DEVICE = torch.device("cuda")
NETWORKS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "mlp": (lambda: MLP(20, [32, 24], 5), (20,)),
    "batch norm": (lambda: MLP(20, [32, 24], 5, batch_norm=True), (20,)),
    "conv": (lambda: ConvNet(1, 5, channels=[4, 8], image_size=8), (1, 8, 8)),
}
WEIGHTS: dict[str, Any] = {"adam": LocalGradient, "memory": lambda: CoactivationMemory(every=2)}


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """TF32 off: it rounds to ten bits, which would hide what is looked for."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever waits for the device is an error."""
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def batches(shape: tuple[int, ...], count: int, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(16, *shape, generator=generator).to(dtype), torch.randint(5, (16,), generator=generator))
        for _ in range(count)
    ]


def trained(core: AltMin, data: list[tuple[Tensor, Tensor]], device: torch.device) -> dict[str, Tensor]:
    core.to(device)
    for x, y in data:
        core.step(x.to(device), y.to(device), keep_codes=False)
    core.guard.check()
    return {name: value.cpu() for name, value in core.network.state_dict().items()}


def core_of(kind: str, dtype: torch.dtype, weights: str | LocalGradient = "adam", **settings: Any) -> AltMin:
    torch.manual_seed(0)
    net = NETWORKS[kind][0]().to(dtype)
    solver = WEIGHTS[weights]() if isinstance(weights, str) else weights
    return AltMin(net, nn.CrossEntropyLoss(), codes=CurvatureCodes(every=2), weights=solver, **settings)


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        difference = (value.double() - expected[name].double()).abs().max() / (1 + expected[name].double().abs().max())
        assert difference <= tolerance, f"{name} differs by {float(difference):.1e}"


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", NETWORKS)
def test_equals_the_cpu(kind: str, weights: str) -> None:
    """Catches a kernel that means something else there (a pooling's ties, a fused optimizer's eps), in float64."""
    data = batches(NETWORKS[kind][1], 6, torch.float64)
    expected = trained(core_of(kind, torch.float64, weights), data, torch.device("cpu"))
    assert_near(trained(core_of(kind, torch.float64, weights), data, DEVICE), expected, 1e-9)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_network_that_is_there_already(weights: str) -> None:
    """Catches buffers of solvers that stay on the CPU unless the whole core is moved."""
    data = batches(NETWORKS["mlp"][1], 6, torch.float64)
    torch.manual_seed(0)
    core = AltMin(
        NETWORKS["mlp"][0]().double().to(DEVICE),
        nn.CrossEntropyLoss(),
        codes=CurvatureCodes(every=2),
        weights=WEIGHTS[weights](),
    )
    assert {value.device.type for value in core.state_dict().values() if value.dtype.is_floating_point} == {"cuda"}
    for x, y in data:
        core.step(x.to(DEVICE), y.to(DEVICE), keep_codes=False)
    found = {name: value.cpu() for name, value in core.network.state_dict().items()}
    assert_near(found, trained(core_of("mlp", torch.float64, weights), data, torch.device("cpu")), 1e-9)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_nothing_waits_for_the_device(weights: str) -> None:
    """Catches an ``.item()``, a comparison on the host or a copy that stalls the device in every batch."""
    core = core_of("mlp", torch.float32, weights).to(DEVICE)
    data = [(x.to(DEVICE), y.to(DEVICE)) for x, y in batches((20,), 12)]
    for x, y in data[:6]:  # the first steps make optimizer states, and AM-mem may look at what it factorises
        core.step(x, y, keep_codes=False)
    with no_waiting():
        for x, y in data[6:]:
            core.step(x, y, keep_codes=False)


@pytest.mark.parametrize("mode", [True, "reduce-overhead"], ids=str)
@pytest.mark.parametrize("kind", NETWORKS)
def test_compiled_and_cuda_graphs_equal_eager(kind: str, mode: bool | str) -> None:
    """Catches a graph that reads a batch, a rate or a curvature of the time it was recorded."""
    torch._dynamo.reset()
    data = batches(NETWORKS[kind][1], 12)

    def run(compile: bool | str) -> dict[str, Tensor]:
        # Not Adam: the gradient of a bias before BatchNorm is zero but for rounding, which Adam would make a full step.
        solver = LocalGradient(lambda parameters: torch.optim.SGD(parameters, lr=0.05))
        return trained(core_of(kind, torch.float32, compile=compile, weights=solver), data, DEVICE)

    assert_near(run(mode), run(False), 1e-4)


def test_memory_is_freed_where_codes_are_not_kept() -> None:
    """Catches codes that live until the end of a batch: of twenty layers, those of a few are alive at a time."""
    depth, width, samples = 20, 512, 4096
    x, y = torch.randn(samples, width, device=DEVICE), torch.randint(5, (samples,), device=DEVICE)

    def peak(keep: bool) -> int:
        torch.manual_seed(0)
        net = MLP(width, [width] * depth, 5)
        core = AltMin(net, nn.CrossEntropyLoss(), codes=GradientCodes(steps=1)).to(DEVICE)
        core.step(x, y, keep_codes=keep)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step = core.step(x, y, keep_codes=keep)
        torch.cuda.synchronize()
        del step
        return torch.cuda.max_memory_allocated() - before

    one_code = samples * width * 4
    # kept: a code and a move for each layer; freed: at least the moves of half of them are gone
    assert peak(False) < peak(True) - depth // 2 * one_code


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_a_bad_batch_changes_nothing(policy: Any, fused: bool) -> None:
    """Catches a NaN that reaches weights or optimizer state before the host hears of it."""
    weights = LocalGradient(lambda params: torch.optim.Adam(params, lr=0.002, fused=fused))
    data = batches((20,), 6)
    bad = [(x.clone(), y) for x, y in data]
    bad[3][0][2, 4] = float("nan")

    def run(data: list[tuple[Tensor, Tensor]]) -> tuple[AltMin, dict[str, Tensor]]:
        core = core_of("batch norm", torch.float32, nonfinite=policy).to(DEVICE)
        core.weights = copy.deepcopy(weights)
        for x, y in data:
            core.step(x.to(DEVICE), y.to(DEVICE), keep_codes=False)
        return core, {name: value.cpu() for name, value in core.network.state_dict().items()}

    core, found = run(bad)
    if policy == "raise":  # from the bad batch on nothing is changed, until somebody asks
        with pytest.raises(NonFiniteError, match="batch 3 "):
            core.guard.check()
        assert_near(found, run(data[:3])[1], 1e-6)
    else:
        assert core.guard.skipped == 1
        assert_near(found, run(data[:3] + data[4:])[1], 1e-6)


def gpu_trainer(**flags: Any) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {
        "enable_checkpointing": False,
        "accelerator": "gpu",
        "devices": 1,
        "max_epochs": 3,
        "limit_val_batches": 0,
    }
    return Trainer(**(quiet | flags))


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_mixed_precision_follows_single_precision(precision: Any) -> None:
    """Catches a float16 scaler that scales gradients which were never scaled, or skips steps that it counts."""

    def run(precision: Any) -> tuple[int, dict[str, Tensor]]:
        seed_everything(0, verbose=False)
        module = AltMinModule(network(), weights=LocalGradient(lambda params: torch.optim.SGD(params, lr=0.05)))
        fit = gpu_trainer(precision=precision)
        fit.fit(module, loader(40, 8))
        return fit.global_step, {name: value.cpu() for name, value in module.network.state_dict().items()}

    steps, found = run(precision)
    expected_steps, expected = run("32-true")
    assert steps == expected_steps == 15
    assert all(value.dtype == torch.float32 for value in found.values())
    start = network().state_dict()
    for name, value in found.items():  # moved as far, in the same direction
        moved, right = value - start[name], expected[name] - start[name]
        assert torch.cosine_similarity(moved.flatten(), right.flatten(), 0) > 0.98
        assert 0.9 < float(moved.norm() / right.norm()) < 1.1


def test_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Catches dropout masks of another state of the device's generator after a resume."""

    def run(seed: int, epochs: int, ckpt: Path | None = None) -> tuple[Trainer, dict[str, Tensor]]:
        seed_everything(seed, verbose=False)
        module, fit = AltMinModule(network(0.3)), gpu_trainer(max_epochs=epochs)
        fit.fit(module, loader(40, 8), ckpt_path=ckpt, weights_only=True if ckpt else None)
        return fit, {name: value.cpu() for name, value in module.state_dict().items() if isinstance(value, Tensor)}

    _, straight = run(1, 3)
    fit, _ = run(1, 2)
    fit.save_checkpoint(tmp_path / "saved.ckpt")
    _, resumed = run(2, 3, tmp_path / "saved.ckpt")
    assert all(torch.equal(value, straight[name]) for name, value in resumed.items())


@pytest.mark.parametrize("method", [ADMMModule, BCDModule])
def test_offline_methods_resume_on_the_device(method: Any, tmp_path: Path) -> None:
    """Catches samples and variables left on the CPU, where Lightning loads a checkpoint."""

    def run(epochs: int, ckpt: Path | None = None) -> tuple[Trainer, dict[str, Tensor]]:
        module, fit = method(network(seed=2)), gpu_trainer(max_epochs=epochs)
        fit.fit(module, loader(20, 20), ckpt_path=ckpt, weights_only=True if ckpt else None)
        return fit, {name: value.cpu() for name, value in module.state_dict().items()}

    _, straight = run(3)
    fit, _ = run(2)
    fit.save_checkpoint(tmp_path / "saved.ckpt")
    _, resumed = run(3, tmp_path / "saved.ckpt")
    for name, value in resumed.items():
        torch.testing.assert_close(value, straight[name])


def test_synaptic_intelligence_resumes_on_the_device(tmp_path: Path) -> None:
    """Catches a path, or where it began, left on the CPU: the run is cut within the second task."""
    path, ends = tmp_path / "saved.ckpt", []
    for ckpt in (None, path):
        module, penalty = backprop(), SynapticIntelligence(1.0)
        saver = SaveAt("on_train_batch_end", 5 if ckpt is None else -1, path)
        fit_stream(module, blob_data(), penalty, saver, ckpt=ckpt, accelerator="gpu", devices=1)
        ends.append(module.cpu().state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name])


@pytest.fixture
def _nccl(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone: NCCL asks for one device per process."""
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_nccl")
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", NETWORKS)
def test_nccl_of_one_process_changes_nothing(kind: str, weights: str) -> None:
    """Catches a flat tensor on the wrong device or of a type that NCCL refuses, and a weight that is not 1."""
    data = batches(NETWORKS[kind][1], 6)
    expected = trained(core_of(kind, torch.float32, weights), data, DEVICE)
    processes = DataParallel()
    core = core_of(kind, torch.float32, weights, processes=processes).to(DEVICE)
    processes.broadcast(core)
    assert_near(trained(core, data, DEVICE), expected, 1e-5)


@pytest.mark.usefixtures("_nccl")
def test_nccl_shares_a_bad_batch_without_waiting() -> None:
    """Catches a verdict that is looked at on its way through the collective."""
    core = core_of("mlp", torch.float32, processes=DataParallel(), nonfinite="skip").to(DEVICE)
    data = [(x.to(DEVICE), y.to(DEVICE)) for x, y in batches((20,), 12)]
    data[8][0][0, 0] = float("inf")
    for x, y in data[:6]:
        core.step(x, y, keep_codes=False)
    with no_waiting():
        for x, y in data[6:]:
            core.step(x, y, keep_codes=False)
    assert core.guard.skipped == 1
    assert all(bool(value.isfinite().all()) for value in core.network.state_dict().values())


@pytest.mark.standalone
def test_ddp_with_one_device() -> None:
    """Catches a strategy that needs two processes to work at all: clusters are tried out with one."""
    module = AltMinModule(network())
    # Lightning's own sampler shuffles under a distributed strategy, whatever the loader does.
    gpu_trainer(strategy="ddp", max_epochs=1, use_distributed_sampler=False).fit(module, loader(40, 8))
    alone = AltMinModule(network())
    gpu_trainer(max_epochs=1).fit(alone, loader(40, 8))
    assert_near(
        {name: value.cpu() for name, value in module.network.state_dict().items()},
        {name: value.cpu() for name, value in alone.network.state_dict().items()},
        1e-6,
    )
