"""Random augmentation of whole batches of images, drawn from a given generator only."""

from collections.abc import Sequence

import torch

from lightning_altmin.arguments import check_count
from lightning_altmin.data.resumable_loader import BatchTransform


class RandomCrop:
    """Pads every image with zeros and cuts out a window of the original size at a random place, one per image.

    Args:
        padding: rows and columns added on each side, in pixels.

    Raises:
        ValueError: if ``padding`` is not a positive integer.
    """

    def __init__(self, padding: int) -> None:
        check_count("padding", padding)
        self.padding = padding

    def __call__(self, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Crop a batch of shape (n, channels, height, width); shape and type stay."""
        n, channels, height, width = x.shape
        offsets = torch.randint(2 * self.padding + 1, (2, n, 1), generator=generator)
        rows = offsets[0] + torch.arange(height)
        columns = offsets[1] + torch.arange(width)
        # one gather over flattened images is several times faster than indexing rows and columns apart
        pixels = rows[:, :, None] * (width + 2 * self.padding) + columns[:, None, :]
        places = pixels.flatten(1)[:, None].expand(-1, channels, -1).to(x.device)
        padded = torch.nn.functional.pad(x, (self.padding,) * 4)
        return padded.flatten(2).gather(2, places).view_as(x)


class RandomHorizontalFlip:
    """Mirrors every image left to right with probability one half."""

    def __call__(self, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Flip a batch of shape (n, channels, height, width); shape and type stay."""
        flipped = torch.rand(len(x), generator=generator) < 0.5
        return torch.where(flipped.to(x.device)[:, None, None, None], x.flip(-1), x)


class Compose:
    """Applies transforms one after another, all drawing from the same generator.

    Args:
        transforms: the transforms, first to last.
    """

    def __init__(self, transforms: Sequence[BatchTransform]) -> None:
        self.transforms = tuple(transforms)

    def __call__(self, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Transform a batch."""
        for transform in self.transforms:
            x = transform(x, generator)
        return x
