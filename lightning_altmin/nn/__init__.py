"""Small networks as plain ``nn.Sequential`` modules, and activations with finitely many values."""

from lightning_altmin.nn.convnet import ConvNet
from lightning_altmin.nn.lenet import LeNet5
from lightning_altmin.nn.mlp import MLP
from lightning_altmin.nn.staircase import HardThreshold, Quantise, Sign, Staircase, Step

__all__ = ["MLP", "ConvNet", "HardThreshold", "LeNet5", "Quantise", "Sign", "Staircase", "Step"]
