"""Splitting a user's network into stages ``f_l = affine_l after transfer_l``, each with its own code."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_altmin.engines import BatchState, CouplingGradient, StageEngine, StageMap, stage_engine

_NORMALIZATION = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)
_PARAMETRIC_TRANSFER = (nn.PReLU,)
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
        self.engine: StageEngine = stage_engine(self.modules, engine)

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
            ValueError: If the stage cannot take an input of this shape.
        """
        try:
            return self.engine.encode(x)
        except RuntimeError as error:
            if "out of memory" in str(error):  # says nothing of the shape, and batch-size finders want to see it
                raise
            raise ValueError(
                f"stage {self.name!r} ({_describe(self.modules)}) cannot take an input of shape {tuple(x.shape)} and "
                f"dtype {x.dtype}: {error}"
            ) from error

    def fixed(self, x: Tensor, state: BatchState, move: Tensor | None = None) -> StageMap:
        """The stage at ``x``, or at ``x + move``, as the code step sees it."""
        return self.engine.live(x, state, move) if self._live_in_code_step else self.engine.fixed(x, state, move)

    def repeated_coupling(
        self, base: Tensor, state: BatchState, target_move: Tensor, gradients: int
    ) -> CouplingGradient | None:
        """A cheaper way to this many gradients of the coupling, as the code step sees it; ``None`` if there is none."""
        if self._live_in_code_step:
            return None
        return self.engine.repeated_coupling(base, state, target_move, gradients)

    def live(self, x: Tensor, state: BatchState, move: Tensor | None = None) -> StageMap:
        """The stage at ``x``, or at ``x + move``, as the weight step sees it."""
        return self.engine.live(x, state, move)

    def __repr__(self) -> str:
        return f"Stage({self.name!r}, {_describe(self.modules)}, engine={self.engine.kind!r})"


@dataclass
class Encoding:
    """What the encode phase leaves behind: the codes, the network's output, and each stage's batch state."""

    codes: list[Tensor]
    output: Tensor
    states: list[BatchState]


class CodedNetwork:
    """A network seen as stages with a code between each two. The network itself is not copied or changed.

    Args:
        network: An ``nn.Sequential`` (nested ones are flattened), a list of blocks (each parametrised block is one
            stage), or a module with ``.features`` and ``.classifier`` (``.avgpool`` between them is respected).
        engine: ``"auto"``, ``"closed_form"`` or ``"autograd"``; see `lightning_altmin.engines.stage_engine`.
        batch_norm: What a BatchNorm in training mode is in the code step: ``"fixed"``, the affine map of encode's batch
            statistics, or ``"live"``, recomputed and differentiated through as in the weight step. A code's move shifts
            the statistics that a live one takes away again; a fixed one does not know that, and in convolutional
            networks teaches the layers below shifts that have no effect. With ``"live"`` the codes of a batch are one
            problem, no longer independent of each other.

    A stage's layer is one Linear, convolution, Embedding or other parametrised block, plus the normalisation
    directly after it; anything else parametrised (PReLU, a late BatchNorm) belongs to the transfer of the next
    stage and is trained with it. Modules after the output layer belong to the output stage.

    Raises:
        TypeError: If the network is of none of these kinds.
        ValueError: If it has no hidden layer, shares a parameter between stages, has a trainable parameter that no
            stage uses, or has uninitialised (lazy) parameters.
    """

    def __init__(
        self,
        network: nn.Module | Sequence[nn.Module],
        engine: str = "auto",
        batch_norm: BatchNormInCodeStep = "fixed",
    ) -> None:
        if batch_norm not in ("fixed", "live"):
            raise ValueError(f"batch_norm must be 'fixed' or 'live', got {batch_norm!r}")
        if isinstance(network, nn.Module):
            self.network = network
            leaves = self._leaves(network)
        else:
            blocks = list(network)
            if not blocks or not all(isinstance(block, nn.Module) for block in blocks):
                raise TypeError("network must be a module or a non-empty list of modules (blocks)")
            self.network = nn.Sequential(*blocks)
            leaves = [(str(index), block) for index, block in enumerate(blocks)]
        self.stages = _split(leaves, engine, batch_norm)
        self._refuse_unusable()

    @property
    def depth(self) -> int:
        """Number of codes, L."""
        return len(self.stages) - 1

    def encode(self, x: Tensor) -> Encoding:
        """Forward pass in the modules' current mode, without a graph, keeping every code.

        Args:
            x: Inputs, shape ``(batch, *features)``.
        """
        codes, states = [], []
        for stage in self.stages:
            x, state = stage.encode(x)
            codes.append(x)
            states.append(state)
        return Encoding(codes[:-1], codes[-1], states)

    def encode_as_evaluated(self, x: Tensor) -> Encoding:
        """`encode` in eval mode: no statistics are updated, nothing is dropped."""
        with self._evaluating():
            return self.encode(x)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = {module: module.training for module in self.network.modules()}
        self.network.eval()
        try:
            yield
        finally:
            for module, mode in training.items():
                module.training = mode

    def __call__(self, x: Tensor) -> Tensor:
        """The ordinary forward pass."""
        output: Tensor = self.network(x)
        return output

    def verify_split(self, x: Tensor) -> None:
        """Check that the stages compute what the network computes (a ``.features``/``.classifier`` module may not).

        Raises:
            ValueError: If they differ.
        """
        refusal = (
            f"{type(self.network).__name__}.forward is not features -> (avgpool) -> flatten -> classifier, so its "
            "stages cannot be found by name; pass an nn.Sequential or a list of blocks instead"
        )
        try:
            # In full precision: the two may round at different places.
            with self._evaluating(), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                output = self.encode(x).output
                expected = self.network(x)
        except ValueError as error:
            raise ValueError(f"either x does not fit the network, or {refusal}: {error}") from error
        if expected.shape != output.shape or not torch.allclose(expected, output, rtol=1e-4, atol=1e-5, equal_nan=True):
            raise ValueError(refusal)

    @property
    def split_by_name(self) -> bool:
        """Whether stages were found by the names ``features`` and ``classifier`` and not by an ``nn.Sequential``."""
        return not isinstance(self.network, nn.Sequential)

    def explain(self, x: Tensor | None = None) -> str:
        """A table of the stages: layer, modules, shape of a sample's code, trainable parameters, engine.

        Args:
            x: Optional sample batch; with it the table shows code shapes. The network is run once in eval mode.
        """
        shapes = ["?"] * len(self.stages)
        if x is not None:
            encoding = self.encode_as_evaluated(x)
            shapes = ["x".join(map(str, c.shape[1:])) for c in (*encoding.codes, encoding.output)]
        rows = [("stage", "modules", "code", "parameters", "engine")]
        for stage, shape in zip(self.stages, shapes, strict=True):
            count = sum(p.numel() for p in stage.parameters() if p.requires_grad)
            code = f"{shape} (output)" if stage.is_output else shape
            rows.append((stage.name, _describe(stage.modules), code, f"{count:,}", stage.engine.kind))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)

    def _leaves(self, network: nn.Module) -> list[tuple[str, nn.Module]]:
        if isinstance(network, nn.Sequential):
            return list(_flatten(network, ""))
        features, classifier = getattr(network, "features", None), getattr(network, "classifier", None)
        if not (isinstance(features, nn.Module) and isinstance(classifier, nn.Module)):
            raise TypeError(
                f"network of type {type(network).__name__} cannot be split: pass an nn.Sequential, a list of blocks, "
                "or a module with .features and .classifier"
            )
        leaves = list(_flatten(features, "features"))
        if isinstance(pool := getattr(network, "avgpool", None), nn.Module):
            leaves += list(_flatten(pool, "avgpool"))
        leaves.append(("flatten", nn.Flatten()))
        return leaves + list(_flatten(classifier, "classifier"))

    def _refuse_unusable(self) -> None:
        if isinstance(self.network, nn.Sequential) and type(self.network).forward is not nn.Sequential.forward:
            raise ValueError(
                f"{type(self.network).__name__} has a forward of its own, so its parts cannot be taken for stages; "
                "pass a plain nn.Sequential, or a list of blocks"
            )
        if self.depth < 1:
            raise ValueError(
                "network has no hidden layer, so there is no code to optimise; add one, or train it with "
                "BackpropModule, which does the same here"
            )
        owner: dict[nn.Parameter, str] = {}
        for stage in self.stages:
            for parameter in dict.fromkeys(stage.parameters()):
                if isinstance(parameter, nn.parameter.UninitializedParameter):
                    raise ValueError(f"stage {stage.name!r} has uninitialised (lazy) parameters; call network(x) first")
                if parameter in owner:
                    raise ValueError(
                        f"stages {owner[parameter]!r} and {stage.name!r} share a parameter, so their problems are not "
                        "independent; untie them, or put both layers into one block"
                    )
                owner[parameter] = stage.name
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad and parameter not in owner:
                raise ValueError(
                    f"parameter {name!r} of the network belongs to no stage and would never be trained; remove it or "
                    "set requires_grad=False"
                )


def _flatten(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Leaves of nested Sequentials with their dotted names.

    Only plain Sequentials are opened, or subclasses that keep its forward: another forward would compute something
    else.
    """
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        for name, child in module._modules.items():  # named_children() leaves out a module that is used twice
            assert child is not None  # a Sequential calls every entry
            yield from _flatten(child, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix, module


def _split(leaves: Iterable[tuple[str, nn.Module]], engine: str, batch_norm: BatchNormInCodeStep) -> list[Stage]:
    """Group leaves into stages; a new stage's transfer begins after each layer and its normalisation."""
    groups: list[tuple[str, list[nn.Module], list[nn.Module]]] = []
    transfer: list[nn.Module] = []
    follows_layer = False
    for name, module in leaves:
        if isinstance(module, _NORMALIZATION) and follows_layer:
            groups[-1][2].append(module)
            follows_layer = False
        elif _is_layer(module):
            groups.append((name, transfer, [module]))
            transfer, follows_layer = [], True
        else:
            transfer.append(module)
            follows_layer = False
    if not groups:
        return []
    groups[-1][2].extend(transfer)  # whatever follows the output layer belongs to the output stage
    last = len(groups) - 1
    return [Stage(name, t, a, index == last, engine, batch_norm) for index, (name, t, a) in enumerate(groups)]


def _is_layer(module: nn.Module) -> bool:
    if isinstance(module, (*_NORMALIZATION, *_PARAMETRIC_TRANSFER)):
        return False
    return any(True for _ in module.parameters())


def _describe(modules: Sequence[nn.Module]) -> str:
    return "-".join(_label(module) for module in modules)


def _label(module: nn.Module) -> str:
    """``Linear(784, 100)``: the type with the sizes that tell layers apart."""
    names = (n for n in inspect.signature(type(module)).parameters if n.startswith(("in_", "out_", "num_", "kernel")))
    sizes = [str(value) for n in names if isinstance(value := getattr(module, n, None), int | tuple)]
    return f"{type(module).__name__}({', '.join(sizes)})" if sizes else type(module).__name__
