"""Random draws of the loaders: one from the global generator per epoch, everything else derived from it."""

import torch

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def draw_epoch_seed() -> int:
    """Draw the seed of one epoch from torch's global CPU generator (the only use the loaders make of it)."""
    return int(torch.randint(0, 2**63 - 1, (), dtype=torch.int64).item())


def derived_generator(seed: int, index: int) -> torch.Generator:
    """Make the generator number ``index`` of an epoch.

    Args:
        seed: the draw of the epoch.
        index: number of the wanted stream; different numbers give unrelated streams.

    Returns:
        A fresh CPU generator, the same for the same ``(seed, index)`` in any process.
    """
    # splitmix64: torch's CPU generator keeps only the low 32 bits of a seed, so neighbouring indices must be mixed well
    z = (seed + (index + 1) * _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    z ^= z >> 31
    return torch.Generator().manual_seed(z & ((1 << 63) - 1))
