"""A small module that records what it is trained on, and a run that is saved, resumed and compared."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

Step = tuple[list[int], float, float]  # sample ids, checksum of the augmented batch, a draw of the global generator


class Recorder(LightningModule):
    """Records every training batch; draws from the global generator as dropout would; restores it on resume."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(features, 1)
        self.steps: list[Step] = []
        self._random_state: torch.Tensor | None = None

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        weights = torch.arange(1, x[0].numel() + 1, dtype=torch.float64)
        checksum = float((x.flatten(1).double() * weights).sum())
        self.steps.append((y.flatten().long().tolist(), checksum, float(torch.rand(()))))
        return self.linear(x.flatten(1)).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["random_state"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._random_state = checkpoint["random_state"]

    def on_fit_start(self) -> None:
        # the last hook before the Trainer makes the loader's first iterator
        if self._random_state is not None:
            torch.set_rng_state(self._random_state)

    def on_train_start(self) -> None:
        # After a checkpoint of the last batch of an epoch, Lightning 2.6 begins the next epoch without counting it as
        # begun; a checkpoint written in it would then be taken for one of a finished epoch.
        loop = self.trainer.fit_loop
        if loop.restarted_mid_epoch and loop.epoch_progress.current.ready == loop.epoch_progress.current.processed:
            loop.epoch_progress.increment_ready()
            loop.epoch_progress.increment_started()


class SaveAt(Callback):
    """Saves one checkpoint, in the ``call``-th call of a hook, and notes how many batches were trained by then."""

    def __init__(self, hook: str, call: int, path: Path) -> None:
        self.path = path
        self.trained = -1
        calls = 0

        def save(trainer: Trainer, module: Recorder, *rest: Any) -> None:
            nonlocal calls
            if trainer.sanity_checking:
                return
            calls += 1
            if calls == call:
                trainer.save_checkpoint(path)
                self.trained = len(module.steps)

        setattr(self, hook, save)


class FailAt(Callback):
    """Fails one training step before anything is changed, and saves as a checkpoint callback does on exceptions."""

    class StepError(Exception):
        """What the step fails with."""

    def __init__(self, call: int, path: Path) -> None:
        self.path = path
        self._calls_left = call

    def on_train_batch_start(self, *_: Any) -> None:
        self._calls_left -= 1
        if self._calls_left == 0:
            raise self.StepError

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        trainer.save_checkpoint(self.path)


def fit(
    data: LightningDataModule, features: int, seed: int, callbacks: list[Callback], ckpt: Path | None, **flags: Any
) -> Recorder:
    """Train a fresh module, from a checkpoint if one is given, on one CPU process."""
    torch.manual_seed(seed)
    module = Recorder(features)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        **flags,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=True if ckpt else None)
    return module


def steps_after_resume(
    make_data: Callable[[], LightningDataModule], features: int, hook: str, call: int, folder: Path, **flags: Any
) -> tuple[list[Step], list[Step]]:
    """Train without interruption, saving on the way; then resume with everything new and another seed.

    Returns:
        The steps the first run made after the save, and those of the resumed run.
    """
    saver = SaveAt(hook, call, folder / "saved.ckpt")
    whole = fit(make_data(), features, 1, [saver], None, **flags)
    assert saver.trained >= 0, "the checkpoint was never saved"
    resumed = fit(make_data(), features, 2, [], saver.path, **flags)
    return whole.steps[saver.trained :], resumed.steps
