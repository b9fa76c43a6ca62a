"""Orthogonal weights modification: layers learn where the inputs of earlier tasks leave them room."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_altmin.arguments import check_count, check_number
from lightning_altmin.continual.callbacks.penalty import Tensors
from lightning_altmin.continual.callbacks.stream_access import (
    evaluating,
    inputs_and_labels,
    refuse_layer_parallelism,
    refuse_several_weight_steps,
    stream_data,
)
from lightning_altmin.continual.task import Task
from lightning_altmin.weights.least_squares_layer import LeastSquaresLayer
from lightning_altmin.weights.ridge import damped_inverse


class OrthogonalWeights(Callback):
    r"""Orthogonal weights modification: steps that leave a layer's answers to earlier inputs as they are.

    Each protected layer remembers the second moments of its inputs ``a`` (with a one appended for a bias), as a
    co-activation memory does: after each task, :math:`A \leftarrow A + \overline{a a^\top}`, a mean over the task's
    training samples and positions. From the second task on, before each step, the gradient ``G`` of the layer's weights
    becomes

    .. math:: G P, \qquad P = \rho \, (A + \rho I)^{-1}, \qquad \rho = ridge \cdot \text{mean}(\text{diag} A) / tasks,

    which is near ``G`` along inputs that were never seen, and near 0 along those that earlier tasks used: codes of
    earlier tasks hardly move, at any depth (Zeng, Chen, Cui & Yu, "Continual learning of context-dependent processing
    in neural networks", 2019, who update ``P`` by recursive least squares, batch after batch). No sample is stored.

    Gradients are edited, so it serves backprop and alternating minimization alike, but the step must be along the
    gradient: **SGD, with or without momentum; Adam's division per weight undoes the projection.** Momentum carries
    the last task's unprotected direction into the next for some steps; ``ResetOptimizerState`` clears it.

    Args:
        ridge: Of the projection, > 0: small ones protect more and leave less to learn with.
        samples: Training samples per task that the moments are taken of, >= 1, chosen at random; ``None`` for all.
        layers: Names of the modules that are protected, such as ``"network.0"`` (``"core.network.0"`` in an
            `AltMinModule`); ``None`` for all trained ``Linear`` and ungrouped ``Conv2d``. An output layer that a memory
            solves for must be left out.
        seed: Of the choice of samples; global generators are not used.

    Attributes:
        moments: ``A`` by layer name, shape ``(inputs, inputs)``; empty before the first task is over.
        tasks: How many tasks are in them.

    Raises:
        ValueError: If an argument is out of range; at the end of a task if a protected layer was never called.
    """

    def __init__(
        self, ridge: float = 0.3, samples: int | None = 1000, layers: Sequence[str] | None = None, seed: int = 0
    ) -> None:
        check_number("ridge", ridge, above=0)
        if samples is not None:
            check_count("samples", samples, otherwise="None for all")
        self.ridge = ridge
        self.samples = samples
        self.layers = None if layers is None else list(layers)
        self.seed = seed
        self.moments: Tensors = {}
        self.tasks = 0
        self._projections: Tensors = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is a stream, that the layers exist, and that every step is seen."""
        if stage != "fit":
            return
        refuse_layer_parallelism(trainer, self)
        stream_data(trainer, self)
        refuse_several_weight_steps(pl_module, self)
        self._protected(pl_module)
        self.moments, self.tasks, self._projections = {}, 0, {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse optimizers whose steps are not along the gradient."""
        protected = {id(p) for layer in self._protected(pl_module).values() for p in layer.parameters}
        for optimizer in _plain(trainer.optimizers):
            holds = any(id(p) in protected for group in optimizer.param_groups for p in group["params"])
            if holds and not isinstance(optimizer, torch.optim.SGD):
                raise MisconfigurationException(
                    f"OrthogonalWeights needs torch.optim.SGD for the layers it protects, got "
                    f"{type(optimizer).__name__}, whose step is not along the projected gradient; use SGD, or name in "
                    "layers=[...] only those that SGD trains"
                )

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Project the gradients."""
        if not self.moments:
            return
        for name, layer in self._protected(pl_module).items():
            gradients = [p.grad for p in layer.parameters]
            if name not in self.moments or any(gradient is None for gradient in gradients):
                continue
            projected = layer.join([g for g in gradients if g is not None]) @ self._projection(name, layer)
            for parameter, part in layer.split(projected):
                parameter.grad = part

    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        """Remember what the layers' inputs were."""
        for name, moments in self.second_moments(trainer, pl_module, task).items():
            before = self.moments.get(name)
            self.moments[name] = moments if before is None else before.to(moments.device) + moments
        self.tasks += 1
        self._projections = {}

    @torch.no_grad()
    def second_moments(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> Tensors:
        """Mean of ``a a^T`` over a task's training samples and positions, by layer name.

        Raises:
            ValueError: If a layer is never called.
        """
        layers = self._protected(pl_module)
        sums = {name: _zeros(layer) for name, layer in layers.items()}
        with evaluating(pl_module), _observed(layers, sums):
            for batch in stream_data(trainer, self).training_samples(task.index, self.samples, self.seed):
                x, _ = inputs_and_labels(pl_module, trainer.strategy.batch_to_device(batch))
                pl_module(x)
        if trainer.world_size > 1:
            reduced: Any = {name: trainer.strategy.reduce(total, reduce_op="sum") for name, total in sums.items()}
            sums = reduced
        if unseen := [name for name, total in sums.items() if not bool(total[-1, 0])]:
            # Their moments are zero, so is the projection made of them, and they would stay frozen from here on.
            raise ValueError(
                f"OrthogonalWeights saw no input of the layers {unseen}: the forward pass reads their weights without "
                "calling them, as attention does, or does not use them; name the others in layers=[...]"
            )
        return {name: total[:-1] / total[-1, 0].clamp_min(1) for name, total in sums.items()}

    @property
    def state_bytes(self) -> int:
        """Bytes of the moments; projections of the layers' own precision are made of them for every task."""
        return sum(t.numel() * t.element_size() for t in self.moments.values())

    def state_dict(self) -> dict[str, Any]:
        """The moments, and how many tasks are in them."""
        return {"moments": dict(self.moments), "tasks": self.tasks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them over."""
        self.moments, self.tasks = dict(state_dict["moments"]), state_dict["tasks"]
        self._projections = {}

    def _projection(self, name: str, layer: LeastSquaresLayer) -> Tensor:
        if name not in self._projections:
            moments, rho = self.moments[name].to(layer.layer.weight.device), self.ridge / self.tasks
            projection = rho * moments.diagonal().mean() * damped_inverse(moments, rho)
            self._projections[name] = projection.to(layer.layer.weight)
        return self._projections[name]

    def _protected(self, pl_module: LightningModule) -> dict[str, LeastSquaresLayer]:
        found = {}
        for name, module in pl_module.named_modules():
            if (self.layers is None or name in self.layers) and _projectable(module):
                found[name] = LeastSquaresLayer(module)
        if self.layers is not None and (unknown := sorted(set(self.layers) - set(found))):
            raise ValueError(
                f"layers names {unknown}, which are not trained Linear or ungrouped Conv2d layers of the module"
            )
        if not found:
            raise ValueError("OrthogonalWeights finds no trained Linear or ungrouped Conv2d layer to protect")
        return found


def _projectable(module: nn.Module) -> bool:
    if not isinstance(module, nn.Linear | nn.Conv2d) or not module.weight.requires_grad:
        return False
    return isinstance(module, nn.Linear) or module.groups == 1


def _zeros(layer: LeastSquaresLayer) -> Tensor:
    """For sums of ``a a^T``, and a last row for their number; in double precision, where the device has it.

    In single precision, rounding of sums that have no full rank would be as large as a small ridge.
    """
    weight = layer.layer.weight
    dtype = weight.dtype if weight.device.type == "mps" else torch.float64
    return weight.new_zeros(layer.inputs + 1, layer.inputs, dtype=dtype)


def _plain(optimizers: Sequence[Any]) -> Iterator[Optimizer]:
    """The optimizers themselves, composites opened."""
    for optimizer in optimizers:
        children = getattr(optimizer, "children", None)
        yield from _plain(list(children.values())) if isinstance(children, dict) else [optimizer]


@contextmanager
def _observed(layers: dict[str, LeastSquaresLayer], sums: Tensors) -> Iterator[None]:
    """Add up ``a a^T`` of every input of the layers; the last row begins with the number of rows."""

    def add(name: str, x: Tensor) -> None:
        for (rows,) in layers[name].chunks(x):
            rows = rows.to(sums[name].dtype)
            sums[name][:-1] += rows.t() @ rows
            sums[name][-1, 0] += len(rows)

    handles = [
        layer.layer.register_forward_pre_hook(lambda module, inputs, name=name: add(name, inputs[0]))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
