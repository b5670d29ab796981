"""Metrics that see the network, not only its predictions."""

from lightning_lip.metrics.noisy_mae import (
    NoisyMeanAbsoluteError,
    feature_ranges,
    noisy_mean_absolute_error,
)

__all__ = ["NoisyMeanAbsoluteError", "feature_ranges", "noisy_mean_absolute_error"]
