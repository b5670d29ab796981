"""See, penalise, bound and certify the Lipschitz constant of a network while it trains."""

from lightning_lip.operators import UnsupportedLayerError
from lightning_lip.regularizer import LipschitzRegularizer

__all__ = [
    "LipschitzRegularizer",
    "UnsupportedLayerError",
]
