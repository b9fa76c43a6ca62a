"""Online elastic weight consolidation."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from lightning_altmin.arguments import check_count, check_number
from lightning_altmin.continual.callbacks.penalty import QuadraticPenalty, Tensors, copies, trained
from lightning_altmin.continual.callbacks.stream_access import evaluating, inputs_and_labels, stream_data
from lightning_altmin.continual.task import Task
from lightning_altmin.data.seeding import derived_generator

Fisher = Literal["exact", "sample", "empirical"]
_CHUNK = 2**25  # entries of gradients held at once


class OnlineEWC(QuadraticPenalty):
    r"""Online elastic weight consolidation: weights that mattered for earlier tasks are held near their values.

    After each task, :math:`\Omega \leftarrow \gamma \Omega + F`, with ``F`` the diagonal of the Fisher information of
    the task's training samples (a mean over samples), and the anchor becomes the weights (Schwarz et al., "Progress &
    Compress", 2018, after Kirkpatrick et al. 2017). The module's ``forward`` must return logits. The Fisher information
    is computed by backprop, whatever trains the weights. In class-incremental streams EWC is known to end near naive
    training; its home is task-incremental ones.

    Args:
        strength: Weight of the penalty, >= 0.
        gamma: Discount of earlier tasks' importance per task, in [0, 1].
        fisher: Whose labels the gradients are of: all, by their probability (``"exact"``); one drawn from the model
            per sample (``"sample"``); the true ones (``"empirical"``). These give different numbers.
        samples: Samples per task that it is computed of, chosen at random; ``None`` for all.
        seed: Of that choice and of drawn labels; global generators are not used.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        strength: float = 100.0,
        gamma: float = 1.0,
        fisher: Fisher = "exact",
        samples: int | None = 1000,
        seed: int = 0,
    ) -> None:
        super().__init__(strength)
        check_number("gamma", gamma, least=0, most=1)
        if fisher not in ("exact", "sample", "empirical"):
            raise ValueError(f"fisher must be 'exact', 'sample' or 'empirical', got {fisher!r}")
        if samples is not None:
            check_count("samples", samples, otherwise="None for all")
        self.gamma = gamma
        self.fisher = fisher
        self.samples = samples
        self.seed = seed

    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        """Measure what mattered for the task."""
        fisher = self.information(trainer, pl_module, task)
        for name, value in fisher.items():
            before = self.importance.get(name)
            self.importance[name] = value if before is None else self.gamma * before + value
        self.anchor = copies(pl_module)

    def information(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> Tensors:
        """Diagonal of the Fisher information, by parameter name."""
        data = stream_data(trainer, self)
        parameters = {name: p.detach() for name, p in trained(pl_module).items()}
        total = {name: torch.zeros_like(p) for name, p in parameters.items()}
        generator = derived_generator(self.seed, task.index)
        count = 0
        for batch in data.training_samples(task.index, self.samples, self.seed):
            x, y = inputs_and_labels(pl_module, trainer.strategy.batch_to_device(batch))
            with evaluating(pl_module):
                _add_squares(pl_module, parameters, x, y, self.fisher, generator, total)
            count += len(y)
        if trainer.world_size == 1:
            return {name: value / count for name, value in total.items()}
        whole: Any = trainer.strategy.reduce(torch.tensor(float(count), device=pl_module.device), reduce_op="sum")
        sums: dict[str, Any] = {n: trainer.strategy.reduce(v, reduce_op="sum") for n, v in total.items()}
        return {name: value / whole for name, value in sums.items()}


def _add_squares(
    module: LightningModule, parameters: Tensors, x: Tensor, y: Tensor, kind: Fisher, g: torch.Generator, total: Tensors
) -> None:
    """Add every sample's squared gradients of log-likelihoods."""

    def loss(values: Tensors, sample: Tensor, weights: Tensor) -> Tensor:
        """Cross-entropy against a label, given as weights of the classes."""
        logits = functional_call(module, values, (sample.unsqueeze(0),)).squeeze(0)
        return -(functional.log_softmax(logits, 0) * weights).sum()

    gradients = vmap(grad(loss), in_dims=(None, 0, 0), randomness="different")
    chunk = max(1, _CHUNK // sum(p.numel() for p in parameters.values()))
    for start in range(0, len(x), chunk):
        part, labels = x[start : start + chunk], y[start : start + chunk]
        with torch.no_grad():
            probabilities = functional.softmax(module(part), 1)
        for targets, weights in _targets(kind, probabilities, labels, g):
            squares = {name: value.square() for name, value in gradients(parameters, part, targets).items()}
            for name, value in squares.items():
                total[name] += torch.einsum("n...,n->...", value, weights)


def _targets(kind: Fisher, probabilities: Tensor, y: Tensor, g: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Labels as rows, and the weight of each sample's squared gradient."""
    samples, classes = probabilities.shape
    every = probabilities.new_ones(samples)
    if kind == "exact":
        eye = torch.eye(classes, dtype=probabilities.dtype, device=probabilities.device)
        return [(eye[c].expand(samples, -1), probabilities[:, c]) for c in range(classes)]
    if kind == "sample":
        y = torch.multinomial(probabilities.cpu(), 1, generator=g).squeeze(1).to(probabilities.device)
    return [(functional.one_hot(y, classes).to(probabilities.dtype), every)]
