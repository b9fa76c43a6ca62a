"""The command line: a whole run, its checkpoints, every setting through YAML, and errors that can be read."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_altmin import AltMinModule, AltMinObjective, BackpropModule, GradientCodes, LocalGradient
from lightning_altmin.callbacks import CodeMonitor, CompareToBackprop, CompareWithTwin, MuSchedule
from lightning_altmin.cli import AltMinCLI, main
from lightning_altmin.data import DigitsDataModule
from lightning_altmin.strategies import LayerParallelStrategy

EXAMPLES = Path(__file__).parents[2] / "examples"
QUIET = [
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.accelerator=cpu",
]

# Lightning's advice when a checkpoint of one folder is used in another.
pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed from")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-altmin"])


def checkpoint(folder: Path) -> Path:
    """The only checkpoint below a folder."""
    (path,) = folder.rglob("*.ckpt")
    return path


def write(folder: Path, name: str, text: str) -> str:
    """Write a file and give its path as an argument."""
    (folder / name).write_text(text)
    return str(folder / name)


@pytest.mark.parametrize(
    ("name", "sizes", "data"),
    [
        ("digits", [64, 10], "DigitsDataModule"),
        ("mnist_mlp", [784, 100, 100, 10], "VisionDataModule"),
        ("mnist_memory", [784, 500, 500, 10], "VisionDataModule"),
        ("mnist_rows", [78, 50, 10], "VisionDataModule"),
        ("mnist_lenet", [256, 120, 84, 10], "VisionDataModule"),
        ("cifar10_mlp", [3072, 500, 500, 10], "VisionDataModule"),
        ("cifar10_conv", [2048, 10], "ImageFolderDataModule"),
        ("higgs", [28, 300, 300, 2], "HiggsDataModule"),
    ],
)
def test_every_example_makes_what_it_says(name: str, sizes: list[int], data: str) -> None:
    """Would catch a misspelt argument or class path in an example whose data is not here, or another network."""
    cli = AltMinCLI(["--config", str(EXAMPLES / f"{name}.yaml")], run=False)
    assert type(cli.model) is AltMinModule
    linear = [m for m in cli.model.network.modules() if isinstance(m, nn.Linear)]
    made = [linear[0].in_features, *(layer.out_features for layer in linear)]
    assert (made[0], made[-1]) == (sizes[0], sizes[-1])
    assert name == "digits" or made == sizes
    assert type(cli.datamodule).__name__ == data
    assert any(isinstance(callback, CompareWithTwin) for callback in cli.trainer.callbacks)


def test_examples_are_all_tested() -> None:
    """Would catch an example added without a test."""
    names = {path.stem for path in EXAMPLES.glob("*.yaml")}
    networks = {"mnist_mlp", "mnist_memory", "mnist_rows", "mnist_lenet", "cifar10_mlp", "cifar10_conv"}
    assert names == networks | {"digits", "higgs", "layer_parallel"}


def test_the_layer_parallel_example_makes_what_it_says() -> None:
    """Would catch a strategy that its registered name does not find, and one that is given other processes."""
    cli = AltMinCLI(["--config", str(EXAMPLES / "layer_parallel.yaml")], run=False)
    assert isinstance(cli.trainer.strategy, LayerParallelStrategy)
    assert cli.trainer.world_size == 2


def test_fit_digits_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Would catch a README command that does not train, does not print the table, or writes outside lightning_logs.

    Ten classes: an untrained network is right for a tenth of the digits.
    """
    main(["fit", "--config", str(EXAMPLES / "digits.yaml"), "--trainer.max_epochs=1", *QUIET])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(("AltMin", "backprop"))]
    assert [row[:3] for row in rows] == [["AltMin,", "Adam", "0.002"], ["backprop,", "Adam", "0.002"]]
    assert all(float(row[3]) > 0.5 for row in rows)
    assert [path.name for path in tmp_path.iterdir()] == ["lightning_logs"]


def fit(folder: Path, *more: str) -> Path:
    """A short run on digits without the twin; its checkpoint."""
    main(
        [
            "fit",
            *("--config", str(EXAMPLES / "digits.yaml"), "--trainer.callbacks=null", "--trainer.max_epochs=1"),
            *("--trainer.limit_train_batches=5", *QUIET, *more),
        ]
    )
    return checkpoint(folder)


def test_checkpoints_need_no_argument(tmp_path: Path) -> None:
    """Would catch a checkpoint that needs the network's arguments again, or cannot be read safely."""
    path = fit(tmp_path)
    saved = torch.load(path, weights_only=True)
    model = AltMinModule.load_from_checkpoint(path)
    assert repr(model.network) == repr(AltMinCLI(["--config", str(EXAMPLES / "digits.yaml")], run=False).model.network)
    assert all(torch.equal(value, saved["state_dict"][name]) for name, value in model.state_dict().items())
    assert int(saved["global_step"]) == 5


def test_checkpoint_keeps_every_setting(tmp_path: Path) -> None:
    """Would catch a setting that falls back to its default when the checkpoint is loaded."""
    path = fit(
        tmp_path,
        *("--model.init_args.objective=AltMinObjective", "--model.init_args.objective.init_args.mu=0.25"),
        *("--model.init_args.codes=GradientCodes", "--model.init_args.codes.init_args.steps=3"),
        *("--model.init_args.loss=torch.nn.CrossEntropyLoss", "--model.init_args.loss.init_args.label_smoothing=0.125"),
        *("--model.init_args.gradient_clip_norm=2.5", "--model.init_args.nonfinite=skip"),
    )
    model = AltMinModule.load_from_checkpoint(path)
    assert float(model.core.objective.mu) == 0.25
    assert isinstance(model.core.codes, GradientCodes)
    assert model.core.codes.steps == 3
    assert model.core.loss.label_smoothing == 0.125
    assert model.gradient_clip_norm == 2.5
    assert model.core.guard.policy == "skip"


def test_other_subcommands_take_the_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Would catch a checkpoint that the command line itself cannot test, validate or predict with."""
    path = fit(tmp_path, "--data.init_args.val_split=0.2")
    common = ["--config", str(EXAMPLES / "digits.yaml"), "--trainer.logger=false", *QUIET, "--ckpt_path", str(path)]
    capsys.readouterr()
    main(["test", *common])
    assert "test_acc" in capsys.readouterr().out
    main(["validate", *common, "--data.init_args.val_split=0.2"])
    assert "val_acc" in capsys.readouterr().out
    main(["predict", *common, "--return_predictions=false"])


def test_resume_from_the_command_line(tmp_path: Path) -> None:
    """Would catch a checkpoint that fit does not go on from."""
    path = fit(tmp_path, "--trainer.default_root_dir=first")
    again = ["--trainer.max_epochs=2", "--trainer.default_root_dir=second", f"--ckpt_path={path}"]
    main(["fit", "--config", str(EXAMPLES / "digits.yaml"), "--trainer.callbacks=null", *QUIET, *again])
    assert int(torch.load(checkpoint(tmp_path / "second"), weights_only=True)["epoch"]) == 1


LAYERS = """
model:
  class_path: lightning_altmin.AltMinModule
  init_args:
    network: {class_path: lightning_altmin.nn.MLP, init_args: {in_features: 64, hidden: [7, 6], out_features: 10}}
    loss: {class_path: torch.nn.CrossEntropyLoss, init_args: {label_smoothing: 0.1}}
    objective: {class_path: lightning_altmin.AltMinObjective, init_args: {mu: 0.5, lambda_c: 0.01}}
    codes: {class_path: lightning_altmin.GradientCodes, init_args: {steps: 5, lr: 0.3, momentum: 0.9, nesterov: true}}
    weights:
      class_path: lightning_altmin.LocalGradient
      init_args:
        steps: 2
        optimizer:
          "1": {class_path: torch.optim.SGD, init_args: {lr: 0.5, momentum: 0.8}}
          default: {class_path: torch.optim.Adam, init_args: {lr: 0.004}}
    metrics:
      acc: {class_path: torchmetrics.classification.MulticlassAccuracy, init_args: {num_classes: 10}}
    lr_scheduler: {class_path: torch.optim.lr_scheduler.StepLR, init_args: {step_size: 3}}
    gradient_clip_norm: {"1": 1.0}
data: {class_path: lightning_altmin.data.DigitsDataModule, init_args: {batch_size: 16}}
trainer:
  callbacks:
    - {class_path: lightning_altmin.callbacks.MuSchedule, init_args: {multiply: 2.0, maximum: 1.0, every: step}}
    - {class_path: lightning_altmin.callbacks.CodeMonitor, init_args: {every_n_steps: 10}}
    - {class_path: lightning_altmin.callbacks.CompareToBackprop, init_args: {every_n_steps: 10}}
    - class_path: lightning_altmin.callbacks.CompareWithTwin
      init_args: {optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1}}}
"""


def test_every_argument_through_yaml(tmp_path: Path) -> None:
    """Would catch an argument whose type the command line cannot read, optimizers of single layers among them."""
    cli = AltMinCLI(["--config", write(tmp_path, "layers.yaml", LAYERS)], run=False)
    model = cli.model
    assert isinstance(model.core.objective, AltMinObjective)
    assert (float(model.core.objective.mu), model.core.objective.lambda_c) == (0.5, 0.01)
    assert (model.core.codes.steps, float(model.core.codes.lr)) == (5, 0.3)
    assert isinstance(model.core.weights, LocalGradient)
    assert model.core.weights.steps == 2
    children = model.core.make_optimizer().children
    assert type(children["1"]) is torch.optim.SGD
    assert (children["1"].defaults["lr"], children["1"].defaults["momentum"]) == (0.5, 0.8)
    assert type(children["default"]) is torch.optim.Adam
    assert [group["name"] for group in children["default"].param_groups] == ["3", "5"]
    schedule = model._scheduler_factory(children["1"])
    assert (type(schedule), schedule.step_size) == (torch.optim.lr_scheduler.StepLR, 3)
    kinds = {type(callback) for callback in cli.trainer.callbacks}
    assert kinds >= {MuSchedule, CodeMonitor, CompareToBackprop, CompareWithTwin}
    assert isinstance(cli.datamodule, DigitsDataModule)
    assert cli.datamodule.batch_size == 16


def test_saved_configuration_is_the_run(tmp_path: Path) -> None:
    """Would catch a saved config.yaml that does not repeat the run: reading it and saving it again changes nothing."""
    short = ["--trainer.max_steps=2", "--trainer.max_epochs=1", *QUIET]
    first = ["fit", "--config", write(tmp_path, "layers.yaml", LAYERS), *short]
    main([*first, "--trainer.default_root_dir=first"])
    (saved,) = (tmp_path / "first").rglob("config.yaml")
    main(["fit", "--config", str(saved), "--trainer.default_root_dir=second"])
    (again,) = (tmp_path / "second").rglob("config.yaml")
    configurations = [yaml.safe_load(path.read_text()) for path in (saved, again)]
    for configuration in configurations:
        configuration["trainer"].pop("default_root_dir")
    assert configurations[0] == configurations[1]
    one, other = (
        torch.load(checkpoint(tmp_path / run), weights_only=True)["state_dict"] for run in ("first", "second")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_altmin_module_is_the_default_model() -> None:
    """Would catch a model class that has to be named where the recommended one is meant."""
    network = ["--model.network=lightning_altmin.nn.MLP", "--model.network.in_features=64"]
    sizes = ["--model.network.hidden=[8]", "--model.network.out_features=10"]
    cli = AltMinCLI([*network, *sizes, "--data=DigitsDataModule"], run=False)
    assert type(cli.model) is AltMinModule
    assert cli.config.seed_everything == 0


def test_the_twin_is_one_flag_away() -> None:
    """Would catch a twin that needs other arguments for the same network."""
    network = ["--model.network=lightning_altmin.nn.MLP", "--model.network.in_features=64"]
    sizes = ["--model.network.hidden=[8]", "--model.network.out_features=10"]
    cli = AltMinCLI(["--model=BackpropModule", *network, *sizes, "--data=DigitsDataModule"], run=False)
    assert type(cli.model) is BackpropModule


class OwnNet(AltMinModule):
    """A user's subclass with an argument of its own."""

    def __init__(self, width: int = 5) -> None:
        super().__init__(nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10)))


class OwnModule(LightningModule):
    """A user's module that has nothing to do with this package, and saves its arguments itself."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(64, width)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class OwnData(LightningDataModule):
    """A user's data module."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.randn(8, 64), torch.arange(8)), 4)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.parametrize("own", [OwnNet, OwnModule])
def test_modules_of_the_user_s_own(tmp_path: Path, own: Any) -> None:
    """Would catch a command line for this package's classes only, or a subclass whose checkpoints need arguments."""
    here = f"{OwnNet.__module__}"
    sys.modules.setdefault(here, sys.modules[__name__])
    arguments = [f"--model={here}.{own.__name__}", "--model.width=9", f"--data={here}.OwnData"]
    main(["fit", *arguments, "--trainer.max_epochs=1", "--trainer.log_every_n_steps=1", *QUIET])
    loaded = own.load_from_checkpoint(checkpoint(tmp_path))
    assert next(loaded.parameters()).shape == (9, 64)


def test_without_the_command_line_nothing_is_saved_as_argument(tmp_path: Path) -> None:
    """Would catch networks and optimizers pickled into the checkpoints of plain Trainer runs."""
    model = AltMinModule(nn.Sequential(nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 10)))
    run = Trainer(max_steps=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    run.fit(model, datamodule=DigitsDataModule())
    assert "hyper_parameters" not in torch.load(checkpoint(tmp_path), weights_only=True)


def test_a_missing_data_folder_is_the_last_line(tmp_path: Path) -> None:
    """Would catch an error that does not say which folder is missing and what to do."""
    folder = tmp_path / "nowhere"
    arguments = ["--config", str(EXAMPLES / "cifar10_conv.yaml"), f"--data.init_args.root={folder}", *QUIET]
    with pytest.raises(FileNotFoundError, match=r"nowhere"):
        main(["fit", *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=lightning_altmin.NoModule"], "NoModule"),
        (["--model.network=lightning_altmin.nn.MLP", "--model.network.hiden=[8]"], "hiden"),
        (["--model.accumulate_batches=many"], "accumulate_batches"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Would catch a traceback for a typing mistake."""
    with pytest.raises(SystemExit) as stop:
        main(["fit", *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_python_dash_m(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Would catch a package that cannot be run, or a command line that does not see modules of the working folder."""
    Path("mine.py").write_text(
        "from torch import nn\nfrom lightning_altmin import AltMinModule\n\n\nclass Mine(AltMinModule):\n"
        "    def __init__(self, width: int):\n"
        "        super().__init__(nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10)))\n"
    )
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(Path.cwd()))])
    arguments = ["fit", "--model=mine.Mine", "--model.width=4", "--print_config"]
    monkeypatch.setattr(sys, "argv", ["lightning_altmin", *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("lightning_altmin", run_name="__main__")
    assert not stop.value.code
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"] == {"class_path": "mine.Mine", "init_args": {"width": 4}}
