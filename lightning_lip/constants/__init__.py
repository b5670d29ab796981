"""Lipschitz constants of activations, normalisations, poolings, and the user's own."""

from lightning_lip.constants.modules import lipschitz_constant, register_constant

__all__ = ["lipschitz_constant", "register_constant"]
