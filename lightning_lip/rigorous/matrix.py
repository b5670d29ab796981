"""Certified upper bounds of a matrix's spectral norm, by a Cholesky factorisation that succeeds.

What is certified is the norm of the matrix as it is stored, in exact arithmetic. Assumed: IEEE 754 double precision,
and a BLAS and LAPACK on the CPU that multiply matrices by inner products in any order (no Strassen-like method), as
MKL, OpenBLAS and Accelerate do. Sources: S. Rump, "Verification of positive definiteness" (2006); N. Higham, "Accuracy
and Stability of Numerical Algorithms" (2nd ed., 2002), theorems 10.3 and 10.5.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_lip.checks import check_numbers, check_tensor, check_type
from lightning_lip.rigorous.rounding import (
    UNDERFLOW,
    UNIT_ROUNDOFF,
    divide_up,
    gamma,
    ldexp_up,
    multiply_up,
    sqrt_up,
    sum_up,
)

N_LANCZOS_STEPS = 80
"""Steps of the Lanczos iteration that finds where to try the factorisation first."""

SMALLEST_NORMAL = 2.0**-1022

FIRST_TOLERANCE = 1e-11
"""The first attempt lies this far (relative, in the square) above the estimate; each further one 8 times as far."""


@torch.no_grad()
def certified_matrix_norm(weight: Tensor, estimate: float | None = None) -> float:
    """Return a *certified upper bound* of a matrix's spectral norm: rounding is accounted for at each step.

    With ``G = fl(W W^T)`` on the short side p in fp64 and n the long side, a Cholesky factorisation of ``s^2 I - G``
    that succeeds proves

    ``||W||^2 <= s^2 + 2 u max(diag) + gamma_{p+8} / (1 - gamma_{p+8}) tr(s^2 I - G) + gamma_n ||W||_F^2``,

    evaluated with upward rounding; the Frobenius norm, likewise rounded up, is returned where it is smaller. The
    matrix is scaled by a power of two before, so that no magnitude overflows or underflows. The bound lies about
    1e-11 above the norm for small matrices, 1e-9 at p = 4096 once the estimate is accurate.

    Args:
        weight: The matrix, shape (m, n), real floating point of any dtype, on any device (the work is done on the
            CPU; fp16, bf16 and fp32 convert to fp64 exactly).
        estimate: A guess of the norm, which spares the iteration that finds one. A poor one costs time or tightness,
            never the guarantee.

    Returns:
        The bound; 0.0 for a zero matrix, inf where the norm itself may exceed the largest float, 1.8e308.

    Raises:
        ValueError: If `weight` is not a real matrix, or holds NaN or an infinity.
        RuntimeError: Under ``torch.set_flush_denormal(True)``.

    Example:
        >>> import torch
        >>> from lightning_lip.certificates import certified_matrix_norm
        >>> bound = certified_matrix_norm(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
        >>> 4 <= bound < 4 + 1e-9
        True
    """
    check_type("weight", weight, Tensor, "a matrix")
    if estimate is not None:
        (estimate,) = check_numbers("estimate", [estimate])
    matrix, exponent = scaled_matrix(weight)
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.mT
    if matrix.numel() == 0:
        return 0.0
    largest = matrix.abs().max().item()
    if largest == 0 or matrix.numel() == 1:
        return ldexp_up(largest, exponent)
    short_side, long_side = matrix.shape
    gram = matrix @ matrix.mT
    # tr(G) is ||W||_F^2 up to the relative error of its n-term sums.
    frobenius_squared = sum_up([divide_up(sum_up(gram.diagonal().tolist()), 1 - gamma(long_side)), UNDERFLOW])
    squared = frobenius_squared
    if short_side > 1:
        guess = None if estimate is None else _scaled_guess(estimate, exponent)
        eigenvalue = certified_largest_eigenvalue(gram, guess, sufficient=frobenius_squared)
        gram_error = multiply_up(gamma(long_side), frobenius_squared)
        squared = min(squared, sum_up([eigenvalue, gram_error, UNDERFLOW]))
    return ldexp_up(sum_up([sqrt_up(squared), UNDERFLOW]), exponent)


def scaled_matrix(weight: Tensor) -> tuple[Tensor, int]:
    """Return W / 2^e in fp64 on the CPU and e, with the largest magnitude in [1/2, 1); e = 0 for a zero matrix.

    The conversion is exact but for entries that lie 2^-1022 or more below the largest; :data:`UNDERFLOW` covers them.

    Raises:
        ValueError: If `weight` is not a real matrix, or holds NaN or an infinity.
        RuntimeError: Under ``torch.set_flush_denormal(True)``.
    """
    if SMALLEST_NORMAL / 2 == 0:
        raise RuntimeError(
            "Subnormal numbers are flushed to zero, so weights would be lost: call torch.set_flush_denormal(False)."
        )
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"Expected a weight that is a real floating-point matrix of shape (m, n), got {weight.dtype} of shape "
            f"{tuple(weight.shape)}."
        )
    check_tensor("weight", weight)
    matrix = weight.detach().to("cpu", torch.float64)
    if matrix.numel() == 0:
        return matrix, 0
    largest = matrix.abs().max().item()
    if not math.isfinite(largest):
        raise ValueError("Expected a matrix of finite numbers, got NaN or an infinity: it has no spectral norm.")
    exponent = math.frexp(largest)[1]
    return scaled_by_power(matrix, -exponent), exponent


def scaled_by_power(matrix: Tensor, exponent: int) -> Tensor:
    """Return ``matrix * 2^exponent``, fp64, exact but for underflow."""
    # 2^1074 is no float, so a subnormal matrix needs two factors.
    first = exponent // 2
    return matrix * 2.0**first * 2.0 ** (exponent - first)


def _scaled_guess(estimate: float, exponent: int) -> float | None:
    """Return the square of the estimate in the scaled matrix's unit, or None if it is no use."""
    if not (math.isfinite(estimate) and estimate > 0):
        return None
    mantissa, own_exponent = math.frexp(estimate)
    shift = own_exponent - exponent
    # A scaled matrix has a norm between 1/2 and the square root of its number of elements.
    return math.ldexp(mantissa, shift) ** 2 if -2 <= shift <= 64 else None


def certified_largest_eigenvalue(
    matrix: Tensor, estimate: float | None = None, sufficient: float = math.inf, tolerance: float | None = None
) -> float:
    """Return a *certified upper bound* of the largest eigenvalue of a symmetric matrix that is positive semidefinite.

    Args:
        matrix: Shape (p, p), fp64 on the CPU, of entries between 1e-200 and 1e200 or so; its lower triangle defines
            it. Positive semidefinite up to rounding errors.
        estimate: A guess of the eigenvalue; None finds one.
        sufficient: A bound that is known already: once the attempts exceed it, it is returned.
        tolerance: How far (relative) above the estimate the first attempt lies; None for :data:`FIRST_TOLERANCE`.
    """
    size = matrix.shape[0]
    diagonal = matrix.diagonal()
    # No eigenvalue exceeds the trace by more than rounding, and the largest is no smaller than a diagonal entry.
    smallest = max(diagonal.max().item(), UNDERFLOW)
    if estimate is None:
        estimate = _estimated_largest_eigenvalue(matrix)
    estimate = min(max(estimate, smallest), max(diagonal.sum().item(), smallest))
    tolerance = FIRST_TOLERANCE if tolerance is None else tolerance
    while True:
        attempt = estimate * (1 + tolerance)
        if attempt >= sufficient:
            return sufficient
        shifted = matrix.neg()
        shifted.diagonal().add_(attempt)
        if torch.linalg.cholesky_ex(shifted).info.item() == 0:
            break
        tolerance *= 8
    shifted_diagonal = shifted.diagonal().tolist()
    factorisation = gamma(size + 8)
    return sum_up(
        [
            attempt,
            2 * UNIT_ROUNDOFF * max(shifted_diagonal),
            multiply_up(divide_up(factorisation, 1 - factorisation), sum_up(shifted_diagonal)),
            UNDERFLOW,
        ]
    )


def positive_definite_margin(trace: float, size: int) -> float:
    """Return t such that a Cholesky factorisation of ``fl(A - t I)`` that succeeds proves A > 0.

    Args:
        trace: An upper bound of the trace of A.
        size: The number of rows of A.
    """
    factorisation = gamma(size + 8)
    # Twice: once for the factorisation's own error and the rounded diagonal, once to be strictly positive.
    return 2 * sum_up([multiply_up(divide_up(factorisation, 1 - factorisation) + 2 * UNIT_ROUNDOFF, trace), UNDERFLOW])


def _estimated_largest_eigenvalue(matrix: Tensor) -> float:
    """Return an *estimate (from below)*: exact up to rounding for small matrices, by Lanczos iteration for others."""
    size = matrix.shape[0]
    if size <= 2 * N_LANCZOS_STEPS:
        return float(torch.linalg.eigvalsh(matrix)[-1])
    generator = torch.Generator("cpu").manual_seed(0)
    start = torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")
    basis = torch.zeros(N_LANCZOS_STEPS + 1, size, dtype=torch.float64, device="cpu")
    basis[0] = start / start.norm()
    tridiagonal = torch.zeros(N_LANCZOS_STEPS, N_LANCZOS_STEPS, dtype=torch.float64, device="cpu")
    steps = 0
    for step in range(N_LANCZOS_STEPS):
        image = matrix @ basis[step]
        tridiagonal[step, step] = basis[step] @ image
        steps = step + 1
        # Twice is enough to keep the basis orthogonal to rounding.
        for _ in range(2):
            image = image - basis[:steps].mT @ (basis[:steps] @ image)
        length = image.norm()
        if steps == N_LANCZOS_STEPS or length <= 1e-14 * tridiagonal[0, 0].abs():
            break
        basis[steps] = image / length
        tridiagonal[step, steps] = tridiagonal[steps, step] = length
    return float(torch.linalg.eigvalsh(tridiagonal[:steps, :steps])[-1])
