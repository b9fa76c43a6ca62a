"""Small networks, each usable from YAML by its class path, and activations with finitely many values."""

from lightning_altmin.nn.convnet import ConvNet
from lightning_altmin.nn.elman import ElmanRNN, aligned
from lightning_altmin.nn.lenet import LeNet5
from lightning_altmin.nn.mlp import MLP
from lightning_altmin.nn.staircase import HardThreshold, Heaviside, Quantise, Sign, Staircase

__all__ = [
    "MLP",
    "ConvNet",
    "ElmanRNN",
    "HardThreshold",
    "Heaviside",
    "LeNet5",
    "Quantise",
    "Sign",
    "Staircase",
    "aligned",
]
