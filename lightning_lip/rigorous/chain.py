"""Bounds of a chain of matrices and activations that are tighter than the product of the spectral norms.

The network is ``W_n R_{n-1} W_{n-1} ... R_1 W_1``; biases, added to any of them, change nothing. Both bounds here are
*certified upper bounds* for the weights as they are stored, in exact arithmetic: each matrix product carries a bound
of its rounding error, each inequality between matrices is proven by a Cholesky factorisation (see
:mod:`lightning_lip.rigorous.matrix` for what that assumes), and scalars are rounded up. Matrices are scaled by powers
of two, so that deep chains and extreme weights do not overflow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lightning_lip.rigorous.matrix import (
    certified_largest_eigenvalue,
    certified_matrix_norm,
    positive_definite_margin,
    scaled_by_power,
    scaled_matrix,
)
from lightning_lip.rigorous.rounding import (
    UNDERFLOW,
    UNIT_ROUNDOFF,
    frobenius_up,
    gamma,
    ldexp_up,
    multiply_up,
    sqrt_up,
    sum_up,
)

Slopes = tuple[float, float]
"""(a, b): every difference quotient of an elementwise activation lies in [a, b]; ReLU, Tanh: (0, 1)."""


def product_bound(weights: Sequence[Tensor], slopes: Sequence[Slopes]) -> float:
    """Return the product of the certified spectral norms and of the activations' ``max(|a|, |b|)``, rounded up.

    Args:
        weights: ``W_1, ..., W_n``, in the order in which they are applied, shapes (m_i, n_i) with n_{i+1} = m_i.
        slopes: The n - 1 activations' slopes.

    Returns:
        The *certified upper bound*; inf where it exceeds the largest float.

    Raises:
        ValueError: If the shapes or the number of slopes do not fit, or a number is not finite.
    """
    _check_chain(weights, slopes)
    return _product(
        [certified_matrix_norm(weight) for weight in weights] + [max(abs(low), abs(high)) for low, high in slopes]
    )


def combettes_pesquet(weights: Sequence[Tensor], slopes: Sequence[Slopes]) -> float:
    """Return the bound of Combettes & Pesquet (2020), from the norms of the chain's partial products.

    An activation with slopes in [a, b] is ``c Id + r Q``, ``c = (a + b) / 2``, ``r = (b - a) / 2``, Q nonexpansive.
    Taking all of them apart, the last one first, gives

    ``theta_n = |c_1 .. c_{n-1}| ||W_n .. W_1|| + sum_{k=2..n} r_{k-1} |c_k .. c_{n-1}| ||W_n .. W_k|| theta_{k-1}``.

    As ``|c| + r = max(|a|, |b|)`` it is never above the product, but for rounding (a relative 1e-9). Where c = 0, any
    map of that Lipschitz constant may stand, elementwise or not. About n^2 / 2 matrix products and certificates.

    Args:
        weights: ``W_1, ..., W_n``, as in :func:`product_bound`.
        slopes: The n - 1 activations' slopes.

    Returns:
        The *certified upper bound*; inf where it exceeds the largest float.

    Raises:
        ValueError: As :func:`product_bound`.
    """
    _check_chain(weights, slopes)
    normalised = _normalised(weights)
    if normalised is None:
        return 0.0
    matrices, norms, exponent = normalised
    frobenius = [frobenius_up(matrix) for matrix in matrices]
    # The scaled chain's activations keep their slopes: the bound is homogeneous in each matrix.
    linear = [_half_up(abs(low + high)) for low, high in slopes]
    residue = [_half_up(high - low) for low, high in slopes]
    thetas: list[float] = []
    for last, matrix in enumerate(matrices):
        partial, error, factor = matrix, UNDERFLOW, 1.0
        partial_norm = norms[last]
        terms = []
        for first in range(last, -1, -1):
            # Here `partial` is W_last .. W_first up to `error`, and `factor` is |c_first .. c_{last-1}|.
            if first < last:
                error = _product_error(partial, error, matrices[first], norms[first], frobenius[first])
                partial = partial @ matrices[first]
                partial_norm = sum_up([certified_matrix_norm(partial), error])
            if first == 0:
                terms.append(multiply_up(factor, partial_norm))
                break
            terms.append(multiply_up(residue[first - 1], factor, partial_norm, thetas[first - 1]))
            factor = multiply_up(factor, linear[first - 1])
            if factor == 0:
                break
        thetas.append(sum_up(terms))
    return ldexp_up(thetas[-1], exponent)


def eclipse_fast(weights: Sequence[Tensor], slopes: Sequence[Slopes]) -> float:
    """Return the bound ECLipsE-Fast of Xu & Sivaranjani (NeurIPS 2024), for slopes in [0, b].

    The semidefinite bound LipSDP with one multiplier a layer, solved layer by layer in closed form. With
    ``X_0 = I``, ``S_i = W_i X_{i-1}^-1 W_i^T``, ``s_i >= ||S_i||`` and ``X_i = I - S_i / (2 s_i)`` the bound is

    ``L^2 = 2 prod_i (s_i / 2)``  (this is the paper's recursion with each X_i divided by its multiplier).

    Since ``X_i >= I / 2`` it is never above the product, but for rounding. Here every S_i is a computed matrix plus a
    multiple of the identity for which a Cholesky factorisation of ``[[X, W^T], [W, S]]`` proves ``S >= W X^-1 W^T``,
    and X_i is rounded down, so that the result is rigorous.

    Args:
        weights: ``W_1, ..., W_n``, as in :func:`product_bound`.
        slopes: The n - 1 activations' slopes, each with a >= 0.

    Returns:
        The *certified upper bound*; inf where it exceeds the largest float, or a factorisation does not succeed.

    Raises:
        ValueError: As :func:`product_bound`, and if a slope may be negative.
    """
    _check_chain(weights, slopes)
    if any(low < 0 for low, _ in slopes):
        raise ValueError(f"ECLipsE-Fast needs activations with slopes of at least 0, got {list(slopes)}.")
    normalised = _normalised(weights)
    if normalised is None:
        return 0.0
    matrices, _, exponent = normalised
    factors = [sqrt_up(2.0)]
    lower: Tensor | None = None
    for matrix in matrices:
        schur = _gram_upper(matrix) if lower is None else _schur_upper(lower, matrix)
        if schur is None:
            return math.inf
        largest = certified_largest_eigenvalue(schur)
        factors.append(sqrt_up(_half_up(largest)))
        lower = _identity_minus(schur, largest)
    bound = multiply_up(*factors, *(high for _, high in slopes))
    return ldexp_up(bound, exponent)


def chain_cost(weights: Sequence[Tensor]) -> float:
    """Return about how many floating-point operations the two bounds need, to decide whether to wait for them."""
    cost = 0.0
    for last in range(len(weights)):
        rows = weights[last].shape[0]
        for first in range(last, -1, -1):
            inner, columns = weights[first].shape
            short, long = sorted((rows, columns))
            cost += 2.0 * rows * inner * columns + 2.0 * short * short * long + short**3
    return cost + sum(sum(weight.shape) ** 3 for weight in weights)


def _check_chain(weights: Sequence[Tensor], slopes: Sequence[Slopes]) -> None:
    if not weights or len(slopes) != len(weights) - 1:
        raise ValueError(
            f"Expected n >= 1 weights and the slopes of the n - 1 activations between them, got {len(weights)} weights "
            f"and {len(slopes)} pairs of slopes."
        )
    for before, after in pairwise(weights):
        if before.dim() != 2 or after.dim() != 2 or before.shape[0] != after.shape[1]:
            raise ValueError(
                "Expected matrices in the order in which they are applied, each with as many columns as the one before "
                f"has rows, got shapes {[tuple(weight.shape) for weight in weights]}."
            )
    for low, high in slopes:
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise ValueError(f"Expected finite slopes (a, b) with a <= b, got ({low}, {high}).")


def _normalised(weights: Sequence[Tensor]) -> tuple[list[Tensor], list[float], int] | None:
    """Return fp64 matrices ``W_i / 2^{e_i}`` of norm at most 1, their certified norms and the sum of the e_i.

    None if a matrix is zero.
    """
    matrices, norms, total = [], [], 0
    for weight in weights:
        matrix, exponent = scaled_matrix(weight)
        norm = certified_matrix_norm(matrix)
        if norm == 0:
            return None
        mantissa, shift = math.frexp(norm)
        matrices.append(scaled_by_power(matrix, -shift))
        norms.append(mantissa)
        total += exponent + shift
    return matrices, norms, total


def _product(factors: Sequence[float]) -> float:
    """Return the product of numbers >= 0 rounded up, without overflow or underflow on the way."""
    mantissa, exponent = 1.0, 0
    for factor in factors:
        if factor == 0:
            return 0.0
        if factor == math.inf:
            return math.inf
        mantissa, shift = math.frexp(multiply_up(mantissa, factor))
        exponent += shift
    return ldexp_up(mantissa, exponent)


def _half_up(value: float) -> float:
    # A half of a rounded sum or difference: one rounding, away from zero.
    return 0.0 if value == 0 else ldexp_up(math.nextafter(value, math.inf), -1)


def _product_error(left: Tensor, left_error: float, right: Tensor, right_norm: float, right_frobenius: float) -> float:
    """Return an upper bound of ``||fl(left right) - true||``, where `left` is off by `left_error` already."""
    rounding = multiply_up(gamma(left.shape[1]), frobenius_up(left), right_frobenius)
    # `right` itself was scaled, so it may have lost entries to underflow.
    underflow = multiply_up(UNDERFLOW, sum_up([frobenius_up(left), left_error, 1.0]))
    return sum_up([multiply_up(left_error, right_norm), rounding, underflow])


def _symmetric(matrix: Tensor) -> Tensor:
    """Return the symmetric matrix that the lower triangle of `matrix` defines."""
    return matrix.tril() + matrix.tril(-1).mT


def _gram_upper(matrix: Tensor) -> Tensor:
    """Return a matrix S >= W W^T, in the order of symmetric matrices."""
    frobenius = frobenius_up(matrix)
    gram = _symmetric(matrix @ matrix.mT)
    # gamma_{n+1}: the diagonal is rounded once more.
    shift = sum_up([multiply_up(gamma(matrix.shape[1] + 2), frobenius, frobenius), 3 * UNDERFLOW])
    gram.diagonal().add_(2 * shift)
    return gram


def _schur_upper(lower: Tensor, matrix: Tensor) -> Tensor | None:
    """Return a matrix ``S >= W X^-1 W^T`` for X = `lower`, or None if that could not be proven."""
    size = lower.shape[0]
    factor, info = torch.linalg.cholesky_ex(lower)
    if info.item() != 0:
        return None
    half = torch.linalg.solve_triangular(factor, matrix.mT, upper=False)
    schur = _symmetric(half.mT @ half)
    block = torch.cat([torch.cat([lower, matrix.mT], dim=1), torch.cat([matrix, schur], dim=1)])
    # The shift below adds at most 1 to each diagonal entry.
    trace = sum_up([*block.diagonal().tolist(), float(matrix.shape[0])])
    margin = sum_up([positive_definite_margin(trace, block.shape[0]), UNDERFLOW])
    shift = 16 * margin
    while shift < 1:
        shifted = schur.clone()
        shifted.diagonal().add_(shift)
        block[size:, size:] = shifted
        attempt = block.clone()
        attempt.diagonal().sub_(margin)
        if torch.linalg.cholesky_ex(attempt).info.item() == 0:
            return shifted
        shift *= 4
    return None


def _identity_minus(schur: Tensor, largest: float) -> Tensor:
    """Return a matrix ``X <= I - S / (2 s)``, in the order of symmetric matrices, s = `largest`."""
    lower = -(schur / (2 * largest))
    # ||S / 2s||_F <= sqrt(m) / 2 for the rounded quotients, two roundings of at most u for the diagonal's sums.
    error = UNIT_ROUNDOFF * (math.isqrt(schur.shape[0]) + 16)
    lower.diagonal().add_(1.0).sub_(error)
    return lower
