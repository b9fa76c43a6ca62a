"""Batch augmentation against its definition: windows of the padded image, mirror images, uniform frequencies."""

import pytest
import torch

from lightning_altmin.data import Compose, RandomCrop, RandomHorizontalFlip


def test_crops_are_windows_of_the_padded_image() -> None:
    """Catches channels, rows or columns mixed up, and crops that share one offset over the batch."""
    x = torch.arange(1, 200 * 3 * 5 * 4 + 1).view(200, 3, 5, 4)
    crops = RandomCrop(2)(x, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    offsets = set()
    for image, crop in zip(padded, crops, strict=True):
        matches = [
            (row, column)
            for row in range(5)
            for column in range(5)
            if torch.equal(image[:, row : row + 5, column : column + 4], crop)
        ]
        assert len(matches) == 1
        offsets.update(matches)
    # 200 draws of 25 offsets: one given offset stays out with probability (24/25)^200 = 3e-4
    assert len(offsets) >= 23


def test_crop_offsets_are_uniform() -> None:
    """Catches a range that leaves out the outermost offsets or prefers the middle."""
    n, padding = 20_000, 1
    x = torch.zeros(n, 1, 3, 3)
    x[:, 0, 1, 1] = 1
    crops = RandomCrop(padding)(x, torch.Generator().manual_seed(0))
    frequencies = crops.mean(0).flatten()
    # each of the 9 offsets moves the dot to its own place; 5 standard deviations of a frequency of 1/9
    assert torch.all((frequencies - 1 / 9).abs() < 5 * (1 / 9 * 8 / 9 / n) ** 0.5)


def test_flips_mirror_half_of_the_images() -> None:
    """Catches flips of the wrong axis, of the whole batch at once, or with another probability."""
    n = 10_000
    x = torch.arange(n * 2 * 3).view(n, 1, 2, 3)
    out = RandomHorizontalFlip()(x, torch.Generator().manual_seed(0))
    flipped = (out == x.flip(-1)).flatten(1).all(1)
    kept = (out == x).flatten(1).all(1)
    assert torch.all(flipped ^ kept)
    assert abs(float(flipped.float().mean()) - 0.5) < 5 * 0.5 / n**0.5


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
def test_type_and_shape_stay_and_only_the_given_generator_is_used(dtype: torch.dtype) -> None:
    """Catches a draw of the global generator, which would break exact resume, and a silent cast."""
    x = torch.randint(0, 256, (6, 3, 8, 8)).to(dtype)
    augment = Compose([RandomCrop(2), RandomHorizontalFlip()])
    before = torch.get_rng_state()
    first = augment(x, torch.Generator().manual_seed(5))
    second = augment(x, torch.Generator().manual_seed(5))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.dtype == dtype
    assert first.shape == x.shape
    assert torch.equal(first, second)


@pytest.mark.parametrize("padding", [0, -1, 1.5, True])
def test_padding_must_be_positive(padding: object) -> None:
    """Catches a crop that would do nothing, or fail in the middle of training."""
    with pytest.raises(ValueError, match="padding must be an integer >= 1"):
        RandomCrop(padding)  # type: ignore[arg-type]
