"""Certified accuracies whose truth is known: NumPy counts the samples one by one."""

import math

import numpy as np
import torch

from lightning_lip.metrics import CertifiedAccuracy

SYMBOL = "eps"
LEVELS = (0.0, 0.1, 0.5)


def make_batches(n_batches=3, dtype=torch.float32, seed=0, n_classes=4):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, n_classes, generator=generator).to(dtype),
            torch.randint(n_classes, (size,), generator=generator),
        )
        for size in [5, 1, 40, 7][:n_batches]
    ]


def true_values(batches, lipschitz=1.5, radii=LEVELS, weight=None):
    """Certified samples, counted one by one."""
    counts, total = np.zeros(len(radii)), 0
    for logits, target in batches:
        for row, y in zip(logits.double().numpy(), target.tolist(), strict=True):
            total += 1
            for index, eps in enumerate(radii):
                slopes = (
                    np.full(len(row), math.sqrt(2)) if weight is None else np.linalg.norm(weight[y] - weight, axis=1)
                )
                others = [j for j in range(len(row)) if j != y]
                counts[index] += all(row[y] - row[j] > slopes[j] * lipschitz * eps for j in others)
    return counts / total


def make_metric(levels=LEVELS):
    return CertifiedAccuracy(levels)


def update_all(metric, batches, **kwargs):
    for logits, target in batches:
        metric.update(logits, target, **{"lipschitz": 1.5, **kwargs})
    return metric


def arguments(batch):
    """Return what the metric's `forward` takes of a batch."""
    return *batch, 1.5
