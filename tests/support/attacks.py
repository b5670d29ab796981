"""Attacks against certified classifiers: ``python tests/support/attacks.py`` trains three, certifies, and attacks them.

It prints, for each network and radius, how many samples of the digits are certified pairwise and globally, how many
of these projected gradient descent breaks, of which there must be none, and how many of all it breaks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lip import CertifiedMarginLoss, MaxMin, certify
from lightning_lip.metrics.certified_accuracy import certified_radii
from support.networks import Lambda

RADII = (0.05, 0.1, 0.2, 0.3, 0.5)


def digits() -> tuple[Tensor, Tensor]:
    """Return the 8 x 8 digits, (N, 1, 8, 8) from 0 to 1, and their classes."""
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)


def networks() -> dict[str, nn.Module]:
    """Return an MLP, a CNN with batch normalisation, and a residual network, each of ten logits."""
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), MaxMin(), nn.Linear(64, 64), MaxMin(), nn.Linear(64, 10))
    cnn = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        MaxMin(),
        nn.AvgPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    residual = Lambda(
        lambda m, x: m.head(F.relu(m.first(x.flatten(1)) + m.second(F.relu(m.inner(F.relu(m.first(x.flatten(1)))))))),
        first=nn.Linear(64, 48),
        inner=nn.Linear(48, 48),
        second=nn.Linear(48, 48),
        head=nn.Linear(48, 10),
    )
    return {"mlp": mlp, "cnn with batch norm": cnn, "residual": residual}


def train(net: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int) -> None:
    """Train with the margin loss, by Adam at batches of 64; the network is in eval mode afterwards."""
    loss = CertifiedMarginLoss(net.train(), eps, example_input=x[:1], warmup_steps=steps // 2)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        batch = torch.randint(len(x), (64,), generator=generator)
        optimizer.zero_grad()
        loss(net(x[batch]), y[batch]).backward()
        optimizer.step()
    net.eval()


def broken(net: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int = 20, restarts: int = 2) -> Tensor:
    """Return which samples projected gradient descent classifies wrongly within eps in the l2 norm, shape (N,).

    It follows the gradient of the margin, from the sample itself and from random starts.
    """
    dims = tuple(range(1, x.dim()))
    generator = torch.Generator().manual_seed(0)
    found = net(x).detach().argmax(1) != y
    for restart in range(restarts):
        moved = torch.randn(x.shape, generator=generator, dtype=x.dtype) * (restart > 0)
        for step in range(steps + 1):
            norms = torch.linalg.vector_norm(moved, dim=dims, keepdim=True).clamp(min=1e-30)
            moved = (moved * (eps / norms).clamp(max=1.0)).detach().requires_grad_()
            logits = net(x + moved)
            found |= logits.detach().argmax(1) != y
            if step == steps:
                break
            own = logits.gather(1, y[:, None])[:, 0]
            others = logits.scatter(1, y[:, None], -torch.inf).amax(1)
            (slope,) = torch.autograd.grad((others - own).sum(), moved)
            size = torch.linalg.vector_norm(slope, dim=dims, keepdim=True).clamp(min=1e-30)
            moved = moved.detach() + 2.5 * eps / steps * slope / size
    return found


def certified(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Return the samples' certified radii, (N,), with pairwise constants and with that of the whole network."""
    result = certify(net, x[:1])
    assert result.upper is not None, result
    assert result.head is not None, result
    logits = net(x).detach()
    pairwise = certified_radii(logits, y, result.head.features, result.head.weight)
    return {"pairwise": pairwise, "global": certified_radii(logits, y, result.upper)}


def attack(
    samples: int | None = None, steps: int = 600, eps: float = 0.3
) -> list[tuple[str, float, str, int, int, int]]:
    """Train, certify and attack the networks.

    Args:
        samples: How many samples; None for all.
        steps: Of training.
        eps: That of the loss.

    Returns:
        For each network, radius and form: how many samples are certified, how many of these and of all are broken.
    """
    x, y = digits()
    x, y = x[:samples], y[:samples]
    rows = []
    for name, net in networks().items():
        train(net, x, y, eps, steps)
        radii = certified(net, x, y)
        for radius in RADII:
            is_broken = broken(net, x, y, radius)
            for form, own in radii.items():
                is_certified = own >= radius
                counts = int(is_certified.sum()), int((is_certified & is_broken).sum()), int(is_broken.sum())
                rows.append((name, radius, form, *counts))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Attack, and return 1 if a certified sample was broken."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, help="how many samples, of 1797")
    options = parser.parse_args(arguments)
    rows = attack(options.samples)
    print(f"{'network':20} {'eps':>5} {'form':9} certified  broken  broken of all")
    for name, radius, form, n_certified, n_broken, of_all in rows:
        print(f"{name:20} {radius:5} {form:9} {n_certified:9} {n_broken:7} {of_all:14}")
    total, wrong = (sum(row[index] for row in rows) for index in (3, 4))
    print(f"{wrong} of {total} certified samples broken")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
