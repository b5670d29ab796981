"""Thin shells for `lightning.pytorch` and `pytorch_lightning`: no mathematics."""

from lightning_lip.callbacks.certified_validation import CertifiedValidation
from lightning_lip.callbacks.constraint import LipschitzConstraint
from lightning_lip.callbacks.max_norm import MaxNorm
from lightning_lip.callbacks.monitor import LipschitzMonitor
from lightning_lip.callbacks.noisy_validation import NoisyValidation
from lightning_lip.callbacks.penalty import LipschitzPenalty
from lightning_lip.callbacks.spectral_caps import SpectralCaps

__all__ = [
    "CertifiedValidation",
    "LipschitzConstraint",
    "LipschitzMonitor",
    "LipschitzPenalty",
    "MaxNorm",
    "NoisyValidation",
    "SpectralCaps",
]
