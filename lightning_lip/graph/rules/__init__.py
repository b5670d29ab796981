"""What each operation does to a bound; importing this room registers every rule."""

from lightning_lip.graph.rules import contractions, linear, pointwise, recurrent, shape

__all__ = ["contractions", "linear", "pointwise", "recurrent", "shape"]
