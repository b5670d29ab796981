"""The bound as a function of log sigma, in the log domain: a traced graph's program, or the selected layers' product.

The program, of sums, maxima and root sums of squares, is built once and evaluated at each step; it knows L numbers and
no weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_lip.operators.base import LinearOperator
from lightning_lip.rigorous.rounding import UNIT_ROUNDOFF, sum_up

Combination = Literal["sum", "norm", "max"]
"""``sum L``, ``sqrt(sum L^2)`` or ``max L`` of the constants of several branches."""

START = -1
"""The base of a term that starts at the network's input."""

FLOOR = -1e30
"""Stands for log 0 inside the program."""


@dataclass(frozen=True)
class Term:
    """The logarithm of a constant: ``result[base] + constant + sum log sigma[operators] + sum log live[lives]``.

    Attributes:
        base: Index of an instruction's result, or :data:`START` for the network's input, whose constant is 1.
        constant: Logarithm of the product of the fixed constants; -inf for a map that does not depend on the input.
        operators: Indices of the operators on the way, as often as they are applied.
        lives: Indices of constants that are read again at each evaluation.
    """

    base: int = START
    constant: float = 0.0
    operators: tuple[int, ...] = ()
    lives: tuple[int, ...] = ()

    def times(self, constant: float = 1.0, operators: Sequence[int] = (), lives: Sequence[int] = ()) -> Term:
        """Return the term of a map with these factors after this one's; the logarithm is rounded up."""
        log = self.constant
        if constant == 0:
            log = -math.inf
        elif constant != 1.0:
            log = math.nextafter(log + log_up(constant), math.inf)
        return Term(self.base, log, (*self.operators, *operators), (*self.lives, *lives))


def log_up(value: float) -> float:
    """Return an upper bound of log(value), value >= 0, two floats above the computed one; -inf for 0, 0 for 1."""
    if value == 0:
        return -math.inf
    if value == 1:
        return 0.0
    return math.nextafter(math.nextafter(math.log(value), math.inf), math.inf)


class BoundProgram:
    """Instructions that combine terms; the last term is the network's bound."""

    def __init__(self) -> None:
        self.instructions: list[tuple[Combination, list[Term]]] = []
        self.lives: list[Callable[[], float]] = []
        self.result = Term()
        self._cache: dict[tuple[torch.device, torch.dtype, int, Term], tuple[Tensor, Tensor, Tensor]] = {}

    def combine(self, kind: Combination, terms: Sequence[Term]) -> Term:
        """Return the term of a combination of branches; one branch is itself."""
        if len(terms) == 1:
            return terms[0]
        self.instructions.append((kind, list(terms)))
        return Term(base=len(self.instructions) - 1)

    def live(self, read: Callable[[], float]) -> int:
        """Return the index of a constant that is read at each evaluation."""
        self.lives.append(read)
        return len(self.lives) - 1

    def evaluate(self, log_sigma: Tensor, result: Term | None = None) -> Tensor:
        """Return the logarithm of the bound, shape (), differentiable in `log_sigma`.

        Args:
            log_sigma: Logarithms of the operators' norms, shape (L,); -inf (a zero weight) is allowed and gives
                finite gradients.
            result: The term of an earlier value in the network, to bound that one; None for the output.
        """
        steps = self._steps(result)
        constants, sources, targets = self._tables(steps, log_sigma)
        if len(steps) == 1:
            return constants.squeeze(0) + log_sigma[sources].sum()
        # A gather, not a matrix of counts: 0 * -inf is NaN. And a floor in place of -inf: where all branches of a sum
        # are -inf, the slope of torch.logsumexp is NaN.
        affine = constants.index_add(0, targets, log_sigma[sources]).clamp(min=FLOOR).unbind()
        results: list[Tensor] = []
        position = 0
        for kind, branch in steps:
            values = []
            for term in branch:
                value = affine[position]
                values.append(value if term.base == START else value + results[term.base])
                position += 1
            results.append(_combined(kind, values))
        return torch.where(results[-1] <= FLOOR / 2, -math.inf, results[-1])

    def affine(self, result: Term | None = None) -> tuple[float, list[int]] | None:
        """Return c and the operators i of ``c + sum_i log sigma_i``, where the logarithm of the bound is that."""
        result = self.result if result is None else result
        return None if result.base != START or result.lives else (result.constant, list(result.operators))

    def _steps(self, result: Term | None) -> list[tuple[Combination, list[Term]]]:
        """Return the instructions that a term needs, and the term as the last one: for a chain no other."""
        result = self.result if result is None else result
        return [*(self.instructions if result.base != START else ()), ("sum", [result])]

    def rounding(self, log_sigma: Sequence[float], result: Term | None = None) -> float:
        """Return how far rounding moves :meth:`evaluate` in fp64 at most, for given logarithms of the norms.

        Its additions, exponentials and logarithms err by a few u each, of values that no more than the sum of all
        terms' logarithms and of log k at each of k branches can reach; 16 u for each number that enters is ample.
        """
        lives = [log_up(read()) for read in self.lives]
        terms = [term for _, branch in self._steps(result) for term in branch]
        logs = [
            log
            for term in terms
            for log in (term.constant, *(log_sigma[i] for i in term.operators), *(lives[i] for i in term.lives))
        ]
        n_roundings = len(logs) + len(terms) + 16
        largest = n_roundings + math.fsum(abs(log) for log in logs if math.isfinite(log))
        return 16 * UNIT_ROUNDOFF * n_roundings * largest

    def _tables(
        self, steps: Sequence[tuple[Combination, list[Term]]], log_sigma: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the terms' constants, and the pairs (operator, term) of their factors as two index tensors."""
        key = (log_sigma.device, log_sigma.dtype, len(steps), steps[-1][1][0])
        table = self._cache.get(key)
        if table is None:
            terms = [term for _, branch in steps for term in branch]
            # Kept for later: tensors made in inference mode could not take part in a backward pass.
            with torch.inference_mode(False):
                table = self._cache[key] = self._make_table(terms, log_sigma)
        if not self.lives:
            return table
        read = [log_up(live()) for live in self.lives]
        present = [math.fsum(read[i] for i in term.lives) for _, branch in steps for term in branch]
        return table[0] + torch.tensor(present, dtype=log_sigma.dtype, device=log_sigma.device), table[1], table[2]

    @staticmethod
    def _make_table(terms: Sequence[Term], log_sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fixed = torch.tensor([term.constant for term in terms], dtype=log_sigma.dtype, device=log_sigma.device)
        pairs = [(source, target) for target, term in enumerate(terms) for source in term.operators]
        indices = torch.tensor(pairs, dtype=torch.long, device=log_sigma.device).reshape(-1, 2)
        return fixed, indices[:, 0].contiguous(), indices[:, 1].contiguous()


def _combined(kind: Combination, values: Sequence[Tensor]) -> Tensor:
    if len(values) == 1:
        return values[0]
    stacked = torch.stack(list(values))
    if kind == "max":
        return stacked.amax()
    return torch.logsumexp(stacked, 0) if kind == "sum" else torch.logsumexp(2 * stacked, 0) / 2


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

    def affine(self) -> tuple[float, list[int]]:
        """Return 0 and the operators i of ``sum_i log sigma_i``, the logarithm of the product."""
        return 0.0, [index for index, k in enumerate(self.multiplicities) for _ in range(k)]

    def log_bound_up(self, norms: Sequence[float]) -> float:
        """Return an upper bound of the logarithm of the product of L norms, rounding included."""
        logs = [log_up(norm) for norm, k in zip(norms, self.multiplicities, strict=True) for _ in range(k)]
        return -math.inf if -math.inf in logs else sum_up(logs)


def repeated(log_sigma: Tensor, multiplicities: Sequence[int]) -> Tensor:
    """Return `log_sigma`, shape (L,), with each entry as often as its layer counts, shape (sum k,)."""
    if all(k == 1 for k in multiplicities):
        return log_sigma
    return log_sigma.repeat_interleave(torch.tensor(multiplicities, device=log_sigma.device))
