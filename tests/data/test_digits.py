"""DigitsDataModule and, on it, the splitting common to all in-memory data modules."""

import pytest
import torch
from sklearn.datasets import load_digits

from lightning_altmin.data import DigitsDataModule, ResumableLoader


def all_of(loader: ResumableLoader) -> tuple[torch.Tensor, torch.Tensor]:
    """All batches of a loader in one."""
    batches = list(loader)
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def ready(**settings: object) -> DigitsDataModule:
    """A data module that is set up."""
    data = DigitsDataModule(**settings)  # type: ignore[arg-type]
    data.setup("fit")
    return data


def rows(x: torch.Tensor) -> list[tuple[float, ...]]:
    """Images as a sorted list of vectors, to compare data sets whatever their order."""
    return sorted(map(tuple, x.flatten(1).tolist()))


def test_parts_make_up_the_data_set_and_the_test_part_is_a_stratified_fifth() -> None:
    """Catches samples in two parts or in none, and a test set in which a class is rare."""
    data = ready(val_split=0.25)
    parts = [all_of(data.train_dataloader()), all_of(data.val_dataloader()), all_of(data.test_dataloader())]
    # 20 % of 1797, rounded up as scikit-learn does; a quarter of the other 1437, rounded
    assert [len(y) for _, y in parts] == [1078, 359, 360]
    digits = load_digits()
    pixels = torch.tensor(digits.images).flatten(1)
    together = torch.cat([x for x, _ in parts])
    # normalisation is the same increasing map for every pixel, so undoing it by the extremes gives the pixels back
    undone = (together - together.min()) / (together.max() - together.min()) * 16
    assert rows(undone.round()) == rows(pixels)
    share = torch.bincount(parts[2][1], minlength=10) / torch.bincount(torch.tensor(digits.target), minlength=10)
    # stratified: off by less than one sample of the 174 to 183 of a class
    assert torch.all((share - 360 / 1797).abs() < 1 / 174)


def test_training_pixels_have_mean_0_and_deviation_1() -> None:
    """Catches statistics that include held-out images: then the training pixels are slightly off."""
    x, _ = all_of(ready(val_split=0.5).train_dataloader())
    assert float(x.double().mean()) == pytest.approx(0, abs=1e-6)
    assert float(x.double().std(correction=0)) == pytest.approx(1, abs=1e-6)


def test_split_depends_on_its_seed_only() -> None:
    """Catches a validation split drawn from the global generator: a resumed run would train on other samples."""
    first = rows(all_of(ready(val_split=100, split_seed=1).val_dataloader())[0])
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = rows(all_of(ready(val_split=100, split_seed=1).val_dataloader())[0])
    other = rows(all_of(ready(val_split=100, split_seed=2).val_dataloader())[0])
    assert torch.equal(torch.get_rng_state(), before)
    assert len(first) == 100
    assert [row[0] for row in first] == pytest.approx([row[0] for row in again])
    assert first == again
    assert first != other


def test_test_set_never_changes() -> None:
    """Catches a test set that depends on seeds: results of different runs could not be compared."""
    torch.manual_seed(1)
    first = all_of(ready(split_seed=1).test_dataloader())
    torch.manual_seed(2)
    second = all_of(ready(split_seed=2).test_dataloader())
    assert torch.equal(first[1], second[1])
    assert torch.equal(first[0], second[0])


@pytest.mark.parametrize("flatten", [True, False])
def test_shapes_are_those_announced(flatten: bool) -> None:
    """Catches `input_shape` or `num_classes` that a network built from them does not fit."""
    data = ready(flatten=flatten, batch_size=10)
    x, y = next(iter(data.train_dataloader()))
    assert x.shape[1:] == data.input_shape
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert set(all_of(data.test_dataloader())[1].tolist()) == set(range(data.num_classes))


def test_loaders_follow_the_settings() -> None:
    """Catches batch sizes or drop_last that do not reach the loaders, and evaluation that drops samples."""
    data = ready(batch_size=500, eval_batch_size=100, drop_last=True, val_split=150)
    assert [len(y) for _, y in data.train_dataloader()] == [500, 500]  # of 1287
    assert [len(y) for _, y in data.val_dataloader()] == [100, 50]
    assert [len(y) for _, y in data.test_dataloader()] == [100, 100, 100, 60]
    assert [len(y) for _, y in data.predict_dataloader()] == [100, 100, 100, 60]


@pytest.mark.parametrize("val_split", [-0.1, 1.0, 1.5, -1, float("nan"), float("inf"), True, "0.1"])
def test_impossible_val_split_is_refused_at_once(val_split: object) -> None:
    """Catches a share beyond the data, or a percentage, taken for something."""
    with pytest.raises(ValueError, match="val_split"):
        DigitsDataModule(val_split=val_split)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val_split": 1437}, "leaves no training samples"),
        ({"val_split": 1e-9}, "holds out no sample"),
        ({"batch_size": 2000, "drop_last": True}, "no training batch"),
    ],
)
def test_split_that_leaves_nothing_is_refused(settings: dict[str, object], message: str) -> None:
    """Catches empty parts, which would train or validate on nothing without a word."""
    with pytest.raises(ValueError, match=message):
        ready(**settings)


@pytest.mark.parametrize("name", ["batch_size", "eval_batch_size"])
def test_batch_sizes_must_be_positive(name: str) -> None:
    """Catches a batch size of 0 that would only fail, strangely, in training."""
    with pytest.raises(ValueError, match=f"{name} must be an integer >= 1"):
        DigitsDataModule(**{name: 0})


def test_loaders_before_setup_are_refused() -> None:
    """Catches an error about None deep inside when `setup` was forgotten."""
    with pytest.raises(RuntimeError, match=r"call setup\(\) of DigitsDataModule"):
        DigitsDataModule().train_dataloader()


def test_missing_scikit_learn_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a bare import error that does not say what to install."""
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"lightning_altmin\[examples\]"):
        DigitsDataModule().setup()
