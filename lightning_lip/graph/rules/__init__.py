"""What each operation does to a bound; importing this room registers every rule."""

from lightning_lip.graph.rules import contractions, fourier, linear, pointwise, recurrent, shape

__all__ = ["contractions", "fourier", "linear", "pointwise", "recurrent", "shape"]
