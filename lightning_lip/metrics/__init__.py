"""Metrics that see the network, not only its predictions."""

from lightning_lip.metrics.certified_accuracy import (
    CertifiedAccuracy,
    certified_accuracy,
    certified_radii,
    certified_worst_case_mae,
)
from lightning_lip.metrics.noisy_mae import NoisyMeanAbsoluteError, feature_ranges, noisy_mean_absolute_error

__all__ = [
    "CertifiedAccuracy",
    "NoisyMeanAbsoluteError",
    "certified_accuracy",
    "certified_radii",
    "certified_worst_case_mae",
    "feature_ranges",
    "noisy_mean_absolute_error",
]
