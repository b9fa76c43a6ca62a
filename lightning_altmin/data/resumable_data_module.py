"""What all our data modules share towards the Trainer, whatever their data."""

from abc import ABC, abstractmethod
from typing import Literal

from lightning.pytorch import LightningDataModule

from lightning_altmin.data.resumable_loader import ResumableLoader
from lightning_altmin.trainer.progress import TrainingProgress, training_progress

EvaluationPart = Literal["val", "test"]


class ResumableDataModule(LightningDataModule, ABC):
    """Data module whose train loader resumes after the last trained batch.

    A subclass reads its data in ``read`` and makes loaders in ``make_train_loader`` and ``make_eval_loader``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._is_read = False
        self._handed_out: dict[str, ResumableLoader] = {}  # the latest loader of each part

    @abstractmethod
    def read(self) -> None:
        """Read or inspect the data and check that a training batch is left; called once, by the first ``setup``."""

    @abstractmethod
    def make_train_loader(self, shuffle: bool, progress: TrainingProgress | None) -> ResumableLoader:
        """Make the train loader.

        Args:
            shuffle: False where the same batches must come every epoch, however the data module shuffles otherwise.
            progress: to be handed to the loader.
        """

    @abstractmethod
    def make_eval_loader(self, part: EvaluationPart) -> ResumableLoader | None:
        """Make the loader of validation or test data, in fixed order; None if there is no such data."""

    @property
    def has_validation(self) -> bool:
        """Whether there is validation data; known after ``setup``."""
        return self._loader("val") is not None

    def setup(self, stage: str | None = None) -> None:
        """Read the data; later calls do not read again.

        Args:
            stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
        """
        if not self._is_read:
            self.read()
            self._is_read = True
        if stage == "fit" and not self.has_validation:
            # The Trainer asks whether the hook is overridden to know if there is validation; an empty list of loaders
            # it takes for a loader without batches, and warns.
            self.val_dataloader = super().val_dataloader  # type: ignore[method-assign]
        else:
            self.__dict__.pop("val_dataloader", None)

    def train_dataloader(self) -> ResumableLoader:
        """Training batches ``(x, y)``.

        With ``Trainer(overfit_batches=...)`` they are not shuffled, so that the same ones come every epoch.

        Raises:
            RuntimeError: before ``setup``, or under a Trainer with several processes if the data can serve one only.
            ValueError: if there are too few samples in the last batch for that many processes.
        """
        self._check_read()
        overfit = getattr(self.trainer, "overfit_batches", 0) > 0  # getattr: there may be no trainer
        loader = self.make_train_loader(not overfit, training_progress(self.trainer))
        self._share(loader)
        self._handed_out["train"] = loader
        return loader

    def val_dataloader(self) -> ResumableLoader:
        """Validation batches in fixed order.

        Raises:
            RuntimeError: before ``setup``, or if there is no validation data.
        """
        return self._existing("val")

    def test_dataloader(self) -> ResumableLoader:
        """Test batches in fixed order.

        Raises:
            RuntimeError: before ``setup``, or if there is no test data.
        """
        return self._existing("test")

    def predict_dataloader(self) -> ResumableLoader:
        """The test batches, targets included.

        Raises:
            RuntimeError: before ``setup``, or if there is no test data.
        """
        return self._existing("test")

    def teardown(self, stage: str | None = None) -> None:
        """Release workers and files of epochs that were not finished.

        Args:
            stage: not used.
        """
        for loader in self._handed_out.values():
            loader.close()
        self._handed_out.clear()

    def _loader(self, part: EvaluationPart) -> ResumableLoader | None:
        self._check_read()
        return self.make_eval_loader(part)

    def _share(self, loader: ResumableLoader) -> None:
        """Under a strategy that shares batches among processes, each gets its part of every batch."""
        # What Lightning gives its own samplers: one replica where every process reads the whole of every batch.
        dealt = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        if dealt is not None and dealt["num_replicas"] > 1:
            loader.share(dealt["rank"], dealt["num_replicas"])

    def _existing(self, part: EvaluationPart) -> ResumableLoader:
        loader = self._loader(part)
        if loader is None:
            name = {"val": "validation", "test": "test"}[part]
            raise RuntimeError(f"this {type(self).__name__} was set up without {name} data: see its arguments for it")
        self._share(loader)
        self._handed_out[part] = loader
        return loader

    def _check_read(self) -> None:
        if not self._is_read:
            raise RuntimeError(f"call setup() of {type(self).__name__} before asking for its loaders")
