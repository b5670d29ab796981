"""Columns of the tables that the Triton kernels share; :mod:`lightning_lip.kernels.gpu.tables` writes them."""

# Triton's decorators and its tensor language carry no types that mypy could check.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

# Columns of the table of layers (int64), written by gpu_tables.
Q, P, Q_STRIDE, P_STRIDE, CONFIG, LONG_OFFSET, SHORT_OFFSET, LD, PARTIAL_OFFSET = map(tl.constexpr, range(9))
STRIP_BEGIN, STRIP_END, SHORT_BEGIN, SHORT_END, LONG_BEGIN, LONG_END, BLOCK = map(tl.constexpr, range(9, 16))
N_COLUMNS = tl.constexpr(16)

# Columns of the solved scalars (fp64).
USABLE, INVERSE_T, INVERSE_Z, SHIFT, SIGMA = map(tl.constexpr, range(5))
N_SCALARS = tl.constexpr(8)


@triton.jit
def is_finite(x):
    """Return whether numbers are neither infinite nor NaN."""
    return (x - x) == 0
