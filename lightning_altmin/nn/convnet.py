"""A small convolutional network in the manner of VGG."""

from collections.abc import Sequence
from typing import Literal

from torch import nn

from lightning_altmin.arguments import check_count
from lightning_altmin.nn.arguments import check_counts, check_image_size
from lightning_altmin.nn.sequence import LayerSequence


class ConvNet(LayerSequence):
    """Blocks of ``(Conv2d 3x3, [BatchNorm2d], ReLU) * convs_per_block, MaxPool2d(2)``, then one ``Linear``.

    Takes images of shape ``(batch, in_channels, image_size, image_size)`` and returns logits ``(batch, num_classes)``.
    Convolutions are padded, so only the pooling of each block halves the image (rounding down). With ``batch_norm``
    they have no bias: the normalisation would subtract it again.

    Args:
        in_channels: Channels of the images; at least 1.
        num_classes: Width of the output; at least 1.
        channels: Channels of each block, at least one block; each at least 1.
        convs_per_block: Convolutions in each block; at least 1.
        batch_norm: Whether a ``BatchNorm2d`` follows each convolution directly.
        head: What the last ``Linear`` sees: ``"flatten"`` every pixel of the last block's channels, ``"average"``
            their mean over the image.
        image_size: Height and width of the images in pixels; at least ``2 ** len(channels)``.

    Raises:
        TypeError: If ``channels`` is no list.
        ValueError: If a size is not an integer or too small, ``channels`` is empty or ``head`` is unknown.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 10,
        channels: Sequence[int] = (32, 64, 128),
        convs_per_block: int = 1,
        batch_norm: bool = True,
        head: Literal["flatten", "average"] = "flatten",
        image_size: int = 32,
    ) -> None:
        check_count("in_channels", in_channels)
        check_count("num_classes", num_classes)
        check_count("convs_per_block", convs_per_block)
        blocks = check_counts("channels", channels)
        if not blocks:
            raise ValueError("channels must name at least one block, such as [32, 64, 128], got an empty list")
        if head not in ("flatten", "average"):
            raise ValueError(f"head must be 'flatten' or 'average', got {head!r}")
        check_image_size(image_size, smallest=2 ** len(blocks), why=f"{len(blocks)} blocks that each halve the image")
        layers: list[nn.Module] = []
        for channels_in, channels_out in zip((in_channels, *blocks), blocks, strict=False):
            layers += _block(channels_in, channels_out, convs_per_block, batch_norm)
        side = image_size // 2 ** len(blocks)
        if head == "average":
            layers.append(nn.AvgPool2d(side))
        features = blocks[-1] * (side * side if head == "flatten" else 1)
        super().__init__(*layers, nn.Flatten(), nn.Linear(features, num_classes))


def _block(channels_in: int, channels_out: int, convs: int, batch_norm: bool) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for index in range(convs):
        first_in = channels_in if index == 0 else channels_out
        layers.append(nn.Conv2d(first_in, channels_out, kernel_size=3, padding=1, bias=not batch_norm))
        if batch_norm:
            layers.append(nn.BatchNorm2d(channels_out))
        layers.append(nn.ReLU())
    return [*layers, nn.MaxPool2d(2)]
