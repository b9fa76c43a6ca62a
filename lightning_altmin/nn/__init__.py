"""Small networks, each usable from YAML by its class path."""

from lightning_altmin.nn.convnet import ConvNet
from lightning_altmin.nn.elman import ElmanRNN, aligned
from lightning_altmin.nn.lenet import LeNet5
from lightning_altmin.nn.mlp import MLP

__all__ = ["MLP", "ConvNet", "ElmanRNN", "LeNet5", "aligned"]
