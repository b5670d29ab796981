"""See, penalise, bound and certify the Lipschitz constant of a network while it trains."""

from lightning_lip.callbacks import LipschitzMonitor, LipschitzPenalty, MaxNorm, NoisyValidation
from lightning_lip.metrics import NoisyMeanAbsoluteError
from lightning_lip.mixin import LipschitzMixin
from lightning_lip.operators import UnsupportedLayerError
from lightning_lip.regularizer import LipschitzRegularizer

__all__ = [
    "LipschitzMixin",
    "LipschitzMonitor",
    "LipschitzPenalty",
    "LipschitzRegularizer",
    "MaxNorm",
    "NoisyMeanAbsoluteError",
    "NoisyValidation",
    "UnsupportedLayerError",
]
