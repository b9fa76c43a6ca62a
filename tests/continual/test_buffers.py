"""Memories of samples: the statistics of what is kept, bytes, state, and bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy import stats

from lightning_altmin.continual import ClassBalancedBuffer, Replay, ReservoirBuffer
from tests.continual.problems import numbered

Buffer = type[ReservoirBuffer] | type[ClassBalancedBuffer]


def fill(buffer: Any, x: torch.Tensor, y: torch.Tensor, batch: int = 7) -> Any:
    for start in range(0, len(x), batch):
        buffer.add(x[start : start + batch], y[start : start + batch])
    return buffer


def kept(buffer: Any) -> list[int]:
    return [int(v) for v in buffer.x[:, 0]]


def test_every_sample_is_kept_with_the_same_probability() -> None:
    """Catches the draw among n-1 instead of n places, with which early samples are kept too rarely.

    2000 buffers of 5 of 20 samples: by symmetry each sample is in a share of 5/20. Counts of one buffer are
    negatively correlated (they sum to 5), which makes the chi-square statistic (n-1)/n times smaller at most.
    """
    x, y = numbered(20, 2)
    counts = torch.zeros(20)
    runs = 2000
    for seed in range(runs):
        counts[kept(fill(ReservoirBuffer(5, seed), x, y))] += 1
    variance = runs * (5 / 20) * (15 / 20) * 20 / 19  # of one count, corrected for sampling without replacement
    statistic = float(((counts - runs * 5 / 20) ** 2 / variance).sum())
    assert stats.chi2.sf(statistic, 19) > 1e-3
    assert counts.sum() == 5 * runs


def test_pairs_are_kept_as_often_as_in_a_random_subset() -> None:
    """Catches places that are not drawn independently: neighbours of a batch would be kept together too often."""
    x, y = numbered(12, 2)
    pairs = torch.zeros(12, 12)
    runs = 3000
    for seed in range(runs):
        rows = torch.tensor(kept(fill(ReservoirBuffer(4, seed), x, y, batch=3)))
        pairs[rows[:, None], rows] += 1
    share = (4 * 3) / (12 * 11)
    deviation = (runs * share * (1 - share)) ** 0.5
    off_diagonal = pairs[~torch.eye(12, dtype=torch.bool)]
    assert float((off_diagonal - runs * share).abs().max()) < 4.5 * deviation


def test_balanced_buffers_hold_as_many_of_each_class_as_there_are() -> None:
    """Catches an early class that keeps the room of later ones, and rare classes that are thrown out."""
    y = torch.cat([torch.zeros(300), torch.ones(40), torch.full((3,), 2), torch.full((200,), 3)]).long()
    buffer = fill(ClassBalancedBuffer(30), torch.arange(543.0)[:, None], y)
    counts = torch.bincount(buffer.y, minlength=4)
    assert counts[2] == 3
    assert counts.sum() == 30
    assert counts[[0, 1, 3]].tolist() == [9, 9, 9]
    assert bool((y[buffer.x[:, 0].long()] == buffer.y).all())


def test_within_a_class_balanced_buffers_are_uniform() -> None:
    """Catches a class whose early or late samples are kept more often."""
    y = torch.tensor([0] * 12 + [1] * 12)
    counts = torch.zeros(24)
    runs = 2000
    for seed in range(runs):
        counts[kept(fill(ClassBalancedBuffer(8, seed), torch.arange(24.0)[:, None], y, batch=5))] += 1
    assert counts[:12].sum() == 4 * runs
    for part in (counts[:12], counts[12:]):
        variance = runs * (4 / 12) * (8 / 12) * 12 / 11
        assert stats.chi2.sf(float(((part - runs * 4 / 12) ** 2 / variance).sum()), 11) > 1e-3


@pytest.mark.parametrize("kind", [ReservoirBuffer, ClassBalancedBuffer])
def test_a_restored_buffer_goes_on_as_the_original(kind: Buffer) -> None:
    """Catches counters or draws that are not in the state: the two would keep different samples afterwards."""
    x, y = numbered(90, 3)
    whole = fill(kind(10, seed=4), x[:45], y[:45], batch=9)
    copy = kind(10, seed=4)
    copy.load_state_dict(whole.state_dict())
    for buffer in (whole, copy):
        fill(buffer, x[45:], y[45:], batch=9)
    assert torch.equal(whole.x, copy.x)
    assert torch.equal(whole.y, copy.y)
    assert whole.seen == copy.seen == 90


@pytest.mark.parametrize("kind", [ReservoirBuffer, ClassBalancedBuffer])
def test_buffers_leave_the_global_generator_alone_and_keep_types(kind: Buffer) -> None:
    """Catches draws from the global generator, and bytes stored as floats at four times the price."""
    before = torch.get_rng_state()
    buffer = fill(
        kind(6), torch.randint(0, 256, (20, 1, 4), dtype=torch.uint8, generator=torch.Generator()), numbered(20, 2)[1]
    )
    buffer.sample(3, torch.Generator())
    assert torch.equal(torch.get_rng_state(), before)
    assert buffer.x.dtype == torch.uint8
    assert buffer.state_bytes == 6 * (4 + 8)


def test_samples_are_drawn_without_replacement() -> None:
    """Catches the same stored sample twice in a batch, and samples beyond those kept so far."""
    buffer = fill(ReservoirBuffer(8), *numbered(5, 2))
    x, y = buffer.sample(4, torch.Generator())
    assert len(set(x[:, 0].tolist())) == 4
    assert len(buffer.sample(20, torch.Generator())[0]) == 5
    assert bool((y == x[:, 0].long() % 2).all())


def test_bad_arguments() -> None:
    """Catches sizes that cannot be meant, also one for a buffer, and a state of another size."""
    for size in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="size"):
            ReservoirBuffer(size)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="samples"):
            Replay(ReservoirBuffer(5), size)  # type: ignore[arg-type]
    for buffer in (100, None, ReservoirBuffer):
        with pytest.raises(TypeError, match=r"buffer must be .*ReservoirBuffer\(size=1000\), got"):
            Replay(buffer)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="size=5"):
        ReservoirBuffer(6).load_state_dict(ReservoirBuffer(5).state_dict())
    with pytest.raises(ValueError, match="number of processes"):
        Replay(ReservoirBuffer(2)).begin(0, 3)


def test_every_process_has_its_share_and_its_own_draws() -> None:
    """Catches shares that do not add up to the size, and processes that make the same choices."""
    sizes, contents = [], []
    for rank in range(3):
        replay = Replay(ReservoirBuffer(20, seed=1))
        replay.begin(rank, 3)
        sizes.append(replay.buffer.size)
        contents.append(kept(fill(replay.buffer, *numbered(200, 2))))
    assert sizes == [7, 7, 6]
    assert contents[0] != contents[1]
    again = Replay(ReservoirBuffer(20, seed=1))
    for rank in (2, 0):  # begun anew: from the whole size, not from the last share
        again.begin(rank, 3)
    assert again.buffer.size == 7
