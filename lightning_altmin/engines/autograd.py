"""The autograd engine: any differentiable block as a stage. It is also the oracle the closed form is checked with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_altmin.engines import batch_norm_state, block_buffers
from lightning_altmin.engines.base import BatchState, Gradients, StageEngine, StageMap
from lightning_altmin.engines.block_batch_norms import BlockBatchNorms, SharedBlockBatchNorms
from lightning_altmin.engines.shared_samples import SharedSamples


@dataclass
class _Start:
    """What encode began from with some samples: the random state if it drew from it, and the block's buffers."""

    samples: int
    random: list[Tensor] | None
    buffers: block_buffers.Kept

    @contextmanager
    def again(self, device: torch.device) -> Iterator[None]:
        """Begin from the same, then put back what was there."""
        random = nullcontext() if self.random is None else _replayed(self.random, device)
        with random, block_buffers.restarted(self.buffers):
            yield


@dataclass
class _State:
    """What a batch fixed in the stage: BatchNorm statistics, and where encode began, one start for each of its parts.

    ``writes`` tells whether encode wrote to buffers, by which a sample's output may depend on the others.
    """

    statistics: batch_norm_state.Statistics
    starts: list[_Start]
    writes: bool


class AutogradMap(StageMap):
    """A stage at one input; every derivative is an autograd call on a graph of this stage alone."""

    def __init__(
        self,
        evaluate: Callable[[Tensor], Tensor],
        x: Tensor,
        modules: Sequence[nn.Module],
        move: Tensor | None = None,
        mixed: BlockBatchNorms | None = None,
    ) -> None:
        self._evaluate = evaluate
        self._mixed = mixed  # over which samples a size is taken, if a sample's output depends on the others
        self._modules = modules
        self._base, self._move = x.detach(), move
        self._x = self._base if move is None else self._base + move
        self._output: Tensor | None = None

    def output(self) -> Tensor:
        if self._output is None:
            with torch.no_grad():
                self._output = self._evaluate(self._x)
        return self._output

    def change(self, base_output: Tensor) -> Tensor:
        base, move = self._base, self._move
        if move is None:
            return self.output() - base_output
        # The difference of two outputs loses the digits of a move that is small beside the code. So a small move is
        # lengthened to the root of the precision, where rounding and curvature spoil the difference alike and little,
        # and the difference shortened again. Less than twice as long gains no digit, and could only carry a sample
        # across a kink that its move does not reach. Samples that are mixed, as by a live BatchNorm, share one factor.
        root = torch.finfo(move.dtype).eps ** 0.5
        size = _size_by_sample if self._mixed is None else self._mixed.size
        ratio = size(base) / size(move)
        longer = torch.nn.functional.threshold((root * ratio).nan_to_num(1.0), 2.0, 1.0)
        with torch.no_grad():
            output = self._evaluate(base + move * longer.view(-1, *[1] * (move.dim() - 1)))
            return (output - base_output) / longer.view(-1, *[1] * (output.dim() - 1))

    def layer_input(self, layer: nn.Module) -> Tensor:
        seen: list[Tensor] = []
        hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
        try:
            with torch.no_grad():
                self._output = self._evaluate(self._x)
        finally:
            hook.remove()
        return seen[0]

    def _differentiate(
        self, x: Tensor, targets: Sequence[Tensor], grad_output: Tensor, used: bool = True
    ) -> tuple[Tensor | None, ...]:
        """Gradients of ``targets``; all ``None`` if none is used, where that is not an error."""
        with torch.enable_grad():
            output = self._evaluate(x)
        if not output.requires_grad and not used:
            return (None,) * len(targets)
        if not output.requires_grad:
            raise RuntimeError(
                f"no gradient flows through {[type(m).__name__ for m in self._modules]}; a code solver that needs "
                "gradients cannot train what lies below it. Use a differentiable activation or another code solver."
            )
        self._output = output.detach()
        return torch.autograd.grad(output, targets, grad_output.to(output.dtype), allow_unused=True)

    def input_gradient(self, grad_output: Tensor) -> Tensor:
        x = self._x.detach().requires_grad_()
        (gradient,) = self._differentiate(x, [x], grad_output)
        return torch.zeros_like(x) if gradient is None else gradient

    def parameter_gradients(self, grad_output: Tensor) -> Gradients:
        parameters = list(dict.fromkeys(p for m in self._modules for p in m.parameters() if p.requires_grad))
        if not parameters:
            return []
        gradients = self._differentiate(self._x, parameters, grad_output, used=False)
        return [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]


class AutogradEngine(StageEngine):
    """Evaluates a stage by calling its modules and differentiates it with autograd, one stage at a time.

    Random modules without an explicit mask are handled by replaying the random state that encode started from, so
    a batch sees one mask in all its phases. Buffers that the block updates are handled alike: every phase runs it from
    copies of what encode started from, so a batch sees one function.
    """

    kind: ClassVar[str] = "autograd"

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = list(modules)
        norms = self._norms = batch_norm_state.batch_norms(self._modules)
        self._batch_norms = BlockBatchNorms(norms)
        self._stateful = [m for module in self._modules for m in module.modules() if m._buffers and m not in norms]
        self._inplace = any(getattr(m, "inplace", False) for module in self._modules for m in module.modules())

    def encode(self, x: Tensor) -> tuple[Tensor, BatchState]:
        before, buffers = _random_state(x.device), block_buffers.kept(self._stateful)
        version, versions = x._version, block_buffers.versions(self._stateful)
        with torch.no_grad(), self._batch_norms.captured() as statistics:
            output = self._run(x)
        if x._version != version:
            raise ValueError(
                f"{[type(m).__name__ for m in self._modules]} overwrites its input, which is a code that is still "
                "needed; use the out-of-place function, or an activation module, whose inplace=True is handled"
            )
        used = any(not torch.equal(a, b) for a, b in zip(before, _random_state(x.device), strict=True))
        start = _Start(x.shape[0], before if used else None, buffers)
        return output, _State(statistics, [start], block_buffers.versions(self._stateful) != versions)

    def share(self, samples: SharedSamples | None) -> None:
        norms = self._norms
        self._batch_norms = BlockBatchNorms(norms) if samples is None else SharedBlockBatchNorms(norms, samples)

    def joined(self, states: Sequence[BatchState]) -> BatchState:
        if len(states) > 1 and any(state.statistics for state in states):
            raise ValueError("a BatchNorm in training mode normalises by the whole batch, which was encoded in parts")
        starts = [start for state in states for start in state.starts]
        return _State(states[0].statistics, starts, any(state.writes for state in states))

    def fixed(self, x: Tensor, state: BatchState, move: Tensor | None = None) -> StageMap:
        return self._map(x, state, lambda: self._batch_norms.held(state.statistics), move, _mixed(state))

    def live(self, x: Tensor, state: BatchState, move: Tensor | None = None) -> StageMap:
        mixed = self._batch_norms if state.statistics else _mixed(state)
        return self._map(x, state, self._batch_norms.live, move, mixed)

    def _map(
        self,
        x: Tensor,
        state: _State,
        norms: Callable[[], AbstractContextManager[None]],
        move: Tensor | None,
        mixed: BlockBatchNorms | None,
    ) -> StageMap:
        def evaluate(inputs: Tensor) -> Tensor:
            with norms():
                return self._run_again(inputs, state.starts)

        return AutogradMap(evaluate, x, self._modules, move, mixed)

    def _run_again(self, x: Tensor, starts: list[_Start]) -> Tensor:
        if not any(start.random or start.buffers for start in starts):
            return self._run(x)
        outputs = []
        parts = [x] if len(starts) == 1 else torch.split(x, [start.samples for start in starts])
        for part, start in zip(parts, starts, strict=True):
            with start.again(x.device):
                outputs.append(self._run(part))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _run(self, x: Tensor) -> Tensor:
        if self._inplace:  # an in-place activation would overwrite the code it is given
            x = x.clone()
        for module in self._modules:
            x = module(x)
        return x


def _mixed(state: _State) -> BlockBatchNorms | None:
    """What mixes the samples of this process, apart from BatchNorms: buffers that their run writes to."""
    return BlockBatchNorms([]) if state.writes else None


def _size_by_sample(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values, dim=list(range(1, values.dim())))


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


@contextmanager
def _replayed(states: list[Tensor], device: torch.device) -> Iterator[None]:
    """Run from the given random state, then put back the one that was there."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(states[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(states[1], device)
        yield
