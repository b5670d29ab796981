"""A noisy mean absolute error whose truth is known: the noise is drawn again from its seed, in float64."""

import numpy as np
import torch

from lightning_lip.metrics import NoisyMeanAbsoluteError

SYMBOL = "eta"
LEVELS = (0.0, 0.3, 0.1)
LOW = [-1.0, 0.0, 2.0]
HIGH = [1.0, 10.0, 2.0]  # the last feature is constant: it gets no noise
WEIGHT = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.2, -1.0]])


def linear(x):
    return x @ WEIGHT.to(x.dtype).T


def make_batches(n_batches=3, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [5, 1, 4, 7][:n_batches]
    low, high = torch.tensor(LOW, dtype=torch.float64), torch.tensor(HIGH, dtype=torch.float64)
    return [
        (
            (low + (high - low) * torch.rand(size, 3, generator=generator, dtype=torch.float64)).to(dtype),
            torch.randn(size, 2, generator=generator, dtype=torch.float64).to(dtype),
        )
        for size in sizes
    ]


def true_errors(batches, levels=LEVELS, low=LOW, high=HIGH, symmetric=False, seed=0, rank=0, predict=linear):
    """Sum of absolute errors per level and batch, and target elements per batch, in float64, with the seed replayed."""
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, rank]).generate_state(1)[0]))
    span = torch.as_tensor(high, dtype=torch.float64) - torch.as_tensor(low, dtype=torch.float64)
    sums, counts = [], []
    for inputs, target in batches:
        u = torch.rand(inputs.shape, generator=generator).double()
        noise = span * (2 * u - 1 if symmetric else u)
        with torch.no_grad():
            errors = [predict(inputs.double() + eta * noise) - target.double() for eta in levels]
        sums.append([error.abs().sum().item() for error in errors])
        counts.append(target.numel())
    return np.array(sums), np.array(counts)


def true_values(batches, **kwargs):
    sums, counts = true_errors(batches, **kwargs)
    return sums.sum(axis=0) / counts.sum()


def make_metric(levels=LEVELS, **kwargs):
    return NoisyMeanAbsoluteError(levels, **{"feature_min": LOW, "feature_max": HIGH, **kwargs})


def update_all(metric, batches, predict=linear):
    for inputs, target in batches:
        metric.update(predict, inputs, target)
    return metric


def arguments(batch):
    """Return what the metric's `forward` takes of a batch."""
    return linear, *batch
