"""Columns of the tables that the Triton kernels share; :mod:`lightning_lip.kernels.gpu.tables` writes them."""

# Triton's decorators and its tensor language carry no types that mypy could check.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

# Columns of the table of layers (int64), written by gpu_tables.
Q: tl.constexpr = tl.constexpr(0)
P: tl.constexpr = tl.constexpr(1)
Q_STRIDE: tl.constexpr = tl.constexpr(2)
P_STRIDE: tl.constexpr = tl.constexpr(3)
CONFIG: tl.constexpr = tl.constexpr(4)
LONG_OFFSET: tl.constexpr = tl.constexpr(5)
SHORT_OFFSET: tl.constexpr = tl.constexpr(6)
LD: tl.constexpr = tl.constexpr(7)
PARTIAL_OFFSET: tl.constexpr = tl.constexpr(8)
STRIP_BEGIN: tl.constexpr = tl.constexpr(9)
STRIP_END: tl.constexpr = tl.constexpr(10)
SHORT_BEGIN: tl.constexpr = tl.constexpr(11)
SHORT_END: tl.constexpr = tl.constexpr(12)
LONG_BEGIN: tl.constexpr = tl.constexpr(13)
LONG_END: tl.constexpr = tl.constexpr(14)
BLOCK: tl.constexpr = tl.constexpr(15)
N_COLUMNS: tl.constexpr = tl.constexpr(16)

# Columns of the solved scalars (fp64).
USABLE: tl.constexpr = tl.constexpr(0)
INVERSE_T: tl.constexpr = tl.constexpr(1)
INVERSE_Z: tl.constexpr = tl.constexpr(2)
SHIFT: tl.constexpr = tl.constexpr(3)
SIGMA: tl.constexpr = tl.constexpr(4)
N_SCALARS: tl.constexpr = tl.constexpr(8)


@triton.jit
def is_finite(x):
    """Return whether numbers are neither infinite nor NaN."""
    return (x - x) == 0
