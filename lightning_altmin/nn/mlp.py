"""The multilayer perceptron."""

from collections.abc import Sequence

from torch import nn

from lightning_altmin.arguments import check_count, check_number
from lightning_altmin.nn.activation import activation_class
from lightning_altmin.nn.arguments import check_counts
from lightning_altmin.nn.sequence import LayerSequence


class MLP(LayerSequence):
    """A multilayer perceptron: ``[Flatten] (Linear [BatchNorm1d] activation [Dropout]) * len(hidden) Linear``.

    Takes inputs of shape ``(batch, in_features)`` or, with ``flatten``, of any shape ``(batch, ...)`` holding
    ``in_features`` numbers per sample, and returns ``(batch, out_features)`` without a final activation (logits).

    Args:
        in_features: Numbers per sample, for instance 784 for a 28 x 28 grey image; at least 1.
        hidden: Widths of the hidden layers, each at least 1. An empty list makes a linear model.
        out_features: Width of the output, for instance the number of classes; at least 1.
        activation: A name (``"relu"``, ``"tanh"``, ...), the class path of a module that needs no arguments
            (``"torch.nn.ReLU6"``), or its class. Every hidden layer gets one of its own.
        batch_norm: Whether a ``BatchNorm1d`` follows each hidden ``Linear`` directly.
        dropout: Probability of dropping a hidden unit, in [0, 1); 0 leaves the ``Dropout`` layers out.
        bias: Whether the ``Linear`` layers have a bias, the output layer included.
        flatten: Whether the network begins with an ``nn.Flatten``.

    Raises:
        TypeError: If ``hidden`` is no list, or ``activation`` neither a name nor a class that needs no arguments.
        ValueError: If a size is not an integer >= 1, ``dropout`` is outside [0, 1) or the activation is unknown.
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        out_features: int,
        activation: str | type[nn.Module] = "relu",
        batch_norm: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        flatten: bool = True,
    ) -> None:
        check_count("in_features", in_features)
        widths = check_counts("hidden", hidden)
        check_count("out_features", out_features)
        check_number("dropout", dropout, least=0, below=1)
        make_activation = activation_class(activation)
        layers: list[nn.Module] = [nn.Flatten()] if flatten else []
        for width_in, width in zip((in_features, *widths), widths, strict=False):
            layers.append(nn.Linear(width_in, width, bias=bias))
            if batch_norm:
                layers.append(nn.BatchNorm1d(width))
            layers.append(make_activation())
            if dropout > 0:
                layers.append(nn.Dropout(dropout))
        layers.append(nn.Linear((in_features, *widths)[-1], out_features, bias=bias))
        super().__init__(*layers)
