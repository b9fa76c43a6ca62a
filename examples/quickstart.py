"""A network of your own, trained by alternating minimization: ``python examples/quickstart.py``."""

from lightning.pytorch import Trainer, seed_everything
from torch import nn

from lightning_altmin import AltMinModule
from lightning_altmin.data import DigitsDataModule


class MyNet(AltMinModule):
    """A network of your own; everything not said here has its recommended setting."""

    def __init__(self, width: int = 100) -> None:
        network = nn.Sequential(
            nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        )
        super().__init__(network=network, loss=nn.CrossEntropyLoss())


if __name__ == "__main__":
    seed_everything(0)
    model, data = MyNet(), DigitsDataModule(batch_size=64)
    trainer = Trainer(max_epochs=5, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(model, datamodule=data)
    print(trainer.test(model, datamodule=data))
