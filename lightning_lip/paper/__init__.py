"""The paper's experiment, as `lightning-lip reproduce` runs it."""

from lightning_lip.paper.command import reproduce
from lightning_lip.paper.model import PaperRegressor

__all__ = ["PaperRegressor", "reproduce"]
