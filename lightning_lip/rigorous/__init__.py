"""Upper bounds that hold with rounding included."""

from lightning_lip.rigorous.convolution import certified_convolution_norm
from lightning_lip.rigorous.matrix import certified_matrix_norm
from lightning_lip.rigorous.operators import certified_norm

__all__ = ["certified_convolution_norm", "certified_matrix_norm", "certified_norm"]
