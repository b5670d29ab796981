"""ProductBound: the product of the selected layers' spectral norms, where no graph is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_lip.graph.program import log_up
from lightning_lip.operators.base import LinearOperator
from lightning_lip.rigorous.rounding import sum_up


class ProductBound:
    """The product of the operators' spectral norms, each as often as its layer counts.

    It bounds the network only if that is the chain of these layers and activations of constant 1.

    Attributes:
        operators: The L operators, each distinct weight once.
        multiplicities: How often each norm is a factor, L numbers.
    """

    kind: ClassVar[Literal["product"]] = "product"

    def __init__(self, operators: Sequence[LinearOperator]) -> None:
        self.operators = list(operators)
        self.multiplicities = [op.multiplicity for op in self.operators]

    def selected(self, op: LinearOperator) -> list[nn.Parameter]:
        """Return the parameters of an operator that belong to selected layers: all of them."""
        return list(op.parameters)

    def follow_replaced(self) -> None:
        """Do nothing: the operators look their parameters up in the model."""

    def log_bound(self, log_sigma: Tensor) -> Tensor:
        """Return the logarithm of the product, shape (), differentiable in `log_sigma`, shape (L,)."""
        return repeated(log_sigma, self.multiplicities).sum()

    def log_bound_up(self, norms: Sequence[float]) -> float:
        """Return an upper bound of the logarithm of the product of L norms, rounding included."""
        logs = [log_up(norm) for norm, k in zip(norms, self.multiplicities, strict=True) for _ in range(k)]
        return -math.inf if -math.inf in logs else sum_up(logs)


def repeated(log_sigma: Tensor, multiplicities: Sequence[int]) -> Tensor:
    """Return `log_sigma`, shape (L,), with each entry as often as its layer counts, shape (sum k,)."""
    if all(k == 1 for k in multiplicities):
        return log_sigma
    return log_sigma.repeat_interleave(torch.tensor(multiplicities, device=log_sigma.device))
