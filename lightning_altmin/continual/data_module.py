"""The data of a whole stream for one ``trainer.fit``, task after task."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, Trainer

from lightning_altmin.arguments import check_count
from lightning_altmin.continual.replay import Replay
from lightning_altmin.continual.task import Task, TaskStream
from lightning_altmin.continual.task_hooks import EpochTaskHooks, TaskHooks
from lightning_altmin.continual.task_loader import Share, TaskLoader
from lightning_altmin.data.resumable_loader import Batch, ResumableLoader
from lightning_altmin.data.seeding import derived_generator
from lightning_altmin.trainer.progress import TrainerProgress

_SEED_BITS = 62


class StreamDataModule(LightningDataModule):
    """What both data modules of streams share; use `TaskStreamDataModule` or `OnlineTaskStreamDataModule`.

    Args:
        stream: The tasks.
        batch_size: New samples per training batch and process; replayed ones come on top.
        eval_batch_size: Samples per validation and test batch.
        replay: Adds stored samples to the batches.
        shuffle: Whether a task's samples come in random order.
        seed: Of the orders. Torch's global generator is not used, so ``seed_everything`` does not change them.

    Raises:
        TypeError: If ``stream`` is not a `TaskStream`, or ``replay`` not a `Replay`.
        ValueError: If a batch size is not positive.
    """

    def __init__(
        self,
        stream: TaskStream,
        batch_size: int = 32,
        eval_batch_size: int = 1000,
        replay: Replay | None = None,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(stream, TaskStream):
            raise TypeError(f"stream must be a TaskStream, got {type(stream).__name__}")
        if replay is not None and not isinstance(replay, Replay):
            raise TypeError(f"replay must be None or a Replay, such as Replay(ReservoirBuffer(1000)), got {replay!r}")
        check_count("batch_size", batch_size)
        check_count("eval_batch_size", eval_batch_size)
        self.stream = stream
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.replay = replay
        self.shuffle = shuffle
        self.seed = seed
        self._hooks: TaskHooks | None = None

    boundaries = True
    """Whether learning methods are told when a task begins and ends."""
    validates = False
    """Whether the Trainer validates between epochs."""

    @abstractmethod
    def trainer_kwargs(self) -> dict[str, Any]:
        """The arguments that the Trainer needs for this stream: ``Trainer(**data.trainer_kwargs(), ...)``."""

    @property
    @abstractmethod
    def task(self) -> Task:
        """The task that is trained on now."""

    @abstractmethod
    def make_hooks(self) -> TaskHooks:
        """The callback that calls ``on_task_start`` and ``on_task_end``."""

    @abstractmethod
    def check_trainer(self, trainer: Trainer) -> None:
        """Refuse a Trainer that would not train the stream as it is; here, one that counts steps.

        Raises:
            MisconfigurationException: Naming the flag and its right value.
        """
        if trainer.max_steps != -1 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise MisconfigurationException(
                f"Trainer(max_steps={trainer.max_steps}) would end wherever in the stream that step is; leave it out, "
                f"and for a part of the stream use {type(self).__name__}(stream.first(n))"
            )

    @property
    def num_classes(self) -> int:
        """Outputs that a classifier of the stream needs."""
        return self.stream.num_classes

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input as the network sees it, without the batch dimension."""
        return self.stream.input_shape

    def setup(self, stage: str | None = None) -> None:
        """Check the Trainer and begin the stream (a checkpoint, which is loaded later, moves to where it was)."""
        if stage != "fit" or self.trainer is None:
            return
        if getattr(self.trainer, "overfit_batches", 0):
            raise MisconfigurationException(
                "Trainer(overfit_batches=...) would train on one batch of one task for ever"
            )
        self.check_trainer(self.trainer)
        if not self.validates:
            # The Trainer asks whether the hook is overridden to know if there is validation.
            self.val_dataloader = super().val_dataloader  # type: ignore[method-assign]
        if self.replay is not None:
            self.replay.begin(self._share.rank, self._share.world)
        self._hooks = self.make_hooks()
        self._hooks.attach(self.trainer)

    def teardown(self, stage: str | None = None) -> None:
        """Give back the Trainer as it was."""
        if stage != "fit" or self.trainer is None:
            return
        if self.replay is not None:
            self.replay.finish()
        self._detach()

    def on_exception(self, exception: BaseException) -> None:
        """Give back the Trainer of a run that failed, after checkpoints were written."""
        self._detach()

    def _detach(self) -> None:
        self.__dict__.pop("val_dataloader", None)
        if self._hooks is not None and self.trainer is not None:
            self._hooks.detach(self.trainer)
        self._hooks = None

    def evaluation_batches(self, task: int, part: str = "test") -> Iterator[Batch]:
        """Prepared batches of a task's test or validation data; with several processes this one's share, unpadded.

        Raises:
            ValueError: If the task has no such data.
        """
        if part not in self.stream[task].parts():
            raise ValueError(f"task {task} has no {part} data; its parts are {list(self.stream[task].parts())}")
        yield from self._evaluation_loader(task, part)

    def training_samples(self, task: int, number: int | None = None, seed: int = 0) -> Iterator[Batch]:
        """Prepared batches of a task's training data without replay, for measuring; this process's share.

        Args:
            task: The task.
            number: Samples over all processes, chosen at random; ``None`` for all, in stored order.
            seed: Of the choice.
        """
        samples = self.stream[task].train
        if number is not None and number < len(samples):
            order = torch.randperm(len(samples), generator=derived_generator(seed, task))
            samples = samples.take(order[: max(number, self._share.world)])
        yield from TaskLoader(samples, self.eval_batch_size, prepare=self.stream.prepare, share=self._share)

    def val_dataloader(self) -> ResumableLoader:
        """The validation batches of the current task.

        Raises:
            RuntimeError: If there is no validation.
        """
        if not self.validates:
            raise RuntimeError(
                "there is no validation: it needs a TaskStreamDataModule of a stream made with val_split"
            )
        return self._evaluation_loader(self.task.index, "val")

    def test_dataloader(self) -> list[ResumableLoader]:
        """The test batches of every task, one loader each."""
        return [self._evaluation_loader(task.index, "test") for task in self.stream]

    def predict_dataloader(self) -> list[ResumableLoader]:
        """The test batches, targets included."""
        return self.test_dataloader()

    def state_dict(self) -> dict[str, Any]:
        """Which stream this is, and the replay buffers of all processes."""
        state: dict[str, Any] = {"sizes": [len(task.train) for task in self.stream]}
        if self.replay is not None:
            state["replay"] = self._of_all_processes(self.replay.state_dict())
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where the state was taken.

        Raises:
            ValueError: If it is of another stream, of another number of processes, or replays where this does not.
        """
        sizes = [len(task.train) for task in self.stream]
        if state_dict["sizes"] != sizes:
            raise ValueError(
                f"the checkpoint is of another stream: its tasks have {state_dict['sizes']} training samples, these "
                f"have {sizes}"
            )
        saved = state_dict.get("replay")
        if (saved is None) != (self.replay is None):
            raise ValueError(
                f"the checkpoint was written {'without' if saved is None else 'with'} replay: resume with the same"
            )
        if self.replay is not None and saved is not None:
            if len(saved) != self._share.world:
                raise ValueError(
                    f"the checkpoint has replay buffers of {len(saved)} processes, this run has {self._share.world}"
                )
            self.replay.load_state_dict(saved[self._share.rank])

    @property
    def _share(self) -> Share:
        # What Lightning gives its own samplers: one replica where every process reads the whole of every batch.
        dealt = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return Share() if dealt is None else Share(dealt["rank"], dealt["num_replicas"])

    def _progress(self) -> TrainerProgress | None:
        return None if self.trainer is None else TrainerProgress(self.trainer)

    def _train_loader(self, task: int, epoch: int, observes: bool = True, progress: bool = True) -> TaskLoader:
        seed = None
        if self.shuffle:
            seed = int(torch.randint(2**_SEED_BITS, (), generator=derived_generator(self.seed, epoch)))
        return TaskLoader(
            self.stream[task].train,
            self.batch_size,
            seed=seed,
            prepare=self.stream.prepare,
            replay=self.replay,
            observes=observes,
            share=self._share,
            progress=self._progress() if progress else None,
        )

    def _evaluation_loader(self, task: int, part: str) -> TaskLoader:
        samples = self.stream[task].parts()[part]
        return TaskLoader(samples, self.eval_batch_size, prepare=self.stream.prepare, share=self._share)

    def _of_all_processes(self, state: dict[str, Any]) -> list[dict[str, Any]]:
        if self._share.world == 1:
            return [state]
        gathered: list[Any] = [None] * self._share.world
        torch.distributed.all_gather_object(gathered, state)
        return gathered


class TaskStreamDataModule(StreamDataModule):
    """A stream in one ``trainer.fit``: ``epochs_per_task`` epochs of the first task, then of the second, and so on.

    The Trainer needs the arguments of `trainer_kwargs`. ``val_dataloader`` gives the validation data of the *current*
    task, if the stream has such data; ``test_dataloader`` gives the test data of all tasks, a loader each. Callbacks
    (and the LightningModule) may have methods ``on_task_start(trainer, pl_module, task)`` and ``on_task_end(...)`` (the
    module's take the task alone), which are called before a task's first epoch and after its last. Checkpoints hold the
    place in the stream and the replay buffer; a run resumes at any batch.

    Args:
        stream: The tasks.
        batch_size: New samples per training batch and process; replayed ones come on top.
        epochs_per_task: Epochs of each task, >= 1.
        eval_batch_size: Samples per validation and test batch.
        replay: Adds stored samples to the batches.
        shuffle: Whether a task's samples come in random order, another one in every epoch.
        seed: Of the orders. Torch's global generator is not used, so ``seed_everything`` does not change them.

    Raises:
        TypeError: If ``stream`` is not a `TaskStream`, or ``replay`` not a `Replay`.
        ValueError: If a number is not positive, or some tasks have validation data and others have none.
    """

    def __init__(
        self,
        stream: TaskStream,
        batch_size: int = 32,
        epochs_per_task: int = 1,
        eval_batch_size: int = 1000,
        replay: Replay | None = None,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(stream, batch_size, eval_batch_size, replay, shuffle, seed)
        check_count("epochs_per_task", epochs_per_task)
        without = [task.index for task in stream if task.val is None]
        if 0 < len(without) < len(stream):
            raise ValueError(
                f"tasks {without} have no validation data and the others have: give all tasks some, or none"
            )
        self.epochs_per_task = epochs_per_task
        self.validates = not without
        self._begin()

    def _begin(self) -> None:
        self._task = 0
        self._first_epoch = 0  # of the current task, counted over the whole run
        self._end_epoch = self.epochs_per_task  # the epoch after the current task's last one

    def trainer_kwargs(self) -> dict[str, Any]:
        """``max_epochs`` for the whole stream, and loaders that are asked for anew in every epoch."""
        return {"max_epochs": len(self.stream) * self.epochs_per_task, "reload_dataloaders_every_n_epochs": 1}

    def check_trainer(self, trainer: Trainer) -> None:
        """Refuse a Trainer that does not reload loaders every epoch, or ends before the stream does.

        ``limit_train_batches`` is allowed: it shortens the epochs, and each task has its own.
        """
        super().check_trainer(trainer)
        reload = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
        if reload != 1:
            raise MisconfigurationException(
                f"TaskStreamDataModule needs Trainer(reload_dataloaders_every_n_epochs=1), got {reload}: with another "
                "number a resumed run trains on the wrong task. Use Trainer(**data.trainer_kwargs(), ...)"
            )
        needed, given = len(self.stream) * self.epochs_per_task, trainer.max_epochs
        if given is not None and 0 <= given < needed and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise MisconfigurationException(
                f"the stream has {len(self.stream)} tasks of {self.epochs_per_task} epochs, which needs "
                f"Trainer(max_epochs={needed}), got {given}; for a part of it use TaskStreamDataModule(stream.first(n))"
            )

    def make_hooks(self) -> TaskHooks:
        """Boundaries are between epochs."""
        return EpochTaskHooks(self)

    def setup(self, stage: str | None = None) -> None:
        """Check the Trainer and begin the stream (a checkpoint, which is loaded later, moves to where it was)."""
        super().setup(stage)
        if stage == "fit" and self._processed_epochs == 0:
            self._begin()

    @property
    def task(self) -> Task:
        """The task of the current epoch."""
        return self.stream[self._task]

    @property
    def epoch_in_task(self) -> int:
        """Number of the current epoch within its task, from 0."""
        return self._processed_epochs - self._first_epoch

    @property
    def task_is_over(self) -> bool:
        """Whether the current task's last epoch was trained."""
        return self._processed_epochs >= self._end_epoch

    def end_task(self) -> None:
        """Make the current epoch the last one of its task; the next epoch is the next task's first."""
        if self.trainer is not None:
            progress: Any = self.trainer.fit_loop.epoch_progress.current
            self._end_epoch = min(self._end_epoch, progress.started)

    def train_dataloader(self) -> ResumableLoader:
        """The training batches of the epoch that begins, or that is resumed."""
        while self.task_is_over and self._task < len(self.stream) - 1:
            self._task += 1
            self._first_epoch = self._end_epoch
            self._end_epoch = self._first_epoch + self.epochs_per_task
        return self._train_loader(self._task, self._processed_epochs, observes=self.epoch_in_task == 0)

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream, and the replay buffer."""
        place = {"task": self._task, "first_epoch": self._first_epoch, "end_epoch": self._end_epoch}
        return {**super().state_dict(), **place}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where the state was taken."""
        super().load_state_dict(state_dict)
        self._task = state_dict["task"]
        self._first_epoch, self._end_epoch = state_dict["first_epoch"], state_dict["end_epoch"]

    @property
    def _processed_epochs(self) -> int:
        """Epochs trained by the whole run. Not ``current_epoch``, which lags behind while a run is resumed."""
        if self.trainer is None:
            return 0
        progress: Any = self.trainer.fit_loop.epoch_progress.current  # Lightning annotates a base class of it
        return int(progress.processed)
