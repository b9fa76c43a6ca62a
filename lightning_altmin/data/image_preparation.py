"""From stored pixels to network input: scaling, normalisation, flattening; and the statistics it needs."""

from collections.abc import Iterable, Sequence

import torch


class ImagePreparation:
    """Maps batches of pixels to float batches ``(pixels / scale - mean) / std``.

    Args:
        scale: pixel value that becomes 1, such as 255 for bytes.
        mean: mean per channel of the scaled pixels; None subtracts nothing.
        std: standard deviation per channel of the scaled pixels, positive; None divides by nothing.
        flatten: whether images become vectors.

    Raises:
        ValueError: if an entry of ``std`` is not positive, or ``mean`` and ``std`` differ in length.
    """

    def __init__(
        self,
        scale: float,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        flatten: bool = False,
    ) -> None:
        mean = (0.0,) if mean is None else mean
        std = (1.0,) * len(mean) if std is None else std
        if len(mean) != len(std):
            raise ValueError(f"mean and std must have one entry per channel each, got {list(mean)} and {list(std)}")
        if not all(value > 0 for value in std):
            raise ValueError(f"every entry of std must be positive, got {list(std)}")
        stds = torch.tensor(std, dtype=torch.float64)
        means = torch.tensor(mean, dtype=torch.float64)
        self._factor = (1 / (scale * stds)).float()[:, None, None]
        self._offset = (-means / stds).float()[:, None, None]
        self._flatten = flatten

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Prepare a batch of shape (n, channels, height, width) and any real type.

        Returns:
            Float32 tensor of the same shape, or (n, channels * height * width) if flattened.
        """
        out = x.to(torch.float32) * self._factor.to(x.device) + self._offset.to(x.device)
        return out.flatten(1) if self._flatten else out


def byte_channel_statistics(batches: Iterable[torch.Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of byte images scaled to 0..1, per channel.

    Counts pixel values, so the result does not depend on how the images are cut into batches.

    Args:
        batches: at least one uint8 tensor of shape (n, channels, height, width).

    Returns:
        Means and (population) standard deviations, one per channel.

    Raises:
        ValueError: if a channel is constant over all images: it cannot be scaled to unit deviation.
    """
    histogram: torch.Tensor | None = None
    for x in batches:
        counts = torch.stack([torch.bincount(channel.flatten().int(), minlength=256) for channel in x.unbind(1)])
        histogram = counts if histogram is None else histogram + counts
    if histogram is None:
        raise ValueError("statistics need at least one image")
    values = torch.arange(256, dtype=torch.float64) / 255
    weights = histogram.double() / histogram.sum(1, keepdim=True)
    mean = weights @ values
    std = (weights * (values - mean[:, None]) ** 2).sum(1).sqrt()
    if bool((std == 0).any()):
        raise ValueError(
            f"normalize=True needs images that vary, but channel {int(std.argmin())} of the training images has one "
            "value everywhere; use normalize=False or give mean and std"
        )
    return tuple(mean.tolist()), tuple(std.tolist())
