"""Lightning Fabric, through the framework-free core."""

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_lip import LipschitzRegularizer


def main():
    """Fit a sine under a penalty, with accumulated gradients and bfloat16 forward passes."""
    fabric = L.Fabric(accelerator="cpu", precision="bf16-mixed")
    fabric.seed_everything(0)
    x = torch.linspace(-3, 3, 1024)[:, None]
    loader = fabric.setup_dataloaders(DataLoader(TensorDataset(x, x.sin()), batch_size=64, shuffle=True))
    net = torch.nn.Sequential(
        torch.nn.Linear(1, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1)
    )
    model, optimizer = fabric.setup(net, torch.optim.Adam(net.parameters(), lr=3e-3))
    regularizer = LipschitzRegularizer(model, coefficient=1e-3, penalty="softplus_log", target=2.0)
    for _ in range(60):
        for index, (inputs, targets) in enumerate(loader):
            steps = index % 2 == 1
            with fabric.no_backward_sync(model, enabled=not steps):
                fabric.backward(torch.nn.functional.mse_loss(model(inputs), targets) / 2)
            if steps:
                regularizer.add_grad_()  # after accumulation, before clipping and the step
                fabric.clip_gradients(model, optimizer, max_norm=1.0)
                optimizer.step()
                optimizer.zero_grad()
    with torch.no_grad():
        error = torch.nn.functional.mse_loss(model(x), x.sin())
    fabric.print(f"mean squared error {error:.4f}, product {regularizer.bound():.2f}")


if __name__ == "__main__":
    main()
