"""What every network here shares: it stays an ordinary nn.Sequential."""

import copy
import pickle
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import nn

from lightning_altmin.nn import MLP, ConvNet, LeNet5


class Holder(LightningModule):
    """The smallest module that takes a network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network


@pytest.fixture(params=["mlp", "lenet", "convnet"])
def network(request: pytest.FixtureRequest) -> nn.Sequential:
    """Return one network of each class, for images of one channel and 16 pixels."""
    make: dict[str, Any] = {
        "mlp": lambda: MLP(256, [8, 8], 3, batch_norm=True),
        "lenet": lambda: LeNet5(num_classes=3, image_size=16),
        "convnet": lambda: ConvNet(1, 3, [4, 4], image_size=16),
    }
    return make[request.param]()


def test_slices_are_plain_and_share_the_modules(network: nn.Sequential) -> None:
    """Would catch slicing that calls the subclass's constructor with modules, and so fails or builds a new network."""
    network.eval()
    head, tail = network[:3], network[3:]
    assert type(head) is nn.Sequential
    assert [*head, *tail] == [*network]
    assert set(tail.state_dict()) == {key for key in network.state_dict() if int(key.partition(".")[0]) >= 3}
    images = torch.randn(2, 1, 16, 16)
    assert torch.equal(tail(head(images)), network(images))


def test_copies_and_pickles(network: nn.Sequential) -> None:
    """Would catch a network that cannot be copied (weight averaging) or sent to another process (spawned workers)."""
    network.eval()
    images = torch.randn(2, 1, 16, 16)
    expected = network(images)
    for copied in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert type(copied) is type(network)
        assert torch.equal(copied(images), expected)


@pytest.mark.parametrize(
    ("class_path", "init_args", "expected"),
    [
        ("lightning_altmin.nn.MLP", {"in_features": 64, "hidden": [100, 100], "out_features": 10}, MLP),
        (
            "lightning_altmin.nn.MLP",
            {"in_features": 4, "hidden": [5], "out_features": 3, "activation": "torch.nn.ReLU6", "dropout": 0.1},
            MLP,
        ),
        ("lightning_altmin.nn.LeNet5", {"in_channels": 3, "image_size": 32}, LeNet5),
        ("lightning_altmin.nn.ConvNet", {"channels": [8, 16], "head": "average"}, ConvNet),
    ],
)
def test_is_built_from_yaml(class_path: str, init_args: dict[str, Any], expected: type[nn.Module]) -> None:
    """Would catch type hints that the command line cannot read, so that a config file cannot name the network."""
    config = {"model": {"network": {"class_path": class_path, "init_args": init_args}}}
    cli = LightningCLI(
        Holder,
        args=config,
        run=False,
        seed_everything_default=False,
        trainer_defaults={"logger": False, "accelerator": "cpu", "enable_checkpointing": False},
    )
    assert type(cli.model.network) is expected
