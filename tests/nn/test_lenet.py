"""LeNet5: size by hand, shapes, names and errors."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_altmin.nn import LeNet5


def test_parameter_count_at_28_pixels() -> None:
    """Would catch a padded convolution or a wrong width: the sizes are those of LeNet-5, with 256 features."""
    convolutions = (6 * 1 * 25 + 6) + (16 * 6 * 25 + 16)
    linears = (256 * 120 + 120) + (120 * 84 + 84) + (84 * 10 + 10)
    assert sum(p.numel() for p in LeNet5().parameters()) == convolutions + linears == 44426


@pytest.mark.parametrize(("image_size", "features"), [(28, 256), (32, 400), (16, 16), (17, 16), (29, 256)])
def test_features_of_other_sizes(image_size: int, features: int) -> None:
    """Would catch a wrong formula for the flattened size, odd image sizes included."""
    network = LeNet5(in_channels=3, num_classes=4, image_size=image_size)
    assert network[7].in_features == features
    assert network(torch.zeros(2, 3, image_size, image_size)).shape == (2, 4)


def test_state_dict_keys_are_plain_sequential_indices() -> None:
    """Would catch nested or named layers, which would change the keys of every saved LeNet."""
    expected = {f"{index}.{kind}" for index in (0, 3, 7, 9, 11) for kind in ("weight", "bias")}
    assert set(LeNet5().state_dict()) == expected


def test_layers_in_order() -> None:
    """Would catch a swapped, missing or added layer."""
    block = [nn.Conv2d, nn.ReLU, nn.MaxPool2d]
    head = [nn.Flatten, nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    assert [type(layer) for layer in LeNet5()] == block + block + head


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"in_channels": 0}, ValueError, r"in_channels .* got 0"),
        ({"num_classes": "10"}, ValueError, r"num_classes .* got '10' of type str"),
        ({"image_size": 15}, ValueError, r"image_size must be at least 16 pixels .* got 15"),
        ({"image_size": 28.0}, ValueError, r"image_size must be an integer .* got 28\.0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    """Would catch an image so small that nothing is left after the poolings, noticed only at the first batch."""
    with pytest.raises(error, match=message):
        LeNet5(**arguments)
