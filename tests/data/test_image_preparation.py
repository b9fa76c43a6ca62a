"""Normalisation and its statistics against the definition in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_altmin.data.image_preparation import ImagePreparation, byte_channel_statistics


def test_preparation_is_the_definition() -> None:
    """Catches a wrong order of scaling and normalisation, and channels normalised by each other's values."""
    x = torch.randint(0, 256, (4, 3, 5, 6), dtype=torch.uint8)
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.7)
    expected = (x.double() / 255 - torch.tensor(mean).double()[:, None, None]) / torch.tensor(std).double()[
        :, None, None
    ]
    out = ImagePreparation(255, mean, std)(x)
    assert out.dtype == torch.float32
    # three float32 roundings of numbers up to 10
    assert torch.allclose(out.double(), expected, rtol=0, atol=5e-6)
    assert torch.equal(ImagePreparation(255, mean, std, flatten=True)(x), out.flatten(1))


def test_without_statistics_pixels_are_scaled_only() -> None:
    """Catches normalisation that cannot be switched off."""
    x = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 1, 1, 3)
    assert ImagePreparation(255)(x).flatten().tolist() == pytest.approx([0.0, 1.0, 0.2], abs=1e-7)


@given(cut=st.integers(1, 19), seed=st.integers(0, 1000))
def test_statistics_do_not_depend_on_the_batches(cut: int, seed: int) -> None:
    """Catches means of batch means, and a variance that forgets the differences between batches."""
    x = torch.randint(0, 256, (20, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    mean, std = byte_channel_statistics([x[:cut], x[cut:]])
    scaled = x.double() / 255
    assert mean == pytest.approx(scaled.mean((0, 2, 3)).tolist(), abs=1e-12)
    assert std == pytest.approx(scaled.std((0, 2, 3), correction=0).tolist(), abs=1e-12)


def test_constant_channel_is_refused() -> None:
    """Catches a division by zero that turns every batch into nan."""
    x = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    x[:, 1] = 7
    with pytest.raises(ValueError, match="channel 1"):
        byte_channel_statistics([x])


@pytest.mark.parametrize(
    ("mean", "std", "message"), [((0.1,), (0.0,), "must be positive"), ((0.1, 0.2), (1.0,), "one entry per channel")]
)
def test_impossible_statistics_are_refused(mean: tuple[float, ...], std: tuple[float, ...], message: str) -> None:
    """Catches statistics that would broadcast or divide by zero."""
    with pytest.raises(ValueError, match=message):
        ImagePreparation(255, mean, std)


def test_statistics_of_no_images_are_refused() -> None:
    """Catches a mean of nothing."""
    with pytest.raises(ValueError, match="statistics need at least one image"):
        byte_channel_statistics([])
