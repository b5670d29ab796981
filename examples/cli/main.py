# ruff: noqa: D102  # Lightning's hooks need no docstring
"""LightningCLI: with lightning_lip imported, its callbacks are known by their short names.

python main.py fit -c config.yaml
python main.py fit --trainer.callbacks+=LipschitzPenalty --trainer.callbacks.coefficient=1e-2
"""

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader, TensorDataset

import lightning_lip  # noqa: F401  # the short names


class Regressor(LightningModule):
    """A network for four numbers; its example input lets the callbacks trace its graph."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.example_input_array = torch.zeros(1, 4)  # in YAML no tensor can be written
        self.net = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Tanh(), torch.nn.Linear(width, 1))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch):
        x, y = batch
        return torch.nn.functional.mse_loss(self(x), y)

    def validation_step(self, batch):
        x, y = batch
        self.log("val/mse", torch.nn.functional.mse_loss(self(x), y))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Sines(LightningDataModule):
    """Sums of sines."""

    def setup(self, stage: str):
        x = torch.randn(1024, 4, generator=torch.Generator().manual_seed(0))
        y = x.sin().sum(1, keepdim=True)
        self.train, self.val = TensorDataset(x[:768], y[:768]), TensorDataset(x[768:], y[768:])

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=32, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=256)


def squared_log(log_sigma, log_bound):
    """A penalty of one's own; in the configuration `penalty: main.squared_log` (of a module that can be imported)."""
    return log_bound.square()


if __name__ == "__main__":
    LightningCLI(Regressor, Sines)
