"""Kernels: one iteration over a list of weights, and the rank-one update of their gradients.

Kernels know tensors and pointers, never modules. :mod:`lightning_lip.kernels.reference` is the specification,
in PyTorch, on any device.
"""

from lightning_lip.kernels.reference import PowerStep, power_step, rank_one_update_

__all__ = ["PowerStep", "power_step", "rank_one_update_"]
