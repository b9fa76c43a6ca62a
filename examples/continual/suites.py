"""What ``benchmark.py`` measures on: networks, streams, and which of them go together."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_altmin.continual import TaskStream, from_datasets, permuted_mnist, split_cifar10, split_mnist

# ---------------------------------------------------------------- networks


def conv(seed: int, outputs: int = 10, channels: int = 32) -> nn.Sequential:
    """One layer of 5x5 filters at every second pixel, 36 average-pooled positions, one head."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(1, channels, 5, stride=2), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36 * channels, outputs)
    )
    nn.init.normal_(network[0].weight, std=1 / 5)
    nn.init.normal_(network[0].bias, std=0.5)
    return network


def mlp(seed: int, outputs: int = 10, hidden: int = 256) -> nn.Sequential:
    """A plain multilayer perceptron of two hidden layers, PyTorch's own initialization."""
    torch.manual_seed(seed)
    layers = [nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)]
    return nn.Sequential(nn.Flatten(), *layers)


def head(seed: int, outputs: int = 10, features: int = 1024, hidden: int = 1000) -> nn.Sequential:
    """A linear classifier on fixed random ReLU units of given features."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Flatten(), nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
    network[1].requires_grad_(False)
    return network


# ---------------------------------------------------------------- streams


def thinned(stream: TaskStream, number: int, seed: int) -> TaskStream:
    """At most ``number`` training samples per task."""
    g = torch.Generator().manual_seed(seed)
    trains = [task.train.take(torch.randperm(len(task.train), generator=g)[:number]) for task in stream]
    names, tests = [task.name for task in stream], [task.test for task in stream]
    return from_datasets(trains, tests, prepare=stream.prepare, names=names, num_classes=stream.num_classes)


def cifar_features(root: str, seed: int) -> TaskStream:
    """Split-CIFAR-10 seen through 64 random 7x7 filters, ReLU and 4x4 average-pooled positions."""
    stream, g = split_cifar10(root), torch.Generator().manual_seed(seed)
    filters = torch.randn(64, 3, 7, 7, generator=g) / math.sqrt(147)
    filters -= filters.mean((1, 2, 3), keepdim=True)
    bias = 0.3 * torch.randn(64, generator=g)

    def features(samples: Any) -> tuple[Tensor, Tensor]:
        parts, labels = [], []
        for rows in torch.arange(len(samples)).split(500):
            x, y = samples.read(rows)
            responses = nn.functional.conv2d(stream.prepared(x), filters, bias, stride=2).relu()
            parts.append(nn.functional.adaptive_avg_pool2d(responses, 4).flatten(1))
            labels.append(y)
        return torch.cat(parts), torch.cat(labels)

    trains, tests = [features(t.train) for t in stream], [features(t.test) for t in stream]
    return from_datasets(trains, tests, names=[t.name for t in stream], num_classes=10)


# ---------------------------------------------------------------- suites

IMAGE = 784 + 8
"""Bytes of a stored MNIST image and its label."""


def memory_bytes(inputs: int, outputs: int) -> int:
    """Bytes of a memory that is solved for: a triangle of A in single precision, B and a count in double."""
    return 4 * inputs * (inputs + 1) // 2 + 8 * (outputs * inputs + 1)


@dataclass
class Suite:
    """A stream, the network of all methods, and how many samples take the bytes of AM-mem's state.

    Attributes:
        stream: Makes the stream, of a folder and a seed.
        network: Makes the network, of a seed and its number of outputs.
        outputs: Of the network.
        equal_size: Samples that take as many bytes as AM-mem's state.
        without: Methods that make no sense here.
    """

    stream: Callable[[str, int], TaskStream]
    network: Callable[..., nn.Sequential]
    outputs: int
    equal_size: int
    without: tuple[str, ...] = field(default=())


HIDDEN = ("AM-mem, learnt features", "AM-SGD, orthogonal weights", "SGD, orthogonal weights")

SUITES = {
    "split_mnist": Suite(lambda root, seed: split_mnist(root), conv, 10, memory_bytes(1153, 10) // IMAGE),
    "split_mnist_64": Suite(
        lambda root, seed: split_mnist(root),
        lambda seed, outputs: conv(seed, outputs, 64),
        10,
        memory_bytes(36 * 64 + 1, 10) // IMAGE,
    ),
    "domain_mnist": Suite(
        lambda root, seed: split_mnist(root, labels="local"), conv, 2, memory_bytes(1153, 2) // IMAGE
    ),
    "permuted_mnist": Suite(
        lambda root, seed: thinned(permuted_mnist(root, seed=seed), 6000, seed),
        mlp,
        10,
        # AM-mem's innovation form: second moments of three layers' inputs, and their inverses, in single precision
        (4 + 4) * (785**2 + 257**2 + 257**2) // IMAGE,
        ("AM-mem, joint", "AM-mem, learnt features"),
    ),
    # its samples are 1024 features in single precision; the hidden layer is frozen for all methods
    "split_cifar10": Suite(cifar_features, head, 10, memory_bytes(1001, 10) // (4 * 1024 + 8), HIDDEN),
}
