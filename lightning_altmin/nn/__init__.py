"""Small networks as plain ``nn.Sequential`` modules, each usable from YAML by its class path."""

from lightning_altmin.nn.convnet import ConvNet
from lightning_altmin.nn.lenet import LeNet5
from lightning_altmin.nn.mlp import MLP

__all__ = ["MLP", "ConvNet", "LeNet5"]
