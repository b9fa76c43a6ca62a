"""ImageFolderDataModule on small PNG folders (lossless, so that pixels can be compared exactly)."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_altmin.data import ImageFolderDataModule

CLASSES = ("ant", "bee", "cow")


def write_images(folder: Path, count: int, size: tuple[int, int] = (8, 6), seed: int = 0) -> list[np.ndarray]:
    """Write ``count`` images per class, in the order in which ImageFolder reads them."""
    generator = np.random.default_rng(seed)
    images = []
    for name in CLASSES:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            images.append(generator.integers(0, 256, (*size, 3), dtype=np.uint8))
            Image.fromarray(images[-1]).save(folder / name / f"{number}.png")
    return images


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four training and two test images of 8 x 6 pixels per class."""
    write_images(tmp_path / "train", 4, seed=1)
    write_images(tmp_path / "test", 2, seed=2)
    return tmp_path


def ready(root: Path, **settings: Any) -> ImageFolderDataModule:
    """A data module that is set up."""
    data = ImageFolderDataModule(root, **settings)
    data.setup("fit")
    return data


WAYS = [{"in_memory": True}, {"in_memory": False}, {"in_memory": False, "num_workers": 1}]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("flatten", [False, True])
def test_batches_are_the_images(root: Path, way: Mapping[str, Any], flatten: bool) -> None:
    """Catches height and width or channels mixed up, wrong labels, and ways of reading that differ."""
    data = ready(root, normalize=False, flatten=flatten, eval_batch_size=4, **way)
    batches = list(data.test_dataloader())
    expected = torch.from_numpy(np.stack(write_images(root / "copy", 2, seed=2))).permute(0, 3, 1, 2).double() / 255
    x = torch.cat([x for x, _ in batches])
    assert torch.allclose(x.double(), expected.flatten(1) if flatten else expected, atol=1e-6)
    assert torch.cat([y for _, y in batches]).tolist() == [0, 0, 1, 1, 2, 2]
    assert x.shape[1:] == data.input_shape
    assert data.num_classes == 3
    assert data.class_names == list(CLASSES)


@pytest.mark.parametrize("way", WAYS)
def test_normalised_by_the_training_part(root: Path, way: Mapping[str, Any]) -> None:
    """Catches statistics over all images, held-out ones included, or over other channels."""
    data = ready(root, val_split=3, **way)
    x = torch.cat([x for x, _ in data.train_dataloader()]).double()
    assert len(x) == 9
    assert x.mean((0, 2, 3)).tolist() == pytest.approx([0, 0, 0], abs=1e-6)
    assert x.std((0, 2, 3), correction=0).tolist() == pytest.approx([1, 1, 1], abs=1e-6)


def test_given_statistics_are_used(root: Path) -> None:
    """Catches given statistics that are measured over anyway."""
    plain, given = ready(root, normalize=False), ready(root, mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 4.0])
    raw, scaled = next(iter(plain.test_dataloader()))[0], next(iter(given.test_dataloader()))[0]
    for channel in range(3):
        expected = (raw[:, channel] - 0.1 * (channel + 1)) / 2**channel
        assert torch.allclose(scaled[:, channel], expected, atol=1e-6)


def test_streaming_and_memory_train_on_the_same_batches(root: Path) -> None:
    """Catches an order or an augmentation that depends on how the images are read, or by how many processes."""
    runs = []
    for way in WAYS:
        data = ready(root, batch_size=5, augment=True, **way)
        torch.manual_seed(4)
        runs.append([(x, y) for _ in range(2) for x, y in data.train_dataloader()])
    for other in runs[1:]:
        for (x1, y1), (x2, y2) in zip(runs[0], other, strict=True):
            assert torch.equal(x1, x2)
            assert torch.equal(y1, y2)


@pytest.mark.parametrize("workers", [0, 1])
def test_streaming_draws_once_per_epoch(root: Path, workers: int) -> None:
    """Catches the draw of every DataLoader iterator from the global generator, which breaks exact resume."""
    data = ready(root, in_memory=False, num_workers=workers, batch_size=5, mean=[0.5] * 3, std=[1.0] * 3)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(data.test_dataloader())
    assert torch.equal(torch.get_rng_state(), before)
    batches = iter(data.train_dataloader())
    next(batches)
    after = torch.get_rng_state()
    list(batches)
    assert torch.equal(torch.get_rng_state(), after)


def test_resumed_stream_reads_no_trained_image(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a resume that decodes all images it skips."""
    read: list[int] = []
    original = Image.open

    def counting(*args: Any, **kwargs: Any) -> Any:
        read.append(1)
        return original(*args, **kwargs)

    data = ready(root, in_memory=False, batch_size=4, normalize=False)
    loader = data.train_dataloader()
    batches = iter(loader)
    next(batches)
    next(batches)
    loader.load_state_dict(loader.state_dict())
    monkeypatch.setattr(Image, "open", counting)
    assert len(list(loader)) == 1
    assert len(read) == 4


@pytest.mark.parametrize("size", [5, (5, 7)])
@pytest.mark.parametrize("in_memory", [True, False])
def test_images_of_any_size_are_resized(root: Path, size: int | tuple[int, int], in_memory: bool) -> None:
    """Catches height and width exchanged, and images that keep their size."""
    write_images(root / "train", 1, size=(20, 10))
    data = ready(root, size=size, in_memory=in_memory)
    height, width = (size, size) if isinstance(size, int) else size
    assert next(iter(data.train_dataloader()))[0].shape[1:] == (3, height, width) == data.input_shape


def test_resizing_keeps_a_constant_image(root: Path) -> None:
    """Catches interpolation that changes brightness: a constant image must stay what it is."""
    for part in ("train", "test"):
        for name in CLASSES:
            Image.new("RGB", (9, 13), (10, 200, 77)).save(root / part / name / "0.png")
    data = ready(root, size=4, normalize=False)
    x = next(iter(data.test_dataloader()))[0][0]
    assert torch.allclose(x * 255, torch.tensor([10.0, 200.0, 77.0])[:, None, None].expand(3, 4, 4), atol=1e-4)


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("part", ["train", "test"])
def test_image_of_another_size_is_named(root: Path, part: str, in_memory: bool) -> None:
    """Catches a shape error inside a stacking routine that names no file."""
    Image.new("RGB", (9, 13)).save(root / part / "cow" / "1.png")

    def read_all() -> None:
        data = ready(root, in_memory=in_memory, normalize=False)
        list(data.train_dataloader())
        list(data.test_dataloader())

    with pytest.raises(ValueError, match=r"1\.png has height and width \(13, 9\) where .*\(8, 6\); give size"):
        read_all()


def test_different_classes_are_refused(root: Path) -> None:
    """Catches labels that mean different classes in training and testing: ImageFolder numbers each part by itself."""
    (root / "test" / "bee").rename(root / "test" / "bat")
    with pytest.raises(ValueError, match=r"missing \['bee'\], additional \['bat'\]"):
        ready(root)


def test_parts_may_be_missing_only_if_said_so(root: Path) -> None:
    """Catches a test set that is silently left out because of a misspelt folder."""
    with pytest.raises(FileNotFoundError, match=r"'[^']*tset' does not exist; set root"):
        ready(root, test="tset")
    data = ready(root, test=None)
    with pytest.raises(RuntimeError, match="without test data"):
        data.test_dataloader()
    assert not data.has_validation


def test_validation_folder(root: Path) -> None:
    """Catches a validation folder that is ignored, or combined with a split of the training images."""
    data = ready(root, val="test")
    assert len(next(iter(data.val_dataloader()))[1]) == 6
    with pytest.raises(ValueError, match="val_split=2 must be 0"):
        ready(root, val="test", val_split=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size must be"),
        ({"size": (3, 4, 5)}, "size must be"),
        ({"size": 2.5}, "size must be a positive int or a pair .* got 2.5"),
        ({"size": True}, "size must be a positive int or a pair .* got True"),
        ({"num_workers": -1}, "num_workers must be"),
        ({"mean": [0.5] * 3}, "given together"),
        ({"mean": [0.5] * 2, "std": [1.0] * 2}, "3 in all"),
        ({"mean": [0.5] * 3, "std": [1.0] * 3, "normalize": False}, "normalize=False"),
    ],
)
def test_bad_arguments_are_refused_at_once(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    """Catches settings that would fail, or be ignored, only after all images are read."""
    with pytest.raises(ValueError, match=message):
        ImageFolderDataModule(tmp_path, **settings)


@pytest.mark.parametrize("name", ["num_classes", "input_shape"])
def test_facts_before_setup_are_refused(tmp_path: Path, name: str) -> None:
    """Catches a network built for no classes, or of no size, because the folder was not yet looked at."""
    with pytest.raises(RuntimeError, match="after setup"):
        getattr(ImageFolderDataModule(tmp_path), name)


def test_augmentation_moves_by_at_most_an_eighth(tmp_path: Path) -> None:
    """Catches crops beyond the documented padding: a dot in the middle may move by one eighth of the shorter side."""
    for part in ("train", "test"):
        for name in CLASSES:
            (tmp_path / part / name).mkdir(parents=True)
            image = np.zeros((17, 33, 3), dtype=np.uint8)
            image[8, 16] = 255  # the centre, which mirroring keeps
            Image.fromarray(image).save(tmp_path / part / name / "0.png")
    data = ready(tmp_path, augment=True, normalize=False)
    reached = set()
    for _ in range(40):
        for x, _ in data.train_dataloader():
            reached.update(map(tuple, x[:, 0].nonzero()[:, 1:].tolist()))
    moves = {(row - 8, column - 16) for row, column in reached}
    assert max(max(abs(r), abs(c)) for r, c in moves) == 17 // 8
    # 120 draws of 25 places: fewer than 20 seen has probability below 1e-3, and the seed is fixed
    assert len(moves) >= math.ceil(25 * 0.8)
