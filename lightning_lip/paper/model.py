"""The paper's network as a LightningModule."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lip.checks import check_integers, check_number


class PaperRegressor(pl.LightningModule):
    """The ReLU network 13-20-20-20-1 of the paper, with MSE loss and Adam.

    Weights start Glorot-uniform and biases at zero, and Adam's epsilon is 1e-7, all as in Keras, which the
    paper used. The start depends on `seed` only, not on the global random state. The module is `self.net`;
    the hidden layers are `net.0`, `net.2`, `net.4`, the output layer is `net.6`.

    Args:
        in_features: The number of inputs.
        width: The units of each hidden layer.
        depth: The number of hidden layers.
        learning_rate: Of Adam.
        seed: Of the initialisation.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        in_features: int = 13,
        width: int = 20,
        depth: int = 3,
        learning_rate: float = 1e-3,
        seed: int = 0,
    ) -> None:
        check_integers(1, in_features=in_features, width=width)
        check_integers(0, depth=depth, seed=seed)
        check_number("learning_rate", learning_rate)
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        generator = torch.Generator().manual_seed(seed)
        sizes = [in_features, *[width] * depth, 1]
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(sizes):
            # nn.Linear's own initialisation would advance the global random state.
            linear = nn.Linear(fan_in, fan_out, device="meta").to_empty(device="cpu")
            nn.init.xavier_uniform_(linear.weight, generator=generator)
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.ReLU()]
        self.net = nn.Sequential(*layers[:-1])

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs (B, in_features) to predictions (B, 1)."""
        predictions: Tensor = self.net(inputs)
        return predictions

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the MSE of a batch of inputs (B, in_features) and target (B, 1)."""
        inputs, target = batch
        return F.mse_loss(self(inputs), target)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Leave the validation MAE, also that without noise, to `NoisyValidation`."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Name the class, so that `lightning-lip audit` needs no `--module`."""
        checkpoint["lightning_lip_module"] = "lightning_lip.paper:PaperRegressor"

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam with Keras's epsilon."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate, eps=1e-7)
