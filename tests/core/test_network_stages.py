"""Structure: how networks are split into stages, what explain() says, and that the user's module stays itself."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from lightning_altmin import AltMin, CodedNetwork, GradientCodes

F64 = torch.float64


def parts(coded: CodedNetwork) -> list[tuple[str, list[str], list[str]]]:
    """Name, transfer and affine of each stage, by type names."""
    return [
        (s.name, [type(m).__name__ for m in s.transfer], [type(m).__name__ for m in s.affine]) for s in coded.stages
    ]


def assert_computes_the_network(coded: CodedNetwork, module: nn.Module, x: Tensor) -> None:
    """The chain of stages and the network agree, in training mode, from the same random state."""
    torch.manual_seed(0)
    expected = module(x.clone())
    torch.manual_seed(0)
    torch.testing.assert_close(coded.encode(x).output, expected.detach(), rtol=1e-12, atol=1e-12)


def test_layers_end_stages_and_the_rest_is_transfer() -> None:
    """Catches an activation, pooling or dropout on the wrong side of a code."""
    module = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.2), nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(),
        nn.Linear(27, 4), nn.Softplus(), nn.Linear(4, 2),
    ).double()  # fmt: skip
    coded = CodedNetwork(module)
    assert parts(coded) == [
        ("0", [], ["Conv2d"]),
        ("4", ["ReLU", "MaxPool2d", "Dropout"], ["Conv2d"]),
        ("7", ["Tanh", "Flatten"], ["Linear"]),
        ("9", ["Softplus"], ["Linear"]),
    ]
    assert [s.is_output for s in coded.stages] == [False, False, False, True]
    assert coded.depth == 3
    assert_computes_the_network(coded, module, torch.randn(4, 1, 10, 10, dtype=F64))


def test_nested_sequentials_are_flattened_and_keep_their_names() -> None:
    """Catches a nested block trained as one stage, or named by its position in the flat list."""
    module = nn.Sequential(
        nn.Sequential(nn.Linear(5, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 4))), nn.ReLU(), nn.Linear(4, 2)
    ).double()
    coded = CodedNetwork(module)
    assert [stage.name for stage in coded.stages] == ["0.0", "0.1.1", "2"]
    assert_computes_the_network(coded, module, torch.randn(3, 5, dtype=F64))


@pytest.mark.parametrize("inplace", [False, True])
def test_one_activation_used_everywhere(inplace: bool) -> None:
    """Catches the second use of a module being dropped, which trains another network than the user's."""
    act, drop = nn.ReLU(inplace=inplace), nn.Dropout(0.3)
    module = nn.Sequential(
        nn.Linear(5, 6), act, drop, nn.Linear(6, 6), act, drop, nn.Linear(6, 6), act, drop, nn.Linear(6, 3)
    ).double()
    coded = CodedNetwork(module)
    assert [transfer for _, transfer, _ in parts(coded)] == [[], *[["ReLU", "Dropout"]] * 3]
    assert_computes_the_network(coded, module, torch.randn(4, 5, dtype=F64))


def test_a_list_of_blocks_makes_each_parametrised_block_a_stage() -> None:
    """Catches blocks of a list being opened: the user drew the lines."""
    blocks = [nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 2)]
    coded = CodedNetwork(blocks)
    assert parts(coded) == [("0", [], ["Sequential"]), ("2", ["ReLU"], ["Linear"])]
    assert [stage.engine.kind for stage in coded.stages] == ["autograd", "closed_form"]
    assert list(coded.network.state_dict()) == list(nn.Sequential(*blocks).state_dict())
    x = torch.randn(3, 5)
    torch.testing.assert_close(coded(x), nn.Sequential(*blocks)(x))
    assert not coded.split_found


class Net(nn.Module):
    """The convention of torchvision's AlexNet and VGG."""

    def __init__(self, pool: bool) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.Conv2d(2, 3, 3), nn.ReLU())
        if pool:
            self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(nn.Linear(12, 5), nn.ReLU(True), nn.Dropout(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        if hasattr(self, "avgpool"):
            x = self.avgpool(x)
        return self.classifier(torch.flatten(x, 1))


@pytest.mark.parametrize("pool", [True, False])
def test_features_and_classifier(pool: bool) -> None:
    """Catches the pooling or the flattening between features and classifier getting lost."""
    module = Net(pool).double()
    coded = CodedNetwork(module)
    between = ["ReLU", "AdaptiveAvgPool2d", "Flatten"] if pool else ["ReLU", "Flatten"]
    assert parts(coded) == [
        ("features.0", [], ["Conv2d"]),
        ("features.2", ["ReLU"], ["Conv2d"]),
        ("classifier.0", between, ["Linear"]),
        ("classifier.3", ["ReLU", "Dropout"], ["Linear"]),
    ]
    x = torch.randn(4, 1, 8 if pool else 6, 8 if pool else 6, dtype=F64)
    assert_computes_the_network(coded, module, x)
    core = AltMin(module, nn.CrossEntropyLoss())
    core.step(x, torch.randint(3, (4,)))
    assert module.training
    assert all(m.training for m in module.modules())


def test_a_split_by_name_is_verified_in_full_precision() -> None:
    """Catches a check that compares 16-bit rounding, or dtypes, when training runs under autocast."""
    core = AltMin(Net(True), nn.CrossEntropyLoss())
    with torch.autocast("cpu", torch.bfloat16):
        core.step(torch.randn(4, 1, 8, 8), torch.randint(3, (4,)))
    assert core.batches_seen == 1


class ByValue(Net):
    """Cannot be traced, so that names are all there is to go by."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > -1e9 else -x)


class Scaled(ByValue):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class PooledByHand(Net):
    def __init__(self) -> None:
        super().__init__(False)

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.sum() > -1e9 else -x
        return self.classifier(nn.functional.adaptive_avg_pool2d(self.features(x), 2).flatten(1))


@pytest.mark.parametrize("module", [Scaled(True), PooledByHand()], ids=["value", "shape"])
def test_another_forward_of_features_and_classifier_is_refused(module: nn.Module) -> None:
    """Catches training of stages that do not compute what the network computes; nothing may have changed."""
    module.eval().features.train()
    modes = [m.training for m in module.modules()]
    before = copy.deepcopy(module.state_dict())
    core = AltMin(module, nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="forward is not features"):
        core.step(torch.randn(4, 1, 8, 8), torch.randint(3, (4,)))
    assert [m.training for m in module.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_forward_that_cannot_be_traced_is_split_by_name() -> None:
    """Catches the names being forgotten where tracing fails."""
    module = ByValue(True).double()
    coded = CodedNetwork(module)
    assert [stage.name for stage in coded.stages] == ["features.0", "features.2", "classifier.0", "classifier.3"]
    x = torch.randn(4, 1, 8, 8, dtype=F64)
    assert_computes_the_network(coded, module, x)
    AltMin(module, nn.CrossEntropyLoss()).step(x, torch.randint(3, (4,)))


def test_a_traced_split_that_computes_something_else_is_refused() -> None:
    """Catches a hook on the network itself, which no stage runs."""
    module = Net(True)
    core = AltMin(module, nn.CrossEntropyLoss())
    module.register_forward_hook(lambda m, inputs, output: 2 * output)
    with pytest.raises(ValueError, match="compute something else"):
        core.step(torch.randn(4, 1, 8, 8), torch.randint(3, (4,)))


def test_batch_norm_directly_after_a_layer_is_part_of_it_and_a_late_one_is_not() -> None:
    """Catches codes taken before the normalisation, and a late normalisation that nobody trains."""
    module = nn.Sequential(
        nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 4),
        nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.Tanh(), nn.Linear(4, 2),
    ).double()  # fmt: skip
    coded = CodedNetwork(module)
    assert parts(coded) == [
        ("0", [], ["Linear", "BatchNorm1d"]),
        ("3", ["ReLU"], ["Linear"]),
        ("6", ["ReLU", "BatchNorm1d"], ["Linear", "LayerNorm"]),
        ("10", ["GroupNorm", "Tanh"], ["Linear"]),
    ]
    x = torch.randn(6, 5, dtype=F64)
    assert_computes_the_network(coded, module, x)
    before = copy.deepcopy(dict(module.named_parameters()))
    AltMin(module, nn.CrossEntropyLoss()).step(x, torch.randint(2, (6,)))
    for name, parameter in module.named_parameters():
        assert not torch.equal(parameter, before[name]), f"{name} was not trained"


def test_prelu_belongs_to_the_next_stage_and_is_trained_with_it() -> None:
    """Catches PReLU taken for a layer with a code of its own, or for an activation that needs no training.

    Its gradient is that of the next stage's own problem.
    """
    module = nn.Sequential(nn.Linear(5, 4), nn.PReLU(), nn.Linear(4, 4), nn.PReLU(), nn.Linear(4, 2)).double()
    core = AltMin(module, nn.CrossEntropyLoss(), codes=GradientCodes())
    assert parts(core.coded) == [("0", [], ["Linear"]), ("2", ["PReLU"], ["Linear"]), ("4", ["PReLU"], ["Linear"])]
    x, y = torch.randn(6, 5, dtype=F64), torch.randint(2, (6,))
    step = core.encode(x, y)
    core.solve_codes(step)
    core.fill_gradients(step)
    mu = float(core.objective.mu)
    value = mu / 2 * (module[1:3](step.codes[0]) - step.codes[1]).square().sum() / 6
    (expected,) = torch.autograd.grad(value, module[1].weight)
    torch.testing.assert_close(module[1].weight.grad, expected, rtol=1e-12, atol=1e-14)
    value = nn.functional.cross_entropy(module[3:](step.codes[1]), y)
    (expected,) = torch.autograd.grad(value, module[3].weight)
    torch.testing.assert_close(module[3].weight.grad, expected, rtol=1e-12, atol=1e-14)


def test_a_module_used_twice_in_one_stage_gets_its_gradient_once() -> None:
    """Catches a gradient counted once per use on top of autograd's sum over uses."""
    act = nn.PReLU()
    module = nn.Sequential(nn.Linear(5, 4), act, nn.Softplus(), act, nn.Linear(4, 2)).double()
    core = AltMin(module, nn.CrossEntropyLoss())
    x, y = torch.randn(6, 5, dtype=F64), torch.randint(2, (6,))
    step = core.encode(x, y)
    core.solve_codes(step)
    core.fill_gradients(step)
    value = nn.functional.cross_entropy(module[1:](step.codes[0]), y)
    (expected,) = torch.autograd.grad(value, act.weight)
    torch.testing.assert_close(act.weight.grad, expected, rtol=1e-12, atol=1e-14)


def test_modules_after_the_output_layer_belong_to_the_output_stage() -> None:
    """Catches a trailing module being dropped from the stages."""
    module = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 6), nn.LogSoftmax(1), nn.Unflatten(1, (2, 3)))
    coded = CodedNetwork(module.double())
    assert parts(coded)[-1] == ("2", ["ReLU"], ["Linear", "LogSoftmax", "Unflatten"])
    assert_computes_the_network(coded, module, torch.randn(4, 5, dtype=F64))


def test_an_embedding_may_come_first() -> None:
    """Catches integer inputs being differentiated or refused; the embedding's rows move towards its code."""
    module = nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    core = AltMin(module, nn.CrossEntropyLoss(), codes=GradientCodes())
    assert parts(core.coded)[:2] == [("0", [], ["Embedding"]), ("2", ["Flatten"], ["Linear"])]
    x, y = torch.tensor([[0, 1], [2, 2], [5, 0], [1, 1]]), torch.randint(2, (4,))
    step = core.encode(x, y)
    core.solve_codes(step)
    core.fill_gradients(step)
    mu = float(core.objective.mu)
    value = mu / 2 * (module[0](x) - step.codes[0]).square().sum() / 4
    (expected,) = torch.autograd.grad(value, module[0].weight)
    torch.testing.assert_close(module[0].weight.grad, expected, rtol=1e-12, atol=1e-14)
    assert bool((module[0].weight.grad[[3, 4, 6]] == 0).all())
    before = module[0].weight.detach().clone()
    core.step(x, y)
    assert not torch.equal(module[0].weight, before)
    assert core.verify(x, y).largest <= 1e-12


def test_residual_blocks_are_stages() -> None:
    """Catches opaque blocks being refused or split: each is one stage, differentiated by autograd."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(5, 5), nn.BatchNorm1d(5))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.body(x.clone())

    module = nn.Sequential(nn.Linear(4, 5), Block(), Block(), nn.ReLU(inplace=True), nn.Linear(5, 3)).double()
    core = AltMin(module, nn.CrossEntropyLoss())
    assert [stage.name for stage in core.coded.stages] == ["0", "1", "2", "4"]
    assert [stage.engine.kind for stage in core.coded.stages] == ["closed_form", "autograd", "autograd", "closed_form"]
    x = torch.randn(6, 4, dtype=F64)
    assert_computes_the_network(core.coded, module, x)
    core.step(x, torch.randint(3, (6,)))


@pytest.mark.parametrize("engine", ["closed_form", "autograd"])
def test_inplace_activations_spare_the_codes(engine: str) -> None:
    """Catches codes or inputs overwritten by an in-place activation: both settings must train the same network."""
    results = []
    for inplace in (False, True):
        torch.manual_seed(0)
        module = nn.Sequential(
            nn.ReLU(inplace), nn.Linear(5, 6), nn.ReLU(inplace), nn.Linear(6, 6), nn.LeakyReLU(0.1, inplace),
            nn.Linear(6, 6), nn.Dropout(0.2, inplace), nn.Linear(6, 3),
        ).double()  # fmt: skip
        x, y = torch.randn(4, 5, dtype=F64), torch.randint(3, (4,))
        kept = x.clone()
        result = AltMin(CodedNetwork(module, engine), nn.CrossEntropyLoss()).step(x, y)
        assert torch.equal(x, kept)
        assert bool((result.codes_forward[0] < 0).any())
        results.append((result.codes_forward, result.codes, list(module.parameters())))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_a_block_that_overwrites_its_input_is_refused() -> None:
    """Catches an in-place operation that no attribute announces, silently changing the code below the block."""

    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(nn.functional.relu(x, inplace=True))

    core = AltMin(nn.Sequential(nn.Linear(4, 5), Overwrites(), nn.Linear(5, 3)), nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match=r"Overwrites.*overwrites its input"):
        core.step(torch.randn(6, 4), torch.randint(3, (6,)))


def test_the_network_stays_the_users_own() -> None:
    """Catches wrappers, renamed keys or hooks left behind: the module must work without this package afterwards."""
    module = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    keys, types = list(module.state_dict()), [type(m) for m in module.modules()]
    core = AltMin(module, nn.CrossEntropyLoss())
    core.step(torch.randn(6, 5), torch.randint(2, (6,)))
    assert core.network is module
    assert list(module.state_dict()) == keys
    assert [type(m) for m in module.modules()] == types
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in module.modules())
    assert all(p.requires_grad and p.grad is None for p in module.parameters())
    plain = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    plain.load_state_dict(module.state_dict())
    x = torch.randn(3, 5)
    assert torch.equal(plain.eval()(x), module.eval()(x))


# ---------------------------------------------------------------- explain


def test_stage_names_are_unique() -> None:
    """Catches per-layer settings that could mean two stages."""
    names = [s.name for s in CodedNetwork(Net(True)).stages]
    assert all(a != b for a, b in itertools.combinations(names, 2))
