"""See, penalise, bound and certify the Lipschitz constant of a network while it trains."""

from importlib.metadata import version

from lightning_lip.callbacks import (
    CertifiedValidation,
    LipschitzConstraint,
    LipschitzMonitor,
    LipschitzPenalty,
    MaxNorm,
    NoisyValidation,
    SpectralCaps,
)
from lightning_lip.certificates.interval import Certificate, Uncertified, certify
from lightning_lip.constants.activations import MaxMin
from lightning_lip.constants.modules import register_constant
from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.losses.certified_margin import CertifiedMarginLoss
from lightning_lip.losses.margin import certified_margin_loss
from lightning_lip.metrics import CertifiedAccuracy, NoisyMeanAbsoluteError
from lightning_lip.mixin import LipschitzMixin
from lightning_lip.penalty.regularizer import LipschitzRegularizer
from lightning_lip.projection.projector import LipschitzProjector, Projection, project
from lightning_lip.rebalancing.rescaling import Rebalanced, rebalance
from lightning_lip.usage.operators import register_operator

__all__ = [
    "Certificate",
    "CertifiedAccuracy",
    "CertifiedMarginLoss",
    "CertifiedValidation",
    "LipschitzConstraint",
    "LipschitzMixin",
    "LipschitzMonitor",
    "LipschitzPenalty",
    "LipschitzProjector",
    "LipschitzRegularizer",
    "MaxMin",
    "MaxNorm",
    "NoisyMeanAbsoluteError",
    "NoisyValidation",
    "Projection",
    "Rebalanced",
    "SpectralCaps",
    "Uncertified",
    "UnsupportedLayerError",
    "certified_margin_loss",
    "certify",
    "project",
    "rebalance",
    "register_constant",
    "register_operator",
]

__version__ = version("lightning-lip")
"""The version of the installed package, which pyproject.toml states."""
