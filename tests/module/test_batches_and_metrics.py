"""What goes in and what is logged: layouts of a batch, kinds of targets, metrics against their definitions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_altmin import AltMinModule, AltMinObjective, BackpropModule
from tests.module.problems import loader, network, samples, trainer

MODULES = [AltMinModule, BackpropModule]


class Dictionaries(Dataset[dict[str, Tensor]]):
    def __init__(self, x_key: str, y_key: str) -> None:
        self.x, self.y = samples(12)
        self.keys = x_key, y_key

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {self.keys[0]: self.x[index], self.keys[1]: self.y[index]}


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("keys", [("x", "y"), ("image", "label"), ("input", "target")])
def test_dictionaries_train_as_pairs(kind: Any, keys: tuple[str, str]) -> None:
    """Catches inputs taken for targets: both layouts of the same data must give the same weights."""
    results = []
    for data in (Dictionaries(*keys), TensorDataset(*samples(12))):
        module = kind(network())
        trainer(max_epochs=2).fit(module, DataLoader(data, batch_size=4))
        results.append(module.network.state_dict())
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"a": 1, "b": 2}, r"keys \['a', 'b'\].* Override unpack"),
        ({"x": 1, "image": 2, "y": 3}, "one of .* Override unpack"),
        ((1, 2, 3), "got tuple; override unpack"),
        (torch.zeros(3), "got Tensor; override unpack"),
    ],
)
def test_other_layouts_are_refused(batch: Any, message: str) -> None:
    """Catches a guess where two readings are possible."""
    with pytest.raises(TypeError, match=message):
        AltMinModule(network()).unpack(batch)


@pytest.mark.parametrize("kind", MODULES)
def test_logged_values_are_means_over_samples(kind: Any) -> None:
    """Catches means of batch means (the last batch is smaller), and values of the training mode."""
    module = kind(network(dropout=0.5))
    x, y = samples(10)
    fit = trainer(limit_val_batches=None)
    module.eval()
    with torch.no_grad():
        output = module(x)
    loss, accuracy = float(nn.functional.cross_entropy(output, y)), float((output.argmax(1) == y).float().mean())
    for name, evaluate in (("val", fit.validate), ("test", fit.test)):
        (logged,) = evaluate(module, DataLoader(TensorDataset(x, y), batch_size=4), verbose=False)
        assert logged[f"{name}_loss"] == pytest.approx(loss, rel=1e-6)
        assert logged[f"{name}_acc"] == pytest.approx(accuracy)


@pytest.mark.parametrize("kind", MODULES)
def test_logged_losses_are_those_of_all_samples_in_one_batch(kind: Any) -> None:
    """Catches batch means weighted by the number of samples where the loss weights classes and ignores labels, and a
    batch of ignored labels alone, whose mean is 0 / 0, that makes the whole epoch's loss NaN.
    """
    loss = nn.CrossEntropyLoss(torch.tensor([1.0, 9.0, 3.0]), ignore_index=-1)
    module = kind(network(), loss=loss)
    x, y = samples(12)
    y[[1, 4, 5, 6, 7]] = -1  # the second batch of four, and one label of the first
    with torch.no_grad():
        expected = float(loss(module.eval()(x), y))
    for size in (4, 12):
        (logged,) = trainer().test(module, DataLoader(TensorDataset(x, y), batch_size=size), verbose=False)
        assert logged["test_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_loss_of_ones_own_is_averaged_over_samples() -> None:
    """Catches an overridden ``batch_loss`` whose targets are read as those of the loss that it takes the place of."""

    class Masked(BackpropModule):
        def batch_loss(self, output: Tensor, y: Any) -> Tensor:
            return output.square().mean() + y["offset"].mean()

    module, x = Masked(network(), metrics={}), samples(10)[0]
    offset = torch.arange(10.0)
    data = DataLoader([{"x": x[i], "y": {"offset": offset[i]}} for i in range(10)], batch_size=4)  # type: ignore[arg-type]
    (logged,) = trainer().test(module, data, verbose=False)
    with torch.no_grad():
        expected = float(module.eval()(x).square().mean() + offset.mean())
    assert logged["test_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("stage", ["val", "test"])
def test_each_loader_has_a_loss_and_metrics_of_its_own(kind: Any, stage: str) -> None:
    """Catches loaders that are refused, or whose samples are counted together, also when the module is asked again."""
    module = kind(network()).eval()
    x, y = samples(9)
    with torch.no_grad():
        output = module(x)
        own = [float(nn.functional.cross_entropy(output[part], y[part])) for part in (slice(5), slice(5, 9))]
        right = [float((output.argmax(1) == y)[part].float().mean()) for part in (slice(5), slice(5, 9))]
    loaders = [DataLoader(TensorDataset(x[part], y[part]), batch_size=2) for part in (slice(5), slice(5, 9))]
    fit = trainer(limit_val_batches=None)
    for _ in range(2):
        found = (fit.validate if stage == "val" else fit.test)(module, loaders, verbose=False)
        for index, logged in enumerate(found):
            assert logged[f"{stage}_loss/dataloader_idx_{index}"] == pytest.approx(own[index], rel=1e-5)
            assert logged[f"{stage}_acc/dataloader_idx_{index}"] == pytest.approx(right[index])
    assert [len(part) for part in fit.predict(module, loaders)] == [3, 2]


def test_predictions_are_outputs_with_and_without_targets() -> None:
    """Catches targets fed to the network, and batches that prediction drops."""
    module = AltMinModule(network())
    x, y = samples(10)
    with torch.no_grad():
        expected = module.network(x)
    named = [{"image": row} for row in x]
    for data in (TensorDataset(x), TensorDataset(x, y), named):
        predicted = trainer().predict(module, DataLoader(data, batch_size=4))  # type: ignore[arg-type]
        torch.testing.assert_close(torch.cat(predicted), expected)


class Halved(AltMinModule):
    """Reads dictionaries in its own way, as a user may."""

    def unpack(self, batch: Any) -> tuple[Tensor, Any]:
        return batch["x"] / 2, batch["y"]


def test_predictions_read_a_batch_as_tests_do() -> None:
    """Catches a dictionary that is read around the user's ``unpack``, so that predictions are not what was tested."""
    module = Halved(network())
    x, y = samples(4)
    torch.testing.assert_close(module.predict_step({"x": x, "y": y}, 0), module.network(x / 2))
    with pytest.raises(TypeError, match=r"unpack of Halved .* keys \['x'\]: KeyError\('y'\)\. Override inputs_of"):
        module.predict_step({"x": x}, 0)
    with pytest.raises(TypeError, match=r"keys .'a'.*needed to predict. Override inputs_of"):
        AltMinModule(network()).predict_step({"a": x}, 0)

    class Both(Halved):
        def inputs_of(self, batch: Any) -> Tensor:
            x: Tensor = batch["x"] / 2
            return x

    torch.testing.assert_close(Both(network()).predict_step({"x": x}, 0), module.network(x / 2))


def accuracy_of(loss: Any, output: Tensor, target: Tensor) -> float:
    module = AltMinModule(network(), loss=loss)
    module.val_metrics.update(output, target)
    return float(module.val_metrics.compute()["val_acc"])


def test_default_accuracies() -> None:
    """Catches logits in [0, 1] taken for probabilities, ignored targets counted, and soft targets refused."""
    logits = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.3, 0.1], [0.0, 0.1, 0.4], [5.0, 0.0, 0.0]])
    labels = torch.tensor([0, 1, 0, 0])
    for loss in (nn.CrossEntropyLoss(), nn.functional.cross_entropy, nn.NLLLoss(), nn.functional.nll_loss):
        assert accuracy_of(loss, logits, labels) == 0.75
    assert accuracy_of(nn.CrossEntropyLoss(ignore_index=1), logits, labels) == pytest.approx(2 / 3)
    ignored = torch.tensor([0, 1, -100, 0])
    for loss in (nn.CrossEntropyLoss(), nn.functional.cross_entropy, nn.functional.nll_loss):
        assert accuracy_of(loss, logits, ignored) == 1.0
    assert accuracy_of(nn.CrossEntropyLoss(), logits, nn.functional.one_hot(labels, 3).float()) == 0.75
    binary = torch.tensor([[0.3], [0.7], [-0.1], [2.0]])  # all but the third are logits above 0
    for loss in (nn.BCEWithLogitsLoss(), nn.functional.binary_cross_entropy_with_logits):
        assert accuracy_of(loss, binary, torch.tensor([[1.0], [0.0], [0.0], [1.0]])) == 0.75


def test_no_accuracy_for_regression() -> None:
    """Catches an accuracy of real numbers; the loss is logged alone, unless a metric is asked for."""
    module = AltMinModule(network(outputs=2), loss=nn.MSELoss())
    x, _ = samples(8)
    data = DataLoader(TensorDataset(x, x[:, :2]), batch_size=4)
    trainer(max_epochs=1).fit(module, data)
    (logged,) = trainer().test(module, data, verbose=False)
    assert set(logged) == {"test_loss"}


METRICS: dict[str, tuple[Any, str]] = {
    "one": (torchmetrics.MeanAbsoluteError(), "test_acc"),
    "dictionary": ({"mae": torchmetrics.MeanAbsoluteError()}, "test_mae"),
    "collection": (torchmetrics.MetricCollection({"error": torchmetrics.MeanAbsoluteError()}), "test_error"),
}


@pytest.mark.parametrize("name", METRICS)
def test_metrics_of_ones_own(name: str) -> None:
    """Catches metrics that are dropped, or computed per batch."""
    metrics, logged_name = METRICS[name]
    module = AltMinModule(network(outputs=2), loss=nn.MSELoss(), metrics=metrics)
    x, _ = samples(10)
    with torch.no_grad():
        expected = float((module.network(x) - x[:, :2]).abs().mean())
    (logged,) = trainer().test(module, DataLoader(TensorDataset(x, x[:, :2]), batch_size=4), verbose=False)
    assert logged[logged_name] == pytest.approx(expected, rel=1e-5)


def test_other_metrics_are_refused() -> None:
    """Catches a function, or a class that was not instantiated, that would fail in the first validation."""
    with pytest.raises(TypeError, match="metrics must be a torchmetrics Metric"):
        AltMinModule(network(), metrics=torchmetrics.MeanAbsoluteError)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", MODULES)
def test_a_checkpoint_is_loaded_with_its_network(kind: Any, tmp_path: Path) -> None:
    """Catches weights that are not restored, and a network of other shapes loaded as far as it fits."""
    module, fit = kind(network()), trainer(max_epochs=1)
    fit.fit(module, loader())
    fit.save_checkpoint(tmp_path / "a.ckpt")
    again = kind.load_from_checkpoint(tmp_path / "a.ckpt", network=network(seed=5))
    torch.testing.assert_close(again.network.state_dict(), module.network.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"belongs to another network.*network\.4\.weight"):
        kind.load_from_checkpoint(tmp_path / "a.ckpt", network=network(outputs=7))
    normed = nn.Sequential(*network(seed=5), nn.BatchNorm1d(3))
    with pytest.warns(UserWarning, match="not in the checkpoint"):
        grown = kind.load_from_checkpoint(tmp_path / "a.ckpt", network=normed, strict=False)
    for name, value in module.network.state_dict().items():
        assert torch.equal(grown.network.state_dict()[name], value)
    with pytest.raises(ValueError, match="trained with loss="):
        kind.load_from_checkpoint(tmp_path / "a.ckpt", network=network(), loss=nn.CrossEntropyLoss(label_smoothing=0.1))


def test_a_checkpoint_is_of_its_l1_terms(tmp_path: Path) -> None:
    """Catches a new lambda_w that is said to be in force while the optimizer's groups have the old one."""
    module, fit = AltMinModule(network(), objective=AltMinObjective(lambda_w=0.001)), trainer(max_epochs=1)
    fit.fit(module, loader())
    fit.save_checkpoint(tmp_path / "a.ckpt")
    for terms, name in (({"lambda_w": 0.5}, "lambda_w"), ({"lambda_w": 0.001, "lambda_c": 0.1}, "lambda_c")):
        with pytest.raises(ValueError, match=f"trained with {name}="):
            AltMinModule.load_from_checkpoint(
                tmp_path / "a.ckpt", network=network(), objective=AltMinObjective(**terms)
            )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr_interval": "batch"}, "lr_interval must be 'epoch' or 'step', got 'batch'"),
        ({"lr_frequency": 0}, "lr_frequency must be an integer >= 1, got 0"),
    ],
)
def test_bad_settings_of_a_schedule(settings: dict[str, Any], message: str) -> None:
    """Catches a schedule that would never be stepped."""
    with pytest.raises(ValueError, match=message):
        AltMinModule(network(), **settings)


@pytest.mark.parametrize("kind", MODULES)
def test_a_schedule_must_be_a_factory(kind: Any) -> None:
    """Catches a number or a scheduler instance that would be called in fit, and a function that makes nothing."""
    instance = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(network().parameters(), 0.1), 1)
    for wrong in (3, instance):
        with pytest.raises(TypeError, match="lr_scheduler must be a function that makes a scheduler"):
            kind(network(), lr_scheduler=wrong)
    with pytest.raises(TypeError, match=r"lr_scheduler must return a scheduler .* returned None"):
        trainer(max_epochs=1).fit(kind(network(), lr_scheduler=lambda optimizer: None), loader())


def test_an_optimizer_must_be_a_factory() -> None:
    """Catches an optimizer instance where a function of parameters is asked for."""
    with pytest.raises(TypeError, match=r"network must be an nn\.Module, an instance and not its class, got <class"):
        BackpropModule(nn.Linear)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="optimizer must be a function of parameters"):
        BackpropModule(network(), optimizer=3)  # type: ignore[arg-type]
