"""A LightningModule and a LightningDataModule from another package, unchanged: only the Trainer knows."""

import lightning as L
from lightning.pytorch.demos.boring_classes import BoringDataModule, DemoModel

from lightning_lip import LipschitzMonitor, LipschitzPenalty


def main():
    """Train it without and with a penalty on its Lipschitz constant: it is one linear layer and a ReLU."""
    for name, callbacks in (
        ("without", [LipschitzMonitor()]),
        ("with", [LipschitzMonitor(), LipschitzPenalty(1.0)]),
    ):
        L.seed_everything(0, verbose=False)
        trainer = L.Trainer(max_epochs=5, callbacks=callbacks, log_every_n_steps=1, accelerator="cpu")
        trainer.fit(DemoModel(), BoringDataModule())
        print(f"{name} penalty: product {trainer.callback_metrics['lipschitz/product']:.3f}")


if __name__ == "__main__":
    main()
