"""The plain core under Lightning Fabric: every process trains on its part of each batch.

    python examples/fabric.py                                   # one process
    torchrun --nproc-per-node 2 examples/fabric.py              # two, each with its part of every batch

Fabric starts the processes and deals out the data; the core averages the local gradients. `fabric.setup` is not
needed: there is no backward pass to wrap.
"""

from __future__ import annotations

import argparse
import os

import torch
from lightning.fabric import Fabric
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_altmin import AltMin
from lightning_altmin.nn import MLP
from lightning_altmin.parallel import DataParallel
from lightning_altmin.processes import Processes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64, help="of all processes together")
    args = parser.parse_args()
    here, everywhere = (int(os.environ.get(name, 1)) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))  # from torchrun
    strategy = "ddp" if everywhere > 1 else "auto"
    fabric = Fabric(accelerator="cpu", devices=here, num_nodes=everywhere // here, strategy=strategy)
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    order = torch.randperm(len(x))
    train, test = order[:1400], order[1400:]
    loader = DataLoader(
        TensorDataset(x[train], y[train]), batch_size=args.batch_size // fabric.world_size, shuffle=True
    )
    loader = fabric.setup_dataloaders(loader)  # a DistributedSampler, where there are several processes

    processes = DataParallel() if fabric.world_size > 1 else Processes()
    core = AltMin(MLP(64, [100, 100], 10), nn.CrossEntropyLoss(), processes=processes).to(fabric.device)
    for epoch in range(args.epochs):
        if hasattr(loader.sampler, "set_epoch"):
            loader.sampler.set_epoch(epoch)
        for batch in loader:
            step = core.step(*batch)
        core.eval()
        with torch.no_grad():
            accuracy = (core(x[test]).argmax(1) == y[test]).float().mean()
        core.train()
        fabric.print(f"epoch {epoch}: loss {float(step.loss):.4f}, test accuracy {float(accuracy):.4f}")


if __name__ == "__main__":
    main()
