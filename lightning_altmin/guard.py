"""Protection of a model from a bad batch: NaN or inf in the data, labels out of range, a diverging update.

On the CPU a batch is judged at once. On an accelerator looking at a value would stall the device, so the verdict stays
a tensor there: a bad batch's update is undone by ``found_inf`` (fused optimizers) or by ``torch.where``, and the error
is raised when somebody asks, at the next log point, epoch end or save.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_altmin.engines import Gradients

Policy = Literal["raise", "skip"]


class NonFiniteError(RuntimeError):
    """A batch would have made the model non-finite; the model is as it was before that batch."""


class Buffers:
    """Buffers before a batch, to put back if the batch is bad or fails.

    An owner whose attribute ``replaces_buffers`` is true never writes into its buffers but sets new ones: its old ones
    are kept as they are, without a copy.

    Args:
        owners: Modules whose own buffers these are, as `buffer_owners` finds them.
    """

    def __init__(self, owners: Sequence[nn.Module]) -> None:
        self._written = [
            (owner, name, buffer, buffer.clone())
            for owner in owners
            if not getattr(owner, "replaces_buffers", False)
            for name, buffer in owner._buffers.items()
            if buffer is not None
        ]
        self._replaced = [
            (owner, name, buffer)
            for owner in owners
            if getattr(owner, "replaces_buffers", False)
            for name, buffer in owner._buffers.items()
        ]

    def restore(self) -> None:
        """Put all buffers back."""
        with torch.no_grad():
            for owner, name, buffer, before in self._written:
                owner._buffers[name] = buffer.copy_(before)  # it may have been written to, or another set in its place
        for owner, name, old in self._replaced:
            owner._buffers[name] = old

    def moved(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        """Owner and name of each floating-point buffer that may be written to, and whether it differs from before."""
        for owner, name, _, before in self._written:
            if before.is_floating_point() and (now := owner._buffers[name]) is not None:
                yield owner, name, (now != before).any()

    @contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """Put all buffers back if the body raises."""
        try:
            yield
        except BaseException:  # whatever it is, it is raised again: an interrupted batch must not leave traces either
            self.restore()
            raise

    def restore_where(self, bad: Tensor) -> None:
        """Put all buffers back if ``bad``, without looking at it."""
        with torch.no_grad():
            for owner, name, buffer, before in self._written:
                now = owner._buffers[name]
                owner._buffers[name] = buffer.copy_(before if now is None else torch.where(bad, before, now))
            for owner, name, old in self._replaced:
                now = owner._buffers[name]
                if now is not old and now is not None and old is not None:
                    owner._buffers[name] = torch.where(bad, old, now)


def buffer_owners(*modules: nn.Module) -> list[nn.Module]:
    """Every module in ``modules`` that has buffers of its own; found once, for walking a network takes its time."""
    return [owner for module in modules for owner in module.modules() if owner._buffers]


class Guard(ABC):
    """Judges batches and keeps bad ones from changing anything.

    Args:
        policy: ``"raise"`` stops with `NonFiniteError` at the first bad batch; ``"skip"`` leaves bad batches out and
            counts them.
    """

    def __init__(self, policy: Policy) -> None:
        if policy not in ("raise", "skip"):
            raise ValueError(f"nonfinite must be 'raise' or 'skip', got {policy!r}")
        self.policy = policy
        self._skipped_before = 0

    def follow(self, old: Guard) -> None:
        """Go on in the place of ``old``, whose model moved to another kind of device.

        Raises:
            NonFiniteError: If ``old`` has a bad batch to report.
        """
        old.check()
        self._skipped_before = old.skipped

    @abstractmethod
    def admit(self, batch: int, inner: int, gradients: Gradients, bad: Tensor, buffers: Buffers) -> Gradients:
        """Take a batch's gradients, or refuse them; returns those that may be used.

        Args:
            batch: Number of the batch, counted from 0 since a run began, for the error.
            inner: Number of weight steps already taken on it: a batch is judged at each, and counts once.
            gradients: Every trainable parameter with its gradient.
            bad: The verdict, as `is_bad` finds it.
            buffers: Buffers as they were before the batch, put back if it is bad.

        Raises:
            NonFiniteError: At once on a device that can be asked without a stall, under policy ``"raise"``.
        """

    @abstractmethod
    @contextmanager
    def protect(self, optimizer: Optimizer) -> Iterator[None]:
        """Step ``optimizer`` inside this context; a bad batch leaves parameters and optimizer state as they were."""
        yield

    @abstractmethod
    def check(self) -> None:
        """Look at the verdicts so far (this may wait for the device).

        Raises:
            NonFiniteError: If a batch was bad under policy ``"raise"``.
        """

    @property
    @abstractmethod
    def skipped(self) -> int:
        """Number of batches left out so far; asking may wait for the device."""

    @staticmethod
    def error(batch: int) -> NonFiniteError:
        """The error that names a bad batch."""
        return NonFiniteError(
            f"batch {batch} (counted from 0 since training began) is bad: NaN or inf in its data, labels out of range, "
            "or an update that diverged. Its update was not made. Look at that batch, lower the learning rates or "
            "raise mu; nonfinite='skip' leaves such batches out."
        )


class ImmediateGuard(Guard):
    """For the CPU: one comparison per batch, at once."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy)
        self._skipped = 0
        self._is_counted = False  # the batch that is being judged

    def admit(self, batch: int, inner: int, gradients: Gradients, bad: Tensor, buffers: Buffers) -> Gradients:
        self._is_counted = self._is_counted and inner > 0
        if not bool(bad):
            return gradients
        buffers.restore()
        if self.policy == "raise":
            raise self.error(batch)
        self._skipped += not self._is_counted
        self._is_counted = True
        return []

    @contextmanager
    def protect(self, optimizer: Optimizer) -> Iterator[None]:
        yield  # gradients of a bad batch never got here, and optimizers leave parameters without one alone

    def check(self) -> None:
        pass  # bad batches were reported when they came

    @property
    def skipped(self) -> int:
        return self._skipped_before + self._skipped


class DeferredGuard(Guard):
    """For accelerators: verdicts stay on the device, nothing waits for it."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy)
        self._bad: Tensor | None = None  # this batch (skip) or any batch so far (raise)
        self._count: Tensor | None = None
        self._first: Tensor | None = None
        self._batch_bad: Tensor | None = None  # the verdict on the batch judged last alone
        self._stateless = False  # an optimizer that has stepped and made no state

    def admit(self, batch: int, inner: int, gradients: Gradients, bad: Tensor, buffers: Buffers) -> Gradients:
        if self._count is None or self._first is None:
            self._count = torch.zeros((), dtype=torch.long, device=bad.device)
            self._first = torch.full((), -1, dtype=torch.long, device=bad.device)
        known = self._batch_bad if inner > 0 and self._batch_bad is not None else torch.zeros_like(bad)
        self._first = torch.where((self._first < 0) & bad, batch, self._first)
        self._count = self._count + (bad & ~known)
        bad = self._batch_bad = bad | known
        if self.policy == "raise" and self._bad is not None:
            bad = bad | self._bad  # steps are no-ops from the first bad batch until the error is raised
        self._bad = bad
        buffers.restore_where(bad)
        return [(p, _zeroed_where(bad, g, p)) for p, g in gradients]

    @contextmanager
    def protect(self, optimizer: Optimizer) -> Iterator[None]:
        if self._bad is None:
            yield
            return
        if not optimizer.state and not self._stateless:
            yield from self._protect_first_step(optimizer)
            return
        if all(group.get("fused") for group in optimizer.param_groups):
            optimizers = list(getattr(optimizer, "children", {"": optimizer}).values())
            for each in optimizers:
                each.grad_scale, each.found_inf = None, self._bad.float()
            try:
                yield
            finally:
                for each in optimizers:
                    del each.grad_scale, each.found_inf
            return
        before = [(tensor, tensor.clone()) for tensor in _tensors(optimizer)]
        known = {id(tensor) for tensor, _ in before}
        yield
        with torch.no_grad():
            for tensor, old in before:
                tensor.copy_(torch.where(self._bad, old, tensor))
            for tensor in _tensors(optimizer):
                if id(tensor) not in known:  # state made by this step begins at zero
                    tensor.copy_(torch.where(self._bad, torch.zeros_like(tensor), tensor))

    def _protect_first_step(self, optimizer: Optimizer) -> Iterator[None]:
        # The state of an optimizer is made in its first step, and not every optimizer's state begins at zero: a bad
        # batch must not make it. So that step alone waits for the verdict. Parameters without gradient are left alone.
        if bool(self._bad):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
            yield
            return
        yield
        self._stateless = not optimizer.state

    def check(self) -> None:
        if self.policy == "raise" and self._first is not None and (first := int(self._first)) >= 0:
            # Reported; whoever catches the error may go on, and count batches from 0 again.
            self._bad = self._count = self._first = self._batch_bad = None
            raise self.error(first)

    @property
    def skipped(self) -> int:
        return self._skipped_before + (0 if self._count is None else int(self._count))


def guard_for(device: torch.device, policy: Policy) -> Guard:
    """The guard that fits a device."""
    return ImmediateGuard(policy) if device.type == "cpu" else DeferredGuard(policy)


def is_bad(gradients: Gradients, evidence: Sequence[Tensor]) -> Tensor:
    """Whether a batch must not be used, a bool scalar on its device.

    Args:
        gradients: Every trainable parameter with its gradient.
        evidence: Scalars that must be finite, and bool scalars that must be true.
    """
    # NaN and inf survive a sum of squares. A finite gradient whose squares overflow counts as diverged: Adam's second
    # moment would become inf and freeze the parameter for good. A dot product costs a tenth of a norm.
    sums = [_square_sum(g) for _, g in gradients] + [e for e in evidence if e.is_floating_point()]
    total = torch.stack(sums).sum()
    bad = total - total != 0  # what isfinite says, in fewer kernels
    for truth in (e for e in evidence if e.dtype == torch.bool):
        bad = bad | ~truth
    return bad


def _square_sum(gradient: Tensor) -> Tensor:
    if gradient.is_sparse:
        gradient = gradient.coalesce().values()
    if gradient.dtype == torch.float16:
        gradient = gradient.float()  # squares of moderate halves overflow
    flat = gradient.reshape(-1)
    return flat.dot(flat)


def _zeroed_where(bad: Tensor, gradient: Tensor, parameter: Tensor) -> Tensor:
    """In the gradient's own memory where that is nobody else's: a copy of all gradients would be the step's peak."""
    own = not gradient.is_sparse and gradient.is_contiguous() and gradient.data_ptr() != parameter.data_ptr()
    return gradient.masked_fill_(bad, 0) if own else _zero_where(bad, gradient)


def _zero_where(bad: Tensor, gradient: Tensor) -> Tensor:
    if gradient.is_sparse:
        gradient = gradient.coalesce()
        values = _zero_where(bad, gradient.values())
        return torch.sparse_coo_tensor(gradient.indices(), values, gradient.shape, check_invariants=False)
    return torch.where(bad, torch.zeros((), dtype=gradient.dtype, device=gradient.device), gradient)


def _tensors(optimizer: Optimizer) -> list[Tensor]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = [v for values in optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]
    return parameters + state
