"""How many bytes the tensors of a computation hold at most, and which tensors those are."""

from __future__ import annotations

import traceback
import weakref
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PACKAGE = "lightning_altmin"


class Made(NamedTuple):
    """A tensor: its size, the operation that made it, and where in the package that was asked for."""

    size: int
    operation: str
    shape: tuple[int, ...]
    where: str


class PeakMemory(TorchDispatchMode):
    """Largest number of bytes held at once by tensors made inside this context.

    Args:
        explain: Note where tensors were made, so that ``alive`` tells which of them there were at the peak.
    """

    def __init__(self, explain: bool = False) -> None:
        super().__init__()
        self.held = self.peak = 0
        self.alive: list[Made] = []
        self._explain = explain
        self._known: dict[int, Made] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                self._note(value, "")
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._note(value, str(func))
        return result

    def _note(self, tensor: Tensor, operation: str) -> None:
        """A view's storage is known already; one that is first seen as an argument was made before."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if operation else 0
        if key in self._known:
            return
        where = _where() if self._explain and operation else ""
        self._known[key] = Made(size, operation, tuple(tensor.shape), where)
        self.held += size
        if self.held > self.peak:
            self.peak = self.held
            if self._explain:
                self.alive = sorted(self._known.values(), reverse=True)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        self.held -= size

    def __str__(self) -> str:
        """The tensors at the peak, the largest first."""
        lines = [f"{self.peak / 1e6:.3f} MB at the peak"]
        lines += [f"{m.size / 1e6:9.3f}  {m.operation}  {m.shape}  {m.where}" for m in self.alive if m.size >= 1000]
        return "\n".join(lines)


def _where() -> str:
    frames = [f for f in traceback.extract_stack() if PACKAGE in f.filename]
    return " ".join(f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno}" for f in frames[-3:])
