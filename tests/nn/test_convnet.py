"""ConvNet: size by a formula, shapes, layers and errors."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_altmin.nn import ConvNet


@given(
    in_channels=st.integers(1, 3),
    channels=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    convs=st.integers(1, 3),
    batch_norm=st.booleans(),
    head=st.sampled_from(["flatten", "average"]),
    image_size=st.integers(8, 20),
)
def test_parameter_count_and_output_shape(
    in_channels: int, channels: list[int], convs: int, batch_norm: bool, head: Any, image_size: int
) -> None:
    """Would catch wrong channel wiring between blocks, a bias under BatchNorm and a wrong width of the last layer."""
    network = ConvNet(in_channels, 4, channels, convs, batch_norm, head, image_size)
    total, before, side = 0, in_channels, image_size
    for width in channels:
        total += 9 * before * width + (convs - 1) * 9 * width * width
        total += convs * width * (2 if batch_norm else 1)  # scale and shift, or the bias
        before, side = width, side // 2
    features = channels[-1] * (side * side if head == "flatten" else 1)
    assert sum(p.numel() for p in network.parameters()) == total + features * 4 + 4
    network.eval()
    assert network(torch.zeros(2, in_channels, image_size, image_size)).shape == (2, 4)


def test_default_takes_cifar_images() -> None:
    """Would catch defaults that do not fit 32 x 32 colour images in ten classes."""
    network = ConvNet()
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert network[-1].in_features == 128 * 4 * 4


def test_layers_in_order_and_plain_keys() -> None:
    """Would catch a BatchNorm away from its convolution, and keys that are not the indices of the layers."""
    network = ConvNet(channels=[4, 5], convs_per_block=2, head="average")
    conv = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    block = [*conv, *conv, nn.MaxPool2d]
    assert [type(layer) for layer in network] == [*block, *block, nn.AvgPool2d, nn.Flatten, nn.Linear]
    assert {key.partition(".")[0] for key in network.state_dict()} == {"0", "1", "3", "4", "7", "8", "10", "11", "16"}


def test_average_head_is_the_mean_over_the_image() -> None:
    """Would catch a pooling window that leaves pixels out or more than one value per channel."""
    network = ConvNet(channels=[4], image_size=8, head="average").eval()
    images = torch.randn(3, 3, 8, 8)
    pixels = network[:4](images)
    assert pixels.shape == (3, 4, 4, 4)
    torch.testing.assert_close(network[:-1](images), pixels.mean(dim=(2, 3)))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"channels": []}, ValueError, r"channels must name at least one block"),
        ({"channels": [4, 0]}, ValueError, r"channels\[1\] .* got 0"),
        ({"channels": [4, 2.5]}, ValueError, r"channels\[1\] must be an integer >= 1, got 2\.5"),
        ({"convs_per_block": 0}, ValueError, r"convs_per_block .* got 0"),
        ({"in_channels": -3}, ValueError, r"in_channels .* got -3"),
        ({"num_classes": 0}, ValueError, r"num_classes .* got 0"),
        ({"head": "mean"}, ValueError, r"head must be 'flatten' or 'average', got 'mean'"),
        ({"image_size": 7}, ValueError, r"image_size must be at least 8 pixels for 3 blocks .* got 7"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    """Would catch an impossible network that fails in torch, or only when the first batch arrives."""
    with pytest.raises(error, match=message):
        ConvNet(**arguments)
