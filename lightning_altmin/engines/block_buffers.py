"""Buffers that a block updates as it runs, such as spectral normalisation's vectors: every phase starts from the same.

They advance in encode only. A later phase that ran the block from where encode left them would see another function,
one update further, and take the difference of the two for a residual.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

Kept = list[tuple[nn.Module, str, Tensor | None]]
"""Owner, name and value of each buffer."""


def kept(owners: Sequence[nn.Module]) -> Kept:
    """Copies of all buffers of ``owners``."""
    return [(owner, name, _copy(buffer)) for owner in owners for name, buffer in owner._buffers.items()]


def versions(owners: Sequence[nn.Module]) -> list[tuple[int, int]]:
    """What is no longer the same once a buffer of ``owners`` was written to or replaced; looks at no value."""
    buffers = [buffer for owner in owners for buffer in owner._buffers.values()]
    return [(id(buffer), 0 if buffer is None else buffer._version) for buffer in buffers]


@contextmanager
def restarted(before: Kept) -> Iterator[None]:
    """Run from copies of the buffers in ``before``, then put back those that were there."""
    there = [(owner, name, owner._buffers[name]) for owner, name, _ in before]
    for owner, name, buffer in before:
        owner._buffers[name] = _copy(buffer)  # the block may write to the copy, also inside a graph
    try:
        yield
    finally:
        for owner, name, buffer in there:
            owner._buffers[name] = buffer


def _copy(buffer: Tensor | None) -> Tensor | None:
    return None if buffer is None else buffer.clone()
