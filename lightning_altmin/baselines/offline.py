"""What offline alternating minimization needs: variables of every sample, kept from one sweep to the next."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_altmin.baselines.output_losses import OutputLoss
from lightning_altmin.codes.elementwise import INVERTIBLE
from lightning_altmin.codes.plain_layer import activation_of, odd_modules
from lightning_altmin.guard import NonFiniteError
from lightning_altmin.metrics import Metrics
from lightning_altmin.network import CodedNetwork
from lightning_altmin.supervised import SupervisedModule

_VARIABLES = "lightning_altmin_offline_variables"

Variables = dict[str, list[Tensor]]
"""A method's auxiliary variables by name, one tensor of shape ``(samples, units)`` per layer."""


@dataclass(frozen=True)
class Layer:
    """One layer, ``linear(activation(below))``; the first layer's activation is the identity."""

    activation: nn.Module
    linear: nn.Linear

    @property
    def weight(self) -> Tensor:
        """``W``, shape ``(outputs, inputs)``."""
        return self.linear.weight.detach()

    @property
    def bias(self) -> Tensor:
        """``b``, or zeros for a layer that has none, shape ``(outputs,)``."""
        bias = self.linear.bias
        return self.weight.new_zeros(len(self.weight)) if bias is None else bias.detach()

    def set(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Change the weights, and the bias if one is given and the layer has one."""
        self.linear.weight.data.copy_(weight)
        if bias is not None and self.linear.bias is not None:
            self.linear.bias.data.copy_(bias)


def layers_of(network: nn.Module) -> list[Layer]:
    """The layers of a multilayer perceptron.

    Raises:
        ValueError: If a layer is not at most one activation followed by one Linear.
    """
    layers = []
    for stage in CodedNetwork(network).stages:
        if odd := odd_modules(stage):
            raise ValueError(
                f"network: offline methods need at most one activation of {[t.__name__ for t in INVERTIBLE]} and one "
                f"Linear per layer; stage {stage.name!r} has {odd[0]}"
            )
        linear = stage.affine[0]
        assert isinstance(linear, nn.Linear)  # anything else was odd
        layers.append(Layer(activation_of(stage.transfer), linear))
    return layers


def refuse_frozen(network: nn.Module) -> None:
    """Refuse layers that the sweeps would train although they are not to be trained.

    Raises:
        ValueError: If a parameter has ``requires_grad=False``.
    """
    frozen = [name for name, parameter in network.named_parameters() if not parameter.requires_grad]
    if frozen:
        raise ValueError(
            f"network: parameters {frozen} have requires_grad=False, and offline methods solve for every layer; set "
            "requires_grad=True, or train with AltMinModule, which leaves frozen layers alone"
        )


class OfflineModule(SupervisedModule, ABC):
    """Base of the offline methods: one batch is the whole training set, one epoch one sweep over all blocks.

    The samples are those of the first batch and are kept, with the variables that belong to them; later batches must
    hold the same samples, in any order. Checkpoints hold all of it, so that a run resumes.

    Raises:
        ValueError: If ``network`` is no multilayer perceptron (`layers_of`), or has a frozen layer.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: nn.Module | Callable[[Tensor, Any], Tensor],
        metrics: Metrics | None,
    ) -> None:
        layers = layers_of(network)
        if metrics is None and isinstance(loss, OutputLoss):
            metrics = loss.default_metrics(layers[-1].linear.out_features)
        super().__init__(loss, metrics, None, "epoch", 1, None)
        self.automatic_optimization = False
        self.network = network
        self.layers = layers
        refuse_frozen(network)
        self._samples: tuple[Tensor, Tensor] | None = None
        self.variables: Variables = {}

    # ---------------------------------------------------------------- to write

    @abstractmethod
    def begin(self, x: Tensor, y: Tensor) -> Variables:
        """The variables before the first sweep.

        Args:
            x: All inputs, shape ``(samples, inputs)``.
            y: All targets.
        """

    @abstractmethod
    def sweep(self, x: Tensor, y: Tensor, number: int) -> None:
        """Minimise over each block once: change `variables` and the layers' weights.

        Args:
            x: As in `begin`.
            y: As in `begin`.
            number: Number of the sweep, counted from 0.
        """

    @abstractmethod
    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        """The value that the blocks lower, a sum over samples."""

    # ---------------------------------------------------------------- training

    def forward(self, x: Tensor) -> Tensor:
        """The network's output."""
        output: Tensor = self.network(x)
        return output

    @torch.no_grad()
    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One sweep; logs ``train_objective``, per sample, at log points."""
        x, y = self._kept(*self.unpack(batch))
        self.sweep(x, y, self.trainer.current_epoch)
        if not all(bool(p.isfinite().all()) for p in self.network.parameters()):
            raise NonFiniteError(f"sweep {self.trainer.current_epoch} of {type(self).__name__} left NaN or inf weights")
        # Holds no gradients and changes nothing; Lightning counts a global step.
        self.optimizers().step()  # type: ignore[union-attr]
        if self.at_log_point:
            self.log("train_objective", self.objective(x, y) / len(x), prog_bar=True, batch_size=len(x))

    def _kept(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = x.flatten(1)
        if self._samples is None:
            self._samples = x, y
        kept, labels = self._samples
        if not self.variables:
            self.variables = self.begin(kept, labels)
        if x.shape != kept.shape or not torch.allclose(_energies(x), _energies(kept), rtol=1e-9, atol=0.0):
            raise ValueError(
                f"the batch of shape {tuple(x.shape)} does not hold the samples of the first one, of shape "
                f"{tuple(kept.shape)}: {type(self).__name__} keeps variables of every sample, so each batch must be "
                "the whole training set, without augmentation"
            )
        return kept, labels

    def configure_optimizers(self) -> Any:
        """An optimizer that is never given a gradient: it only counts sweeps for the Trainer."""
        return torch.optim.SGD(self.network.parameters(), lr=1.0)

    def setup(self, stage: str) -> None:
        """Refuse several processes, which would each solve their own problem, and layers frozen since."""
        super().setup(stage)
        if stage == "fit":
            refuse_frozen(self.network)
        if stage == "fit" and self.trainer.world_size > 1:
            raise MisconfigurationException(
                f"{type(self).__name__} runs in one process, the Trainer has {self.trainer.world_size}: devices=1"
            )

    def on_fit_start(self) -> None:
        """Forget the samples of an earlier run."""
        super().on_fit_start()
        if not self.resuming:
            self._samples, self.variables = None, {}

    def on_train_start(self) -> None:
        """Refuse loaders of more than one batch; put what a checkpoint brought, on the CPU, beside the weights."""
        super().on_train_start()
        if self._samples is not None:
            x, y = self._samples
            self._samples = x.to(self.device), y.to(self.device)
        self.variables = {name: [t.to(self.device) for t in ts] for name, ts in self.variables.items()}
        if self.trainer.num_training_batches > 1:
            raise MisconfigurationException(
                f"train_dataloader has {self.trainer.num_training_batches} batches; {type(self).__name__} needs the "
                "whole training set in one: raise batch_size to its number of samples"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the samples and their variables."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[_VARIABLES] = {"samples": self._samples, "variables": self.variables}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint.get(_VARIABLES, {"samples": None, "variables": {}})
        self._samples, self.variables = saved["samples"], saved["variables"]


def forward_variables(layers: list[Layer], x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Every layer's output before and after the next activation; after the last layer there is none."""
    before: list[Tensor] = []
    after: list[Tensor] = []
    for index, layer in enumerate(layers):
        z = layer.linear(after[-1] if after else x)
        before.append(z)
        after.append(layers[index + 1].activation(z) if index + 1 < len(layers) else z)
    return before, after


def _energies(x: Tensor) -> Tensor:
    """Sums of squares by input: the same for the same samples in any order, up to rounding.

    Nothing cancels in them, as it would in the sums of centred inputs, and a flipped image has others.
    """
    return x.square().sum(0, dtype=torch.float64)
