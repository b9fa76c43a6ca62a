"""A user's network seen as stages with a code between each two, and how it is split into them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_altmin.engines import SharedSamples, block_buffers, has_own_forward, runs_more_than_its_type
from lightning_altmin.stage import BatchNormInCodeStep, Encoding, Stage, StageData
from lightning_altmin.traced_block import NORMALIZATION, NOT_LAYERS, TracedBlock
from lightning_altmin.tracing import UntraceableError, trace

if TYPE_CHECKING:
    from lightning_altmin.codes import CodeProblem, CodeSolver
    from lightning_altmin.step import Step

Blocks = Sequence[nn.Module | type[nn.Module] | str]


class CodedNetwork:
    """A network seen as stages with a code between each two. The network itself is not copied or changed.

    Args:
        network: An ``nn.Sequential`` (nested ones are flattened), a list of blocks (each parametrised block is one
            stage), or a module whose forward torch.fx can trace, such as torchvision's: it is cut wherever one
            tensor is all that the rest of the forward reads. A module that cannot be traced is cut by the names
            ``.features``, ``.avgpool`` (if there is one) and ``.classifier``.
        engine: ``"auto"``, ``"closed_form"`` or ``"autograd"``; see `lightning_altmin.engines.stage_engine`.
        batch_norm: What a BatchNorm in training mode is in the code step: ``"fixed"``, the affine map of encode's batch
            statistics, or ``"live"``, recomputed and differentiated through as in the weight step. A code's move shifts
            the statistics that a live one takes away again; a fixed one does not know that, and in convolutional
            networks teaches the layers below shifts that have no effect. With ``"live"`` the codes of a batch are one
            problem, no longer independent of each other.
        blocks: Modules of the network that are to be one stage each, however many layers they have: by name
            (``"layer1"``), by type (``BasicBlock``), or the modules themselves. Without a network, the blocks in order
            are the network.

    A stage's layer is one Linear, convolution, Embedding or other parametrised block, plus the normalisation
    directly after it; anything else parametrised (PReLU, a late BatchNorm) belongs to the transfer of the next
    stage and is trained with it. Modules after the output layer belong to the output stage.

    Raises:
        TypeError: If the network is of none of these kinds.
        ValueError: If it has no hidden layer, shares a parameter between stages, has a trainable parameter that no
            stage uses, or has uninitialised (lazy) parameters; if ``blocks`` names what is not there.
    """

    def __init__(
        self,
        network: nn.Module | Sequence[nn.Module] | None = None,
        engine: str = "auto",
        batch_norm: BatchNormInCodeStep = "fixed",
        blocks: Blocks | None = None,
    ) -> None:
        if batch_norm not in ("fixed", "live"):
            raise ValueError(f"batch_norm must be 'fixed' or 'live', got {batch_norm!r}")
        self._reasons: dict[str, str] = {}
        self._named = False
        if isinstance(network, nn.Module):
            self.network = network
            leaves = self._leaves(network, _KeptWhole(network, blocks))
        else:
            leaves = self._listed(network, blocks)
        self.stages = _split(leaves, engine, batch_norm)
        self._refuse_unusable()

    one_code_per_stage = True
    """Whether a stage's weight problem can be solved as soon as its own code and the one below have moved."""

    _samples: SharedSamples | None = None

    @property
    def depth(self) -> int:
        """Number of stages with codes, L."""
        return len(self.stages) - 1

    def makers(self, codes: int | None = None) -> list[int]:
        """Which stage makes each of a batch's codes, from the first one up, and its output: indices of `stages`.

        Args:
            codes: Number of codes; as many as there are stages with codes if not given.
        """
        return list(range(self.depth + 1))

    def share(self, samples: SharedSamples | None) -> None:
        """Let BatchNorms take their batch statistics over the samples of several processes; ``None``: of this one.

        Raises:
            ValueError: If a stage with a BatchNorm has an engine that cannot do it.
        """
        self._samples = samples
        for stage in self.stages:
            stage.share(samples)

    def first_input(self, x: Tensor) -> Tensor:
        """What the first stage reads in the place of a code."""
        return x

    def refuse_codes(self, codes: CodeSolver) -> None:
        """Refuse a code solver that cannot serve this kind of network.

        Raises:
            ValueError: If it cannot.
        """
        return

    def whole_problem(self, problem: CodeProblem, step: Step, level: int) -> CodeProblem:
        """The problem of a code, with what reads it beside the stage above; here nothing does."""
        return problem

    def output_input(self, codes: Sequence[Tensor]) -> Tensor:
        """What the output stage reads of the codes."""
        return codes[-1]

    def stage_data(self, step: Step, index: int, moved: bool) -> StageData:
        """What a batch holds of one stage.

        Args:
            step: The batch, its codes solved.
            index: The stage, counted from 0 at the bottom.
            moved: Whether the moved code below is the stage's input, or the forward one.
        """
        hidden = index < self.depth
        return StageData(
            step.states[index],
            step.x if index == 0 else step.codes_forward[index - 1],
            step.moves[index - 1] if index > 0 and moved else None,
            step.codes_forward[index] if hidden else step.output,
            step.moves[index] if hidden else None,
            step.signals[index] if hidden else None,
            step.margins[index] if hidden else None,
        )

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
        with self.evaluating():
            return self.encode(x)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """In eval mode; buffers that are updated all the same are put back."""
        training = {module: module.training for module in self.network.modules()}
        samples = self._samples
        parts = [self.network, *(module for stage in self.stages for module in stage.modules)]
        owners = dict.fromkeys(owner for part in parts for owner in part.modules() if owner._buffers)
        self.network.eval()
        self.share(None)  # a BatchNorm without running statistics would wait for processes that evaluate nothing
        try:
            with block_buffers.restarted(block_buffers.kept(list(owners))):
                yield
        finally:
            self.share(samples)
            for module, mode in training.items():
                module.training = mode

    def __call__(self, x: Tensor) -> Tensor:
        """The ordinary forward pass."""
        output: Tensor = self.network(x)
        return output

    def verify_split(self, x: Tensor) -> None:
        """Check that the stages compute what the network computes.

        Raises:
            ValueError: If they differ.
        """
        refusal = self._split_is_wrong()
        try:
            # In full precision: the two may round at different places.
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                with self.evaluating():
                    output = self.encode(x).output
                with self.evaluating():
                    expected = self.network(x)
        except ValueError as error:
            raise ValueError(f"either x does not fit the network, or {refusal}: {error}") from error
        if expected.shape != output.shape or not torch.allclose(expected, output, rtol=1e-4, atol=1e-5, equal_nan=True):
            raise ValueError(refusal)

    def _split_is_wrong(self) -> str:
        kind = type(self.network).__name__
        if _is_sequential(self.network):
            return f"a forward hook on the {kind} changes its result, and no stage runs it; make a module of the hook"
        if self._named:
            return (
                f"{kind}.forward is not features -> (avgpool) -> flatten -> classifier, so its stages cannot be found "
                "by name; pass an nn.Sequential or a list of blocks instead"
            )
        return (
            f"the stages that tracing found in {kind}.forward compute something else; pass an nn.Sequential or a list "
            "of blocks instead"
        )

    @property
    def split_found(self) -> bool:
        """Whether stages were found by tracing or by name, or leave out a hook: not just an ``nn.Sequential``'s own."""
        return not _is_sequential(self.network) or runs_more_than_its_type(self.network)

    def explain(self, x: Tensor | None = None) -> str:
        """A table of the stages: layer, modules, shape of a sample's code, trainable parameters, engine.

        Below it, why operations that tracing found could not be cut apart.

        Args:
            x: Optional sample batch; with it the table shows code shapes. The network is run once in eval mode.
        """
        shapes = ["?"] * len(self.stages)
        if x is not None:
            encoding = self.encode_as_evaluated(x)
            for maker, c in zip(self.makers(len(encoding.codes)), (*encoding.codes, encoding.output), strict=True):
                shapes[maker] = "x".join(map(str, c.shape[1:]))
        rows = [("stage", "modules", "code", "parameters", "engine")]
        for stage, shape in zip(self.stages, shapes, strict=True):
            count = sum(p.numel() for p in stage.parameters() if p.requires_grad)
            code = f"{shape} (output)" if stage.is_output else shape
            rows.append((stage.name, stage.description, code, f"{count:,}", stage.engine.kind))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        table = "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)
        together: dict[str, list[str]] = {}
        for name, why in self._reasons.items():
            together.setdefault(why, []).append(name)
        reasons = "".join(f"\n{', '.join(names)}: {why}" for why, names in together.items())
        return f"{table}\n\nKept together:{reasons}" if reasons else table

    def _listed(self, network: Sequence[nn.Module] | None, blocks: Blocks | None) -> list[tuple[str, nn.Module]]:
        if network is not None and blocks is not None:
            raise TypeError("blocks selects modules of one network; network is a list of blocks already")
        given = (blocks or ()) if network is None else network
        listed = list(given) if isinstance(given, Iterable) else [given]
        modules = [block for block in listed if isinstance(block, nn.Module)]
        if not modules or len(modules) < len(listed):
            classes = [f"{block.__name__}(...)" for block in listed if isinstance(block, type)]
            advice = f"; pass instances, {', '.join(classes)}, in place of classes" if classes else ""
            raise TypeError(f"network must be a module or a non-empty list of modules (blocks), got {given!r}{advice}")
        self.network = nn.Sequential(*modules)
        return [(str(index), block) for index, block in enumerate(modules)]

    def _leaves(self, network: nn.Module, kept: _KeptWhole) -> list[tuple[str, nn.Module]]:
        if _is_sequential(network):
            return list(_flatten(network, "", kept))
        try:
            pieces = trace(network, kept)
        except UntraceableError as error:
            return self._leaves_by_name(network, kept, str(error))
        self._reasons = {piece.name: piece.reason for piece in pieces if piece.reason}
        return [(piece.name, piece.module) for piece in pieces]

    def _leaves_by_name(self, network: nn.Module, kept: _KeptWhole, why: str) -> list[tuple[str, nn.Module]]:
        self._named = True
        features, classifier = getattr(network, "features", None), getattr(network, "classifier", None)
        if not (isinstance(features, nn.Module) and isinstance(classifier, nn.Module)):
            raise TypeError(
                f"network of type {type(network).__name__} cannot be split: {why}. Pass an nn.Sequential, a list of "
                "blocks, or a module with .features and .classifier"
            )
        leaves = list(_flatten(features, "features", kept))
        if isinstance(pool := getattr(network, "avgpool", None), nn.Module):
            leaves += list(_flatten(pool, "avgpool", kept))
        leaves.append(("flatten", nn.Flatten()))
        return leaves + list(_flatten(classifier, "classifier", kept))

    def _refuse_unusable(self) -> None:
        if self.depth < 1:
            together = "".join(f" ({name}: {why})" for name, why in self._reasons.items())
            raise ValueError(
                f"network has no hidden layer, so there is no code to optimise{together}; add one, or train it with "
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


class _KeptWhole:
    """Which modules the user wants to be one stage each."""

    def __init__(self, network: nn.Module, blocks: Blocks | None) -> None:
        blocks = [] if blocks is None else list(blocks)
        self._names = {block for block in blocks if isinstance(block, str)}
        self._types = tuple(block for block in blocks if isinstance(block, type))
        self._modules = {id(block) for block in blocks if isinstance(block, nn.Module)}
        inside = dict(network.named_modules())
        types = {kind for module in inside.values() for kind in type(module).__mro__}
        there = {id(module) for module in inside.values()}
        for block in blocks:
            if isinstance(block, str):
                found = block in inside
            elif isinstance(block, type):
                found = block in types
            elif isinstance(block, nn.Module):
                found = id(block) in there
            else:
                raise TypeError(f"blocks must hold modules, their types or their names, got {block!r}")
            if not found:
                raise ValueError(f"blocks: {type(network).__name__} has no module {block!r}")

    def __call__(self, name: str, module: nn.Module) -> bool:
        return name in self._names or isinstance(module, self._types) or id(module) in self._modules


def _flatten(module: nn.Module, prefix: str, kept: _KeptWhole) -> Iterator[tuple[str, nn.Module]]:
    """Leaves of nested Sequentials with their dotted names.

    Only plain Sequentials are opened, or subclasses that keep its forward: another forward would compute something
    else, and so may a hook, except on the network itself, whose split `CodedNetwork.verify_split` then checks.
    """
    closed = prefix and (kept(prefix, module) or runs_more_than_its_type(module))
    if _is_sequential(module) and not closed:
        for name, child in module._modules.items():  # named_children() leaves out a module that is used twice
            assert child is not None  # a Sequential calls every entry
            yield from _flatten(child, f"{prefix}.{name}" if prefix else name, kept)
    else:
        yield prefix, module


def _is_sequential(module: nn.Module) -> bool:
    """Whether its forward calls its modules in order, and does nothing else."""
    keeps_forward = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
    return keeps_forward and not has_own_forward(module)


def _split(leaves: Iterable[tuple[str, nn.Module]], engine: str, batch_norm: BatchNormInCodeStep) -> list[Stage]:
    """Group leaves into stages; a new stage's transfer begins after each layer and its normalisation."""
    groups: list[tuple[str, list[nn.Module], list[nn.Module]]] = []
    transfer: list[nn.Module] = []
    follows_layer = False
    for name, module in leaves:
        if follows_layer and (isinstance(module, NORMALIZATION) or _only_adds_parameters(module)):
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


def _only_adds_parameters(module: nn.Module) -> bool:
    """Whether it is a traced operation with parameters but no layer, such as the addition of a learned position."""
    return isinstance(module, TracedBlock) and not module.has_layer and any(True for _ in module.parameters())


def _is_layer(module: nn.Module) -> bool:
    if isinstance(module, TracedBlock):
        return module.has_layer
    if isinstance(module, NOT_LAYERS):
        return False
    return any(True for _ in module.parameters())
