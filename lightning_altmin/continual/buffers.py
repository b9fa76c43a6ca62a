"""Fixed-size memories of samples, for replay."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_altmin.arguments import check_count
from lightning_altmin.data.resumable_loader import Batch
from lightning_altmin.data.seeding import derived_generator


class SampleBuffer(ABC):
    """Up to ``size`` samples and how many were offered.

    What is kept depends on ``seed`` and on the samples offered, in order, and on nothing else: every decision draws
    from a generator derived from the seed and the number of samples offered before. So the state is all there is.

    Args:
        size: Samples that are kept at most, >= 1.
        seed: Of all draws.

    Raises:
        ValueError: If ``size`` is not a positive integer.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        check_count("size", size)
        self.size = size
        self.seed = seed
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.seen = 0
        self._count = 0
        self._x: Tensor | None = None
        self._y: Tensor | None = None

    def __len__(self) -> int:
        return self._count

    @property
    def x(self) -> Tensor:
        """The inputs kept, shape ``(len, ...)``."""
        return torch.empty(0) if self._x is None else self._x[: self._count]

    @property
    def y(self) -> Tensor:
        """Their labels, shape ``(len,)``."""
        return torch.empty(0, dtype=torch.int64) if self._y is None else self._y[: self._count]

    @property
    def state_bytes(self) -> int:
        """Bytes of the samples that a full buffer keeps; 0 before the first sample."""
        return sum(t.element_size() * t.numel() for t in (self._x, self._y) if t is not None)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Offer a batch of samples, one after the other.

        Args:
            x: Inputs, shape ``(n, ...)``.
            y: Labels, shape ``(n,)``.
        """
        if self._x is None or self._y is None:
            self._x = x.new_zeros((self.size, *x.shape[1:]), device="cpu")
            self._y = y.new_zeros((self.size, *y.shape[1:]), device="cpu")
        draws = torch.rand((len(x), 2), generator=derived_generator(self.seed, self.seen), dtype=torch.float64)
        for row, (first, second) in enumerate(draws.tolist()):
            self.seen += 1
            place = self._place(int(y[row]), first, second) if self._count == self.size else self._count
            if place is None:
                continue
            self._x[place], self._y[place] = x[row].to(self._x.device), y[row].to(self._y.device)
            self._count = max(self._count, place + 1)

    def sample(self, number: int, generator: torch.Generator) -> Batch:
        """Draw samples without replacement; all of them if there are not more than ``number``."""
        rows = torch.randperm(len(self), generator=generator)[:number]
        return self.x[rows], self.y[rows]

    def state_dict(self) -> dict[str, Any]:
        """Everything kept, as tensors and numbers."""
        return {"seen": self.seen, "size": self.size, "x": self.x.clone(), "y": self.y.clone(), **self._counts()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            ValueError: If it was taken from a buffer of another size.
        """
        if state_dict["size"] != self.size:
            raise ValueError(
                f"the saved buffer has size={state_dict['size']}, this one size={self.size}: use the size of the run "
                "that is resumed"
            )
        self.clear()
        x, y = state_dict["x"], state_dict["y"]
        if len(x):
            self._x, self._y = x.new_zeros((self.size, *x.shape[1:])), y.new_zeros((self.size, *y.shape[1:]))
            self._x[: len(x)], self._y[: len(y)] = x, y
        self.seen, self._count = state_dict["seen"], len(x)
        self._load_counts(state_dict)

    @abstractmethod
    def _place(self, label: int, first: float, second: float) -> int | None:
        """Where the newest sample (number ``seen``) goes in a full buffer; ``None`` to leave it out.

        Args:
            label: Its label.
            first: A draw from [0, 1).
            second: Another one.
        """

    def _counts(self) -> dict[str, Any]:
        return {}

    def _load_counts(self, state_dict: Mapping[str, Any]) -> None:  # noqa: B027  (most buffers count nothing)
        pass


class ReservoirBuffer(SampleBuffer):
    """A uniform random subset of all samples offered so far (Vitter's algorithm R, 1985).

    Sample number ``n`` takes a uniformly drawn place among ``n``, and is left out if the buffer has no such place, so
    that each of the ``n`` is kept with probability ``size / n``.

    Args:
        size: Samples that are kept at most, >= 1.
        seed: Of all draws.

    Raises:
        ValueError: If ``size`` is not a positive integer.
    """

    def _place(self, label: int, first: float, second: float) -> int | None:
        place = int(first * self.seen)
        return place if place < self.size else None


class ClassBalancedBuffer(SampleBuffer):
    """As many samples of each class as there can be, uniform within a class.

    Class-balancing reservoir sampling (Chrysakis & Moens, "Online Continual Learning from Imbalanced Data", 2020): a
    sample of a class that is not among the largest replaces one of a largest class; one of a largest class with ``m``
    kept of ``n`` seen replaces one of its own with probability ``m / n``.

    Args:
        size: Samples that are kept at most, >= 1.
        seed: Of all draws.

    Raises:
        ValueError: If ``size`` is not a positive integer.
    """

    def clear(self) -> None:
        """Forget everything."""
        super().clear()
        self._seen_of: dict[int, int] = {}
        self._full: set[int] = set()  # classes that were once among the largest of a full buffer

    def add(self, x: Tensor, y: Tensor) -> None:
        """Offer a batch of samples, one after the other."""
        for row in range(len(x)):
            label = int(y[row])
            self._seen_of[label] = self._seen_of.get(label, 0) + 1
            super().add(x[row : row + 1], y[row : row + 1])

    def _place(self, label: int, first: float, second: float) -> int | None:
        counts = torch.bincount(self.y)
        largest = (counts == counts.max()).nonzero().squeeze(1)
        self._full |= set(largest.tolist())
        if label in self._full:
            own = (self.y == label).nonzero().squeeze(1)
            if first * self._seen_of[label] >= len(own):
                return None
        else:
            own = torch.isin(self.y, largest).nonzero().squeeze(1)
        return int(own[int(second * len(own))])

    def _counts(self) -> dict[str, Any]:
        return {"seen_of": dict(self._seen_of), "full": sorted(self._full)}

    def _load_counts(self, state_dict: Mapping[str, Any]) -> None:
        self._seen_of, self._full = dict(state_dict["seen_of"]), set(state_dict["full"])
