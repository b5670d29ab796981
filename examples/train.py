# ruff: noqa: D102  # Lightning's hooks need no docstring
"""An existing Trainer: penalty and monitor are two more callbacks. Run `python train.py`, then tensorboard."""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_lip import LipschitzMonitor, LipschitzPenalty


class Digits(L.LightningModule):
    """A classifier that knows nothing of lightning_lip."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(64, 64),
            torch.nn.ReLU(),
            torch.nn.Linear(64, 64),
            torch.nn.ReLU(),
            torch.nn.Linear(64, 10),
        )

    def training_step(self, batch):
        images, labels = batch
        return torch.nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch):
        images, labels = batch
        self.log("accuracy", (self.net(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def main():
    """Train without and with the penalty, on the same data."""
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16).float(), torch.tensor(labels))
    train, test = random_split(data, [1400, len(data) - 1400], torch.Generator().manual_seed(0))
    for name, callbacks in (
        ("without", [LipschitzMonitor()]),
        ("with", [LipschitzMonitor(), LipschitzPenalty(1e-3)]),
    ):
        L.seed_everything(0, verbose=False)
        trainer = L.Trainer(max_epochs=15, callbacks=callbacks, log_every_n_steps=10, accelerator="cpu")
        trainer.fit(Digits(), DataLoader(train, batch_size=64, shuffle=True), DataLoader(test, batch_size=len(test)))
        metrics = trainer.callback_metrics
        print(f"{name} penalty: accuracy {metrics['accuracy']:.3f}, product {metrics['lipschitz/product']:.1f}")


if __name__ == "__main__":
    main()
