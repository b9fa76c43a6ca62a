"""TensorLoader: which samples come in which batch, and what it draws from which generator."""

import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_altmin.data import TensorLoader


def numbered(samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs (10 i, 10 i + 1) with targets i."""
    return torch.arange(samples)[:, None] * 10.0 + torch.tensor([0.0, 1.0]), torch.arange(samples)


def add_noise(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """An augmentation whose every draw shows in the batch."""
    return x + torch.rand(x.shape, generator=generator)


@given(samples=st.integers(1, 40), batch_size=st.integers(1, 12), shuffle=st.booleans(), drop_last=st.booleans())
def test_every_sample_once_in_batches_of_the_right_size(
    samples: int, batch_size: int, shuffle: bool, drop_last: bool
) -> None:
    """Catches lost or repeated samples, inputs parted from their targets, and a wrong length."""
    x, y = numbered(samples)
    if drop_last and samples < batch_size:
        with pytest.raises(ValueError, match="would be empty"):
            TensorLoader(x, y, batch_size, shuffle, drop_last)
        return
    loader = TensorLoader(x, y, batch_size, shuffle, drop_last)
    batches = list(loader)
    seen = torch.cat([targets for _, targets in batches]).tolist()
    sizes = [len(targets) for _, targets in batches]
    full, rest = divmod(samples, batch_size)
    assert sizes == [batch_size] * full + ([rest] if rest and not drop_last else [])
    assert len(loader) == len(batches)
    assert len(set(seen)) == len(seen) == sum(sizes)
    assert all(torch.equal(inputs, x[targets]) for inputs, targets in batches)
    if not shuffle:
        assert seen == list(range(sum(sizes)))


def test_global_generator_orders_the_epochs() -> None:
    """Catches an order that seed_everything does not govern, or that is the same in every epoch."""
    x, y = numbered(50)
    loader = TensorLoader(x, y, 7, shuffle=True)

    def epoch() -> list[int]:
        return torch.cat([targets for _, targets in loader]).tolist()

    torch.manual_seed(3)
    first, second = epoch(), epoch()
    torch.manual_seed(3)
    assert [epoch(), epoch()] == [first, second]
    assert first != second
    assert first != sorted(first)


def test_one_draw_per_epoch_before_the_first_batch() -> None:
    """Catches draws in `iter` (Lightning calls it more often than it iterates) and draws in mid-epoch."""
    x, y = numbered(20)
    loader = TensorLoader(x, y, 3, shuffle=True, transform=add_noise)
    torch.manual_seed(0)
    untouched = torch.get_rng_state()
    iter(loader)
    batches = iter(loader)
    assert torch.equal(torch.get_rng_state(), untouched)
    next(batches)
    after_first = torch.get_rng_state()
    list(batches)
    assert not torch.equal(after_first, untouched)
    assert torch.equal(torch.get_rng_state(), after_first)


def test_order_without_randomness_draws_nothing() -> None:
    """Catches evaluation that moves the global generator, which would change the training after it."""
    x, y = numbered(20)
    before = torch.get_rng_state()
    list(TensorLoader(x, y, 3))
    assert torch.equal(torch.get_rng_state(), before)


def test_augmentation_differs_between_batches_and_epochs() -> None:
    """Catches a generator that is seeded alike for every batch or every epoch."""
    loader = TensorLoader(torch.zeros(12, 5), torch.zeros(12), 4, transform=add_noise)
    batches = [x for _ in range(2) for x, _ in loader]
    assert len({tuple(batch.flatten().tolist()) for batch in batches}) == 6


def test_transform_comes_before_preparation() -> None:
    """Catches augmentation of normalised pixels, where padding with zeros is not black any more."""
    loader = TensorLoader(torch.ones(4, 1), torch.zeros(4), 2, transform=lambda x, g: x + 1, prepare=lambda x: x * 10)
    assert [x.tolist() for x, _ in loader] == [[[20.0], [20.0]]] * 2


def test_indices_choose_the_samples() -> None:
    """Catches a validation split that leaks other samples, shuffled or not."""
    x, y = numbered(10)
    chosen = torch.tensor([7, 2, 5])
    assert [t.tolist() for _, t in TensorLoader(x, y, 2, indices=chosen)] == [[7, 2], [5]]
    shuffled = torch.cat([t for _, t in TensorLoader(x, y, 2, shuffle=True, indices=chosen)])
    assert sorted(shuffled.tolist()) == [2, 5, 7]


@pytest.mark.parametrize("shuffle", [False, True])
def test_writing_into_a_batch_leaves_the_data(shuffle: bool) -> None:
    """Catches batches that are views: an in-place activation would destroy the data set."""
    x, y = numbered(6)
    for inputs, targets in TensorLoader(x, y, 4, shuffle):
        inputs.zero_()
        targets.zero_()
    assert torch.equal(x, numbered(6)[0])
    assert torch.equal(y, torch.arange(6))


@given(start=st.integers(0, 6), seed=st.integers(0, 2**31))
def test_state_continues_the_epoch_without_a_draw(start: int, seed: int) -> None:
    """Catches a state that loses order, position or augmentation, or that a safe torch.load refuses."""
    x, y = numbered(20)

    def make() -> TensorLoader:
        return TensorLoader(x, y, 3, shuffle=True, transform=add_noise)

    torch.manual_seed(seed)
    loader = make()
    batches = iter(loader)
    for _ in range(start):
        next(batches)
    file = io.BytesIO()
    torch.save(loader.state_dict(), file)
    file.seek(0)
    resumed = make()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    before = torch.get_rng_state()
    rest = list(resumed)
    if start > 0:
        assert torch.equal(torch.get_rng_state(), before)
    else:
        torch.set_rng_state(before)
    expected = list(batches)
    assert len(rest) == 7 - start
    for (x1, y1), (x2, y2) in zip(rest, expected, strict=True):
        assert torch.equal(x1, x2)
        assert torch.equal(y1, y2)


def test_trained_batches_are_not_built_again() -> None:
    """Catches a resume that walks through, and augments, every batch it skips."""
    calls = 0

    def counting(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return x

    x, y = numbered(20)
    loader = TensorLoader(x, y, 2, shuffle=True, transform=counting)
    batches = iter(loader)
    for _ in range(7):
        next(batches)
    state = loader.state_dict()
    calls = 0
    loader.load_state_dict(state)
    assert len(list(loader)) == 3
    assert calls == 3


def test_state_at_the_end_begins_a_new_epoch() -> None:
    """Catches an empty epoch after a state that was taken when all batches were handed out."""
    x, y = numbered(6)
    loader = TensorLoader(x, y, 4, shuffle=True)
    list(loader)
    other = TensorLoader(x, y, 4, shuffle=True)
    other.load_state_dict(loader.state_dict())
    assert len(list(other)) == 2


def test_epoch_after_the_resumed_one_is_drawn_anew() -> None:
    """Catches a loaded state that is applied to every later epoch."""
    x, y = numbered(30)
    loader = TensorLoader(x, y, 10, shuffle=True)
    batches = iter(loader)
    order = next(batches)[1].tolist()
    loader.load_state_dict(loader.state_dict())
    assert len(list(loader)) == 2
    following = list(loader)
    assert len(following) == 3
    assert following[0][1].tolist() != order


def test_independent_iterators() -> None:
    """Catches a loader that ends one pass when another begins."""
    x, y = numbered(4)
    loader = TensorLoader(x, y, 2)
    assert len([1 for _ in loader for _ in loader]) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 4}, "batch_size was 3, now 4"),
        ({"batch_size": 3, "shuffle": True}, "shuffle was False, now True"),
        ({"batch_size": 3, "indices": torch.arange(10)}, "samples was 20, now 10"),
    ],
)
def test_state_of_other_batches_is_refused(settings: dict[str, object], message: str) -> None:
    """Catches a position applied to batches it was not counted in: samples would be lost without a word."""
    x, y = numbered(20)
    loader = TensorLoader(x, y, 3)
    next(iter(loader))
    with pytest.raises(ValueError, match=message):
        TensorLoader(x, y, **settings).load_state_dict(loader.state_dict())  # type: ignore[arg-type]


def test_foreign_state_is_refused() -> None:
    """Catches the state of some other stateful loader taken for ours."""
    x, y = numbered(4)
    with pytest.raises(ValueError, match="not the state of a TensorLoader"):
        TensorLoader(x, y, 2).load_state_dict({"epoch": 3})


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, True])
def test_batch_size_must_be_a_positive_integer(batch_size: object) -> None:
    """Catches a nonsensical batch size that shows up later as a strange number of batches."""
    x, y = numbered(4)
    with pytest.raises(ValueError, match="batch_size must be an integer >= 1"):
        TensorLoader(x, y, batch_size)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("x", "y", "indices", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(4), None, "one entry per sample"),
        (torch.zeros(0, 2), torch.zeros(0), None, "no samples"),
        (torch.zeros(3, 2), torch.zeros(3), torch.tensor([3]), "between 0 and 2"),
        (torch.zeros(3, 2), torch.zeros(3), torch.tensor([-1]), "between 0 and 2"),
        (torch.zeros(3, 2), torch.zeros(3), torch.tensor([0.0]), "1-d integer"),
        (torch.zeros(3, 2), torch.zeros(3), torch.tensor([], dtype=torch.int64), "no samples"),
    ],
)
def test_unusable_data_is_refused(x: torch.Tensor, y: torch.Tensor, indices: torch.Tensor | None, message: str) -> None:
    """Catches empty loaders, samples without targets, and indices that would wrap around."""
    with pytest.raises(ValueError, match=message):
        TensorLoader(x, y, 2, indices=indices)


def test_a_loader_that_was_not_used_has_nothing_to_give_back() -> None:
    """Catches a loader that can be closed or saved only after its first batch, and a loaded state that is lost."""
    x, y = numbered(20)
    fresh = TensorLoader(x, y, 3)
    fresh.close()
    assert (fresh.state_dict()["status"], fresh.state_dict()["position"]) == ("fresh", 0)
    running = TensorLoader(x, y, 3)
    next(iter(running))
    fresh.load_state_dict(running.state_dict())
    assert fresh.state_dict() == running.state_dict()
    assert fresh.state_dict()["position"] == 1
