"""`lightning-lip audit`: what is certified about a checkpoint's network."""

from lightning_lip.audit.command import audit, document
from lightning_lip.errors import BoundError

__all__ = ["BoundError", "audit", "document"]
