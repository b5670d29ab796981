"""A certified interval of a network's Lipschitz constant."""

from lightning_lip.certificates.interval import Certificate, Method, Part, Uncertified, certify
from lightning_lip.rigorous.matrix import certified_matrix_norm

__all__ = ["Certificate", "Method", "Part", "Uncertified", "certified_matrix_norm", "certify"]
