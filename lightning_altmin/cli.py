"""The command line: ``lightning-altmin fit|validate|test|predict --config run.yaml``, and ``report RUN_DIR...``."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback

import lightning_altmin.callbacks
import lightning_altmin.data
import lightning_altmin.nn  # noqa: F401  (imported classes can be named without their module in a YAML file)
from lightning_altmin import report

_INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"


class SaveRunConfig(SaveConfigCallback):
    """Saves the whole configuration beside what a logger writes, in the folder of the run.

    Without a logger a run has no folder of its own, and the file would land in the working directory: there it could
    stand for another run, and Lightning refuses to start the next one beside it. Nothing is saved then.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save, once."""
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)


class AltMinCLI(LightningCLI):
    """LightningCLI for any model and data module by class path; `AltMinModule` where no model class is named.

    A run without ``seed_everything`` is seeded with 0. Checkpoints hold the model's arguments, so that
    ``AltMinModule.load_from_checkpoint(path)`` needs none.

    Args:
        args: Arguments instead of those of the command line: a list of strings, or a nested dictionary.
        run: ``False`` only makes `model`, `datamodule` and `trainer`; then ``args`` names no subcommand.
    """

    def __init__(self, args: ArgsType = None, run: bool = True) -> None:
        super().__init__(
            save_config_callback=SaveRunConfig,
            subclass_mode_model=True,
            subclass_mode_data=True,
            # The optimizers of layers are arguments of the model; a single one for all would replace them.
            auto_configure_optimizers=False,
            seed_everything_default=0,
            args=args,
            run=run,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Make `AltMinModule` the default model."""
        parser.set_defaults({"model": {"class_path": "lightning_altmin.AltMinModule"}})

    def after_instantiate_classes(self) -> None:
        """Let checkpoints hold the model's arguments as the files and the command line gave them.

        Lightning's ``save_hyperparameters`` in a constructor does that for modules that call it. Ours do not, because
        in a run without command line it would put the network itself into every checkpoint.
        """
        if isinstance(self.model, LightningModule) and not self.model.hparams:
            given: dict[str, Any] = json.loads(
                self.parser.dump(self.config, skip_link_targets=False, skip_none=False, format="json")
            )
            model = given.get(str(self.subcommand), given)["model"]
            arguments = {**model.get("init_args", {}), **model.get("dict_kwargs", {})}
            self.model.save_hyperparameters(
                {"_class_path": model["class_path"], **arguments, "_instantiator": _INSTANTIATOR}
            )


def main(args: ArgsType = None) -> None:
    """Entry point of ``lightning-altmin``.

    Args:
        args: Arguments instead of those of the command line.
    """
    words = sys.argv[1:] if args is None else args
    if isinstance(words, list) and words[:1] == ["report"]:  # not a Trainer's method: it needs no model
        report.main(words[1:])
        return
    # A console script does not see modules of the working directory, where the user's own networks are.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    AltMinCLI(args)
