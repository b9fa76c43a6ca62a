"""A stage of a network, ``f_l = affine_l after transfer_l``, and what a batch holds of it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from lightning_altmin.engines import (
    BatchState,
    CouplingGradient,
    SharedSamples,
    StageEngine,
    StageMap,
    stage_engine,
)
from lightning_altmin.engines.batch_norm_state import batch_norms
from lightning_altmin.margins import MarginLoss
from lightning_altmin.processes import ProcessLostError
from lightning_altmin.traced_block import TracedBlock

BatchNormInCodeStep = Literal["fixed", "live"]


class Stage:
    """One stage of the network: ``f_l(c) = affine_l(transfer_l(c))``.

    Attributes:
        name: Name of the stage's layer in the network (``"3"``, ``"features.0"``).
        transfer: Modules between the code below and the layer: activation, pooling, dropout, reshaping.
        affine: The layer (or block) and the normalisation directly after it; for the output stage also whatever
            follows it.
        is_output: Whether this is the last stage, which has no code.
    """

    def __init__(
        self,
        name: str,
        transfer: Sequence[nn.Module],
        affine: Sequence[nn.Module],
        is_output: bool,
        engine: str = "auto",
        batch_norm: BatchNormInCodeStep = "fixed",
    ) -> None:
        self.name = name
        self.batch_norm = batch_norm
        self._live_in_code_step = batch_norm == "live"
        self.transfer = list(transfer)
        self.affine = list(affine)
        self.is_output = is_output
        self._samples: SharedSamples | None = None
        self.engine: StageEngine
        self.use_engine(engine)

    def use_engine(self, engine: str) -> None:
        """Evaluate the stage by another engine; see `lightning_altmin.engines.stage_engine`."""
        self.engine = stage_engine(self.modules, engine)
        if self._samples is not None:
            self.engine.share(self._samples)

    def share(self, samples: SharedSamples | None) -> None:
        """Take batch statistics over the samples of several processes from now on; ``None``: of this one alone.

        Raises:
            ValueError: If the engine cannot do it.
        """
        wanted = samples if batch_norms(self.modules) else None
        if wanted is not self._samples:
            self.engine.share(wanted)
            self._samples = wanted

    @property
    def mixes_processes(self) -> bool:
        """Whether its output for a sample depends on samples of other processes."""
        return self._samples is not None

    @property
    def mixes_processes_in_code_step(self) -> bool:
        """Whether that is so in the code step, too, where statistics may be fixed."""
        return self.mixes_processes and self._live_in_code_step

    @property
    def modules(self) -> list[nn.Module]:
        """All modules of the stage in the order they are applied."""
        return [*self.transfer, *self.affine]

    def parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the stage, frozen ones included."""
        for module in self.modules:
            yield from module.parameters()

    def encode(self, x: Tensor) -> tuple[Tensor, BatchState]:
        """Training-time forward pass, without a graph.

        Raises:
            ValueError: If the stage cannot take such an input.
        """
        try:
            code, state = self.engine.encode(x)
        except ProcessLostError:
            raise
        except (RuntimeError, TypeError, IndexError) as error:  # a module that returns a tuple, an unknown index, ...
            if "out of memory" in str(error):  # says nothing of the shape, and batch-size finders want to see it
                raise
            raise ValueError(
                f"stage {self.name!r} ({self.description}) cannot take an input of shape {tuple(x.shape)} and "
                f"dtype {x.dtype}: {error}"
            ) from error
        if not isinstance(code, Tensor):
            raise ValueError(
                f"stage {self.name!r} ({self.description}) returned a {type(code).__name__}; a stage must return one "
                "tensor: take what you need of it in a module of your own"
            )
        return code, state

    def fixed(self, x: Tensor, state: BatchState, move: Tensor | None = None) -> StageMap:
        """The stage at ``x``, or at ``x + move``, as the code step sees it."""
        return self.engine.live(x, state, move) if self._live_in_code_step else self.engine.fixed(x, state, move)

    def repeated_coupling(
        self, base: Tensor, state: BatchState, target_move: Tensor, gradients: int, any_order: bool = False
    ) -> CouplingGradient | None:
        """A cheaper way to this many gradients of the coupling, as the code step sees it; ``None`` if there is none.

        With ``any_order`` it may be one that has an order of entries of its own.
        """
        if self._live_in_code_step:
            return None
        return self.engine.repeated_coupling(base, state, target_move, gradients, any_order)

    def live(self, x: Tensor, state: BatchState, move: Tensor | None = None) -> StageMap:
        """The stage at ``x``, or at ``x + move``, as the weight step sees it."""
        return self.engine.live(x, state, move)

    @property
    def description(self) -> str:
        """Its modules in one line."""
        return "-".join(_label(module) for module in self.modules)

    def __repr__(self) -> str:
        return f"Stage({self.name!r}, {self.description}, engine={self.engine.kind!r})"


@dataclass
class Encoding:
    """What the encode phase leaves behind: the codes, the network's output, and each stage's batch state."""

    codes: list[Tensor]
    output: Tensor
    states: list[BatchState]


@dataclass
class StageData:
    """What a batch holds of one stage, for its weight problem.

    Attributes:
        state: What encode fixed in the stage.
        forward_input: Its input as encode found it.
        input_move: How far the input has moved; ``None`` if it has not, or is to be read as it was.
        forward_output: Its code, or the network's output, as encode found it.
        move: Move of its code; ``None`` for the output stage.
        signal: The share of a plain step that reached its code; see `WeightProblem`.
        margins: How its code is judged; see `WeightProblem`.
    """

    state: BatchState
    forward_input: Tensor
    input_move: Tensor | None
    forward_output: Tensor
    move: Tensor | None
    signal: Tensor | None
    margins: MarginLoss | None = None


def _label(module: nn.Module) -> str:
    """``Linear(784, 100)``: the type with the sizes that tell layers apart; ``[conv1-add]`` for what is traced."""
    if isinstance(module, TracedBlock):
        return f"[{module.label}]" if "-" in module.label else module.label
    names = (n for n in inspect.signature(type(module)).parameters if n.startswith(("in_", "out_", "num_", "kernel")))
    sizes = [str(value) for n in names if isinstance(value := getattr(module, n, None), int | tuple)]
    return f"{type(module).__name__}({', '.join(sizes)})" if sizes else type(module).__name__
