"""A network whose layers are dealt out among processes, trained on scikit-learn's digits.

    torchrun --nproc-per-node 2 examples/layer_parallel.py

Every process reads the same batches and holds its own layers only; the weights gathered at the end are the whole
network's, and load anywhere.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn

from lightning_altmin import AltMin
from lightning_altmin.data import TensorLoader
from lightning_altmin.nn import MLP
from lightning_altmin.parallel import LayerParallel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--save", help="file for the whole network's weights")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    torch.manual_seed(0)  # the same on all processes: the same network, and the same order of the batches
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    loader = TensorLoader(x[:1400], y[:1400], batch_size=64, shuffle=True)
    layers = LayerParallel(AltMin(MLP(64, [100, 100, 100], 10), nn.CrossEntropyLoss()))
    held = sum(p.numel() for p in layers.core.network.parameters())
    print(f"process {layers.rank}: stages {layers.first} to {layers.last}, {held:,} parameters", flush=True)
    for epoch in range(args.epochs):
        for batch in loader:
            loss = layers.step(*batch)
        accuracy = (layers.forward(x[1400:]).argmax(1) == y[1400:]).float().mean()
        if layers.rank == 0:
            print(f"epoch {epoch}: loss {float(loss):.4f}, test accuracy {float(accuracy):.4f}", flush=True)
    whole = layers.gathered()
    if args.save and layers.rank == 0:
        torch.save(whole, args.save)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
