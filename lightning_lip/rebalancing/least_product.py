"""The factors of a chain's hidden units that make the product of its spectral norms least.

For weights W_1 .. W_n and positive diagonal matrices D_l of the hidden units, D_0 = D_n = I, the logarithm of
``prod_l ||D_l W_l D_{l-1}^-1||`` is convex in the log D_l: ``log ||e^X W e^-Y||`` is convex in diagonal X, Y, in the
spectral and every Schatten norm (Hadamard's three lines theorem, as in Stein's interpolation). The slope in the
logarithm of one unit's factor is ``u_{l,i}^2 - v_{l+1,i}^2``, with the leading left and right singular vectors of the
layers on either side of it. For weights without negative entries the least product is ``||W_n .. W_1||`` (Perron).

A certificate of the difference of logits i and j has ``||w_i - w_j||``, rows of the last layer, in place of its norm.
Minimised is then, in place of that norm's logarithm, the largest of
``log ||D^-1 (w_i - w_j)|| - log ||w_i - w_j||`` over all pairs, convex as well: it is 0 at factors of 1, and where all
sums to less than that, every pair's constant has fallen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

SCHATTEN_POWERS = (8, 64, 512, 4096)
"""The spectral norm is not smooth where its singular value repeats: Schatten norms of these p approach it."""

N_ITERATIONS = 50
"""L-BFGS iterations at each p: on trained networks the product then lies within 0.1% of its minimum."""

LARGEST_LOG_FACTOR = 32 * math.log(2)
"""Units that lead nowhere, or from nowhere, gain from factors without end."""

RIDGE = 1e-7
"""Weight of the squared log factors: those that gain nothing stay near 0."""


def least_product(weights: Sequence[Tensor], of_pairs: bool = False) -> list[Tensor]:
    """Return the log factors of the hidden units that (nearly) minimise the product of the spectral norms.

    By L-BFGS on the Schatten norms, keeping the best of all evaluations: *heuristic* in how close it comes, but never
    above the product at factors of 1.

    Args:
        weights: W_1 .. W_n, none of them zero, shapes (m_l, m_{l-1}), fp64 on the CPU.
        of_pairs: Whether the last layer counts with the differences of its rows, of which two at least must differ.

    Returns:
        n - 1 vectors, shapes (m_l,), each entry of a magnitude of at most :data:`LARGEST_LOG_FACTOR`.
    """
    best = [torch.zeros(len(weight), dtype=torch.float64, device="cpu") for weight in weights[:-1]]
    least = math.inf
    rows = _Rows(weights[-1]) if of_pairs else None
    for power in SCHATTEN_POWERS if best else ():
        variables = [log.clone() for log in best]
        solver = torch.optim.LBFGS(
            variables,
            max_iter=N_ITERATIONS,
            history_size=20,
            tolerance_grad=1e-7,
            tolerance_change=1e-8,
            line_search_fn="strong_wolfe",
        )

        def evaluate(variables: list[Tensor] = variables, power: int = power) -> float:
            nonlocal best, least
            # Beyond the limit only the ridge counts, and leads back.
            logs = [v.clamp(-LARGEST_LOG_FACTOR, LARGEST_LOG_FACTOR) for v in variables]
            terms = _terms(weights, logs, power, rows)
            for index, (variable, log) in enumerate(zip(variables, logs, strict=True)):
                slopes = terms[index].row_slopes - terms[index + 1].column_slopes
                variable.grad = torch.where(variable == log, slopes, 0.0) + 2 * RIDGE * variable
            log_product = sum(term.log_norm for term in terms)
            if log_product < least:
                least, best = log_product, logs
            ridge = RIDGE * sum(float(v.square().sum()) for v in variables)
            return sum(term.log_schatten for term in terms) + ridge

        solver.step(evaluate)  # type: ignore[no-untyped-call]
    return best


def evened(weights: Sequence[Tensor], logs: Sequence[Tensor]) -> list[Tensor]:
    """Return log factors with one constant added for each layer, so that each norm is the geometric mean of all.

    Args:
        weights: As for :func:`least_product`.
        logs: The n - 1 vectors of log factors, shapes (m_l,).
    """
    sizes = [term.log_norm for term in _terms(weights, logs, 1)]
    mean = sum(sizes) / len(sizes)
    shift, evened = 0.0, []
    for size, log in zip(sizes, logs, strict=False):
        shift += mean - size
        evened.append(log + shift)
    return evened


@dataclass(frozen=True)
class _Term:
    """One layer's log Schatten norm and spectral norm, and the former's slopes in the log factors on either side."""

    log_schatten: float
    log_norm: float
    row_slopes: Tensor
    column_slopes: Tensor


def _term(weight: Tensor, columns: Tensor, rows: Tensor, power: int) -> _Term:
    """Return the term of ``diag(e^rows) W diag(e^-columns)``, W (m, n), not zero."""
    # By logarithms: no scale overflows.
    logs = weight.abs().log() + rows[:, None] - columns
    largest = logs.max()
    matrix = weight.sign() * (logs - largest).exp()
    tall = matrix.shape[0] > matrix.shape[1]
    if tall:
        matrix = matrix.mT
    # The Gram matrix blurs only singular values that do not count.
    eigenvalues, near = torch.linalg.eigh(matrix @ matrix.mT)
    log_sigma = eigenvalues.clamp_min(1e-30).log() / 2
    shares = torch.softmax(power * log_sigma, 0)
    counts = shares > 1e-16
    near, shares = near[:, counts], shares[counts]
    far = matrix.mT @ near
    far = far / far.norm(dim=0)
    left, right = (far, near) if tall else (near, far)
    return _Term(
        float(largest + torch.logsumexp(power * log_sigma, 0) / power),
        float(largest + log_sigma[-1]),
        left.square() @ shares,
        right.square() @ shares,
    )


class _Rows:
    """The differences of a matrix's rows, W (C, d), at factors of its columns, against those at factors of 1."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight / weight.abs().max()
        squares = self._squares(torch.ones(weight.shape[1], dtype=weight.dtype, device=weight.device))
        # Rows that are equal but for rounding stay so.
        self._differ = torch.ones_like(squares, dtype=torch.bool).triu(1) & (squares > 1e-20)
        self._before = squares[self._differ].log()

    def _squares(self, shares: Tensor) -> Tensor:
        """Return ``sum_u shares_u (w_iu - w_ju)^2``, (C, C)."""
        scaled = self._weight * shares.sqrt()
        return torch.cdist(scaled, scaled, compute_mode="donot_use_mm_for_euclid_dist").square()

    def term(self, columns: Tensor, power: int) -> _Term:
        """Return the largest log ratio at the log factors of the columns, smoothed, and its slopes."""
        least = columns.min()
        shares = (2 * (least - columns)).exp()
        squares = self._squares(shares)
        ratios = (squares[self._differ].log() - self._before) / 2 - least
        weights = torch.zeros_like(squares)
        weights[self._differ] = torch.softmax(power * ratios, 0) / squares[self._differ]
        weights = weights + weights.mT
        moments = weights.sum(1) @ self._weight.square() - (self._weight * (weights @ self._weight)).sum(0)
        return _Term(
            float(torch.logsumexp(power * ratios, 0) / power),
            float(ratios.max()),
            columns.new_zeros(len(self._weight)),
            shares * moments,
        )


def _terms(weights: Sequence[Tensor], logs: Sequence[Tensor], power: int, rows: _Rows | None = None) -> list[_Term]:
    ends = [weights[0].new_zeros(weights[0].shape[1]), *logs, weights[-1].new_zeros(len(weights[-1]))]
    pairs = list(zip(weights, pairwise(ends), strict=True))
    last = [] if rows is None else [rows.term(logs[-1], power)]
    return [_term(weight, *pair, power) for weight, pair in (pairs if rows is None else pairs[:-1])] + last
