"""The base of all loaders: an iterable of batches that can be saved and resumed at any trained batch."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from lightning_altmin.data.seeding import draw_epoch_seed
from lightning_altmin.trainer.progress import TrainingProgress

Batch = tuple[torch.Tensor, torch.Tensor]
BatchTransform = Callable[[torch.Tensor, torch.Generator], torch.Tensor]
BatchPreparation = Callable[[torch.Tensor], torch.Tensor]

_STATUSES = ("fresh", "running", "finished")


class ResumableLoader(ABC):
    """Iterable of batches whose ``state_dict`` is the state after the last trained batch.

    Lightning saves ``state_dict`` of a train loader in every checkpoint and calls ``load_state_dict`` before the
    first ``iter`` when it resumes inside an epoch. All randomness of an epoch derives from one draw of torch's global
    generator, made when the first batch of the epoch is asked for. The state keeps that draw, so a resumed loader
    re-makes the interrupted epoch without touching the global generator and without building the trained batches.

    Args:
        progress: who counts the trained batches. None counts the batches handed out, which is the same as long as
            nobody fetches ahead.
    """

    def __init__(self, progress: TrainingProgress | None = None) -> None:
        self._progress = progress
        self._rank, self._world = 0, 1
        self._epoch: _Epoch | None = None
        self._loaded: dict[str, Any] | None = None

    @abstractmethod
    def batches_from(self, seed: int | None, start: int) -> Iterator[Batch]:
        """Build the batches of one epoch.

        Args:
            seed: the draw of the epoch; None if ``is_random`` is False.
            start: number of the first batch wanted; those before it are not to be built.

        Yields:
            The batches number ``start``, ``start + 1``, ... of the epoch.
        """

    def share(self, rank: int, world: int) -> None:
        """Hand out this process's part of every batch only, ``world`` times as large a batch being dealt out.

        Raises:
            RuntimeError: if this kind of loader serves one process only.
        """
        raise RuntimeError(
            f"a {type(self).__name__} serves one process, but the Trainer has {world}: each would train on the same "
            "batches; use Trainer(devices=1, num_nodes=1)"
        )

    def draw(self) -> int:
        """Draw the seed of one epoch, the same on all processes that share its batches."""
        seed = draw_epoch_seed()
        return seed if self._world == 1 else _from_first_process(seed)

    def own_part(self, count: int) -> slice:
        """Which of the ``count`` samples of a batch this process hands out; all of them, where none are shared."""
        return slice(count * self._rank // self._world, count * (self._rank + 1) // self._world)

    @property
    @abstractmethod
    def is_random(self) -> bool:
        """Whether an epoch needs a draw of the global generator."""

    @abstractmethod
    def layout(self) -> dict[str, int | bool]:
        """The settings that say which samples a batch number stands for; a state fits only an equal layout."""

    @property
    @abstractmethod
    def epoch_length(self) -> int | None:
        """Number of batches of an epoch, None when it is not known beforehand."""

    def __len__(self) -> int:
        """Number of batches of an epoch.

        Raises:
            TypeError: if it is not known beforehand (what Python, and Lightning, take as "has no length").
        """
        length = self.epoch_length
        if length is None:
            raise TypeError(f"this {type(self).__name__} does not know its length")
        return length

    def __iter__(self) -> Iterator[Batch]:
        """Begin an epoch: the loaded one, if a state was just loaded, otherwise a fresh one."""
        state, self._loaded = self._loaded, None
        if state is None or state["status"] == "fresh":
            self._epoch = _Epoch(self, self._progress)
        elif state["status"] == "running":
            self._epoch = _Epoch(self, self._progress, seed=state["seed"], start=state["position"])
        else:
            self._epoch = _Epoch(self, self._progress, finished=True)
        return self._epoch

    def close(self) -> None:
        """Release workers and files of the epoch under way; its state can still be saved."""
        if self._epoch is not None:
            self._epoch.close()

    def state_dict(self) -> dict[str, Any]:
        """State after the last trained batch.

        Returns:
            A dictionary of plain numbers and strings. ``status`` is ``"fresh"`` (the next ``iter`` draws a new epoch),
            ``"running"`` (it continues the epoch drawn as ``seed`` at batch ``position``) or ``"finished"`` (it has
            no batch left, the one after it draws a new epoch).
        """
        if self._loaded is not None:
            return dict(self._loaded)
        state: dict[str, Any] = {"status": "fresh", "seed": None, "position": 0, "layout": self.layout()}
        if self._epoch is None:
            return state
        stage = "running" if self._progress is None else self._progress.stage()
        if stage == "ended":
            state["status"] = "finished"
        elif stage == "running" and self._epoch.has_begun and not self._epoch.is_over:
            state.update(status="running", seed=self._epoch.seed, position=self._epoch.position)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Make the next ``iter`` continue where the state was taken.

        Args:
            state_dict: what ``state_dict`` returned.

        Raises:
            ValueError: if the state is not one of this class, or was taken inside an epoch of a loader that cuts its
                data into other batches.
        """
        state = dict(state_dict)
        missing = {"status", "seed", "position", "layout"} - state.keys()
        if missing or state["status"] not in _STATUSES:
            raise ValueError(f"state_dict is not the state of a {type(self).__name__}: {state}")
        layout = self.layout()
        if state["status"] == "running" and state["layout"] != layout:
            differing = {key: (state["layout"].get(key), layout.get(key)) for key in {**layout, **state["layout"]}}
            changes = ", ".join(f"{k} was {a}, now {b}" for k, (a, b) in sorted(differing.items()) if a != b)
            raise ValueError(
                f"the checkpoint was written inside an epoch of a train loader with other settings ({changes}); resume "
                "with the settings it was written with, or from a checkpoint written at the end of an epoch"
            )
        self._loaded = state


def _from_first_process(seed: int) -> int:
    shared = [seed]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


class _Epoch(Iterator[Batch]):
    """One pass over a loader; nothing is drawn or opened before the first batch is asked for.

    Lightning calls ``iter`` on a loader more often than it iterates over it, so drawing in ``iter`` would move the
    global generator.
    """

    def __init__(
        self,
        loader: ResumableLoader,
        progress: TrainingProgress | None,
        seed: int | None = None,
        start: int = 0,
        finished: bool = False,
    ) -> None:
        self._loader = loader
        self._progress = progress
        self._trained_before = 0 if progress is None else progress.trained_batches()
        self._batches: Iterator[Batch] | None = None
        self._start = start
        self._handed_out = 0
        self._exhausted = finished
        self._closed = False
        self.seed = seed
        self.has_begun = finished or start > 0 or seed is not None

    def __next__(self) -> Batch:
        if self._exhausted:
            raise StopIteration
        if self._closed:
            raise RuntimeError("this epoch of the loader was closed; begin another with iter(loader)")
        if self._batches is None:
            if self.seed is None and self._loader.is_random:
                self.seed = self._loader.draw()
            self.has_begun = True
            self._batches = self._loader.batches_from(self.seed, self._start)
        try:
            batch = next(self._batches)
        except StopIteration:
            self._exhausted = True
            raise
        self._handed_out += 1
        if self._start + self._handed_out == self._loader.epoch_length:
            # nobody asks for the end of an epoch whose length is known, so workers and files are released here
            self._exhausted = True
            self._batches = None
        return batch

    @property
    def position(self) -> int:
        """Number of trained batches of this epoch, those before a resume included."""
        if self._progress is None:
            return self._start + self._handed_out
        return self._start + self._progress.trained_batches() - self._trained_before

    @property
    def is_over(self) -> bool:
        """Whether every batch of the epoch is trained, as far as the loader alone can tell."""
        if self._progress is not None:
            # the Trainer's stage says it, and being exhausted does not: the Trainer fetches one batch ahead
            return False
        length = self._loader.epoch_length
        return self._exhausted or (length is not None and self.position >= length)

    def close(self) -> None:
        """Drop the iterator below, which ends workers and closes files."""
        self._batches = None
        self._closed = True
