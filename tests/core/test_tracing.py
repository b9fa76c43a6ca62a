"""Structure and exactness: networks with a forward of their own are cut where one tensor is all that is read later."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import VisionTransformer, vgg11_bn
from torchvision.models.resnet import BasicBlock, ResNet

from lightning_altmin import AltMin, AltMinObjective, CodedNetwork, GradientCodes, LocalGradient
from tests.core.test_network_stages import assert_computes_the_network, parts

F64 = torch.float64


class Residual(nn.Module):
    """A residual block whose activation works in place, as torchvision's do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.second(self.relu(self.norm(self.first(x))))
        out += x
        return self.relu(out)


class Net(nn.Module):
    """A stem, two residual blocks and a head, with functions between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 6)
        self.blocks = nn.Sequential(Residual(6), Residual(6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.blocks(torch.tanh(self.stem(x))), 1))


def test_a_residual_block_is_one_stage_and_its_last_activation_belongs_to_the_next() -> None:
    """Catches a cut across a skip connection, a code after the activation, and a lost function of the forward."""
    module = Net().double()
    coded = CodedNetwork(module)
    assert parts(coded) == [
        ("stem", [], ["Linear"]),
        ("blocks.0", ["Tanh"], ["TracedBlock"]),
        ("blocks.1", ["ReLU"], ["TracedBlock"]),
        ("head", ["ReLU", "Flatten"], ["Linear"]),
    ]
    assert [s.engine.kind for s in coded.stages] == ["closed_form", "autograd", "autograd", "closed_form"]
    assert_computes_the_network(coded, module, torch.randn(7, 5, dtype=F64))
    assert coded.explain().endswith("Kept together:\nblocks.0, blocks.1: its input is read by first and add")


@pytest.mark.parametrize(
    "blocks", [["blocks.0", "blocks.1"], [Residual], "modules"], ids=["by name", "by type", "the modules"]
)
def test_blocks_that_the_user_names_stay_whole(blocks: Any) -> None:
    """Catches blocks opened against the user's word, or found by one way of naming and not by another."""
    module = Net().double()
    coded = CodedNetwork(module, blocks=list(module.blocks) if blocks == "modules" else blocks)
    assert parts(coded) == [
        ("stem", [], ["Linear"]),
        ("blocks.0", ["Tanh"], ["Residual"]),
        ("blocks.1", [], ["Residual"]),
        ("head", ["Flatten"], ["Linear"]),
    ]
    assert_computes_the_network(coded, module, torch.randn(7, 5, dtype=F64))
    whole = CodedNetwork(module, blocks=["blocks"])
    assert [stage.name for stage in whole.stages] == ["stem", "blocks", "head"]


def test_a_sequential_keeps_named_blocks_and_a_list_of_blocks_is_a_network() -> None:
    """Catches ``blocks`` being heard by traced networks only, and ``CodedNetwork(blocks=[...])`` without a network."""
    inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), inner, nn.ReLU(), nn.Linear(4, 2))
    assert [s.name for s in CodedNetwork(module).stages] == ["0", "2.0", "2.2", "4"]
    assert [s.name for s in CodedNetwork(module, blocks=["2"]).stages] == ["0", "2", "4"]
    assert [s.name for s in CodedNetwork(blocks=list(module)).stages] == ["0", "2", "4"]


@pytest.mark.parametrize(
    ("network", "blocks", "error", "message"),
    [
        (Net(), ["layer9"], ValueError, "Net has no module 'layer9'"),
        (Net(), [nn.Conv2d], ValueError, "Net has no module"),
        (Net(), [nn.Linear(2, 2)], ValueError, "Net has no module"),
        (Net(), [3], TypeError, "blocks must hold modules, their types or their names, got 3"),
        ([nn.Linear(2, 2), nn.Linear(2, 2)], ["0"], TypeError, "a list of blocks already"),
        (None, ["0"], TypeError, "non-empty list of modules"),
        (None, None, TypeError, "non-empty list of modules"),
    ],
)
def test_blocks_that_are_not_there_are_refused(network: Any, blocks: Any, error: type[Exception], message: str) -> None:
    """Catches a misspelt block that would silently leave the network cut as it was."""
    with pytest.raises(error, match=message):
        CodedNetwork(network, blocks=blocks)


class Functional(nn.Module):
    """LeNet as most people write it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 3, 2)
        self.fc1, self.fc2 = nn.Linear(27, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.conv1(x)), 2)
        x = self.conv2(x).relu()
        x = torch.flatten(x, 1)
        return self.fc2(functional.gelu(self.fc1(x)))


def test_functions_that_have_a_module_get_its_closed_form() -> None:
    """Catches functional style trained by autograd where the same network of modules has closed forms."""
    module = Functional().double()
    coded = CodedNetwork(module)
    assert [s.engine.kind for s in coded.stages] == ["closed_form"] * 4
    assert [[type(m).__name__ for m in s.transfer] for s in coded.stages] == [
        [], ["ReLU", "MaxPool2d"], ["ReLU", "Flatten"], ["GELU"],
    ]  # fmt: skip
    x = torch.randn(4, 1, 10, 10, dtype=F64)
    assert_computes_the_network(coded, module, x)
    assert AltMin(module, nn.CrossEntropyLoss()).verify(x, torch.randint(3, (4,))).largest <= 1e-12


class Tied(nn.Module):
    """One layer used twice, another between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.same, self.other, self.head = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        x = torch.tanh(self.same(x))
        x = torch.tanh(self.other(x))
        return self.head(torch.tanh(self.same(x)))


def test_parts_that_share_a_parameter_are_one_stage() -> None:
    """Catches two stages with one parameter, whose problems are not independent."""
    module = Tied().double()
    coded = CodedNetwork(module)
    assert len(coded.stages) == 3
    assert {id(p) for p in coded.stages[1].parameters()} == {
        id(p) for p in (*module.same.parameters(), *module.other.parameters())
    }
    assert "its parts share a parameter" in coded.explain()
    assert_computes_the_network(coded, module, torch.randn(5, 4, dtype=F64))


class Branching(nn.Module):
    """Cannot be traced: it looks at values."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else self.layer(-x)


class OnlyInTraining(Branching):
    """Traces in each mode, differently."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(self.layer(x), 0.5, self.training)


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Linear(5, 6), inner, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.stem(x)))


def hooked() -> nn.Module:
    module = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    module.register_forward_hook(lambda m, inputs, output: 2 * output)
    return module


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (Branching, "cannot be traced"),
        (OnlyInTraining, "depends on the training mode"),
        (hooked, "has forward hooks"),
    ],
)
def test_what_cannot_be_followed_stays_whole(make: Any, why: str) -> None:
    """Catches a branch frozen at tracing, dropout frozen in one mode, and hooks that are jumped over."""
    module = Around(make()).double()
    coded = CodedNetwork(module)
    assert [stage.name for stage in coded.stages] == ["stem", "inner", "head"]
    assert why in coded.explain()
    for mode in (True, False):
        module.train(mode)
        for x in (torch.ones(4, 5, dtype=F64), -torch.ones(4, 5, dtype=F64)):
            assert_computes_the_network(coded, module, x)
    with pytest.raises(TypeError, match="cannot be split"):
        CodedNetwork(make() if make is not hooked else Branching())


def test_two_results_are_refused() -> None:
    """Catches an auxiliary output that would silently never be trained."""

    class TwoHeads(Around):
        def forward(self, x: Tensor) -> Any:
            return self.head(x), self.inner(x)

    with pytest.raises(TypeError, match=r"returns a tuple and not one tensor"):
        CodedNetwork(TwoHeads(nn.Linear(6, 6)))


def small_resnet() -> nn.Module:
    module = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)
    module.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    return module


VISION: dict[str, tuple[Any, int, int]] = {
    # network, side of its images, number of stages: counted by hand from its definition
    "resnet": (small_resnet, 16, 6),  # stem, four blocks, classifier
    "vgg": (lambda: vgg11_bn(num_classes=5, dropout=0.0), 32, 11),  # eight convolutions, three linear layers
    "vit": (lambda: VisionTransformer(16, 8, 2, 2, 8, 12, num_classes=5), 16, 6),  # patches, 2 x (attention, MLP), head
}


@pytest.mark.parametrize("kind", VISION)
def test_networks_of_torchvision_are_split_and_forward_inputs_give_backprops_gradient(kind: str) -> None:
    """Catches a lost class token, position, shortcut or parameter: the gradient would differ from autograd's."""
    torch.manual_seed(0)
    make, side, stages = VISION[kind]
    module = make().double()
    if kind == "vgg":
        module.avgpool = nn.AdaptiveAvgPool2d(1)
        module.classifier[0] = nn.Linear(512, 16).double()
        module.classifier[3] = nn.Linear(16, 16).double()
        module.classifier[6] = nn.Linear(16, 5).double()
    x, y = torch.randn(4, 3, side, side, dtype=F64), torch.randint(5, (4,))
    coded = CodedNetwork(module, batch_norm="live")
    assert len(coded.stages) == stages
    expected_buffers = copy.deepcopy(module)
    loss = nn.functional.cross_entropy(expected_buffers(x), y)
    expected = torch.autograd.grad(loss, list(expected_buffers.parameters()), allow_unused=True)
    core = AltMin(
        coded, nn.CrossEntropyLoss(), AltMinObjective(mu=2.0), GradientCodes(1, 1.0), LocalGradient(inputs="forward")
    )
    step = core.encode(x, y)
    core.solve_codes(step)
    core.fill_gradients(step)
    for (name, parameter), gradient in zip(module.named_parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert gradient is not None
        scale = max(1.0, float(gradient.abs().max()))
        assert float((parameter.grad - gradient).abs().max()) <= 1e-9 * scale, name
    for (name, buffer), other in zip(module.named_buffers(), expected_buffers.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, msg=lambda text, name=name: f"{name}: {text}")


def test_a_traced_network_is_copied_with_its_stages() -> None:
    """Catches a copy whose stages still hold the parameters of the original."""
    module = Net().double()
    core = AltMin(module, nn.CrossEntropyLoss())
    twin = copy.deepcopy(core)
    mine = {id(p) for stage in core.coded.stages for p in stage.parameters()}
    theirs = {id(p) for stage in twin.coded.stages for p in stage.parameters()}
    assert not mine & theirs
    assert theirs == {id(p) for p in twin.network.parameters()}


def test_moved_codes_of_blocks_give_the_objectives_gradient() -> None:
    """Catches a local problem of a traced block at the wrong input or target: autograd of mu/2 ||f(c) - c'||^2."""
    module = Net().double().eval()  # a BatchNorm in eval mode is one fixed map in all phases
    core = AltMin(module, nn.CrossEntropyLoss(), AltMinObjective(mu=0.7), GradientCodes(2, 0.3))
    x, y = torch.randn(6, 5, dtype=F64), torch.randint(3, (6,))
    step = core.encode(x, y)
    core.solve_codes(step)
    core.fill_gradients(step)
    first, second = step.codes[0], step.codes[1]
    block = module.blocks[0]

    def before_activation(c: Tensor) -> Tensor:
        return block.second(torch.relu(block.norm(block.first(torch.tanh(c))))) + torch.tanh(c)

    value = 0.7 / 2 * (before_activation(first) - second).square().sum() / 6
    expected = torch.autograd.grad(value, list(block.parameters()))
    for parameter, gradient in zip(block.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [1e-2, 1e-5, 1e-9, 1e-20])
def test_small_moves_through_a_block_keep_their_digits(size: float) -> None:
    """Catches a move that is rounded away beside its code: curvatures and residuals would be noise of any size."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 20))
    coded = CodedNetwork([nn.Linear(3, 20), block, nn.Linear(20, 2)])
    code, move = torch.randn(8, 20), torch.randn(8, 20) * size
    stage = coded.stages[1]
    output, state = stage.encode(code)
    found = stage.fixed(code, state, move).change(output).double()
    with torch.no_grad():
        exact = copy.deepcopy(block).double()
        if size > 1e-6:
            expected = exact(code.double() + move.double()) - exact(code.double())
        else:  # W_2 diag(1 - tanh^2) W_1 move: what it leaves out is below size^2
            slope = 1 - torch.tanh(exact[0](code.double())) ** 2
            expected = (move.double() @ exact[0].weight.t() * slope) @ exact[2].weight.t()
    assert float((found - expected).norm() / expected.norm()) < 3e-3


def test_no_move_changes_nothing() -> None:
    """Catches 0 / 0 where a code did not move."""
    coded = CodedNetwork([nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 2)])
    code = torch.randn(5, 4)
    output, state = coded.stages[1].encode(code)
    for base in (code, torch.zeros_like(code)):
        found = coded.stages[1].fixed(base, state, torch.zeros_like(code)).change(coded.stages[1].encode(base)[0])
        assert torch.equal(found, torch.zeros_like(output))
