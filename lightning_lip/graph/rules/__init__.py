"""What each operation does to a bound; importing this room registers every rule."""

from lightning_lip.graph.rules import linear, pointwise, shape

__all__ = ["linear", "pointwise", "shape"]
