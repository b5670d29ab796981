"""The Triton kernels of the penalty's derivative and of the rank-one update of the gradients.

Part of :mod:`lightning_lip.kernels.gpu.kernels`, which explains the whole.
"""

# Triton's decorators and its tensor language carry no types that mypy could check.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from lightning_lip.kernels.gpu.columns import N_SCALARS, SIGMA, is_finite
from lightning_lip.kernels.penalties import PENALTY_CODES

PRODUCT: tl.constexpr = tl.constexpr(PENALTY_CODES["product"])
SOFTPLUS_LOG: tl.constexpr = tl.constexpr(PENALTY_CODES["softplus_log"])
HINGE_LOG: tl.constexpr = tl.constexpr(PENALTY_CODES["hinge_log"])
LAYER_SUM: tl.constexpr = tl.constexpr(PENALTY_CODES["layer_sum"])
LAYER_SUM_SQUARES: tl.constexpr = tl.constexpr(PENALTY_CODES["layer_sum_squares"])


@triton.jit
def coefficients(
    scalars,  # fp64 (L, N_SCALARS)
    multiplicities,  # fp64 (L,)
    out,  # fp32 (L,): scale df/dsigma
    value,  # fp32 (1,): scale f
    level_high,  # log M or log knee, and the factor, each as the sum of two fp32: Triton passes no fp64
    level_low,
    scale_high,
    scale_low,
    n_layers,
    CODE: tl.constexpr,
    BL: tl.constexpr,
):
    """One program: a built-in penalty and its derivative in closed form (kernels/penalties.py), in fp64."""
    level = tl.full([], 0.0, tl.float64) + level_high + level_low
    scale = tl.full([], 0.0, tl.float64) + scale_high + scale_low
    total = tl.zeros([BL], tl.float64)
    for begin in range(0, n_layers, BL):
        n = begin + tl.arange(0, BL)
        mask = n < n_layers
        s = tl.load(scalars + n * N_SCALARS + SIGMA, mask=mask, other=1.0)
        k = tl.load(multiplicities + n, mask=mask, other=0.0)
        if CODE == LAYER_SUM:
            total += k * s
        elif CODE == LAYER_SUM_SQUARES:
            total += k * s * s
        else:
            total += tl.where(mask, k * tl.log(s), 0.0)
    x = tl.sum(total, axis=0)
    slope = tl.full([], 1.0, tl.float64)
    f = x
    if CODE == PRODUCT:
        capped = tl.where(x > level, level, x)
        slope = tl.exp(capped)
        f = slope * (1.0 + (x - capped))
        f = tl.where(slope == 0, 0.0, f)
    elif CODE == SOFTPLUS_LOG:
        x -= level
        e = tl.exp(-tl.abs(x))
        f = tl.where(x > 0, x, 0.0) + tl.log(1.0 + e)
        f = tl.where(x == x, f, x)
        slope = tl.where(x > 0, 1.0, e) / (1.0 + e)
    elif CODE == HINGE_LOG:
        excess = x - level
        excess = tl.where(excess <= 0, 0.0, excess)
        f = excess * excess
        slope = 2.0 * excess
    tl.store(value, (scale * f).to(tl.float32))
    for begin in range(0, n_layers, BL):
        n = begin + tl.arange(0, BL)
        mask = n < n_layers
        s = tl.load(scalars + n * N_SCALARS + SIGMA, mask=mask, other=1.0)
        k = tl.load(multiplicities + n, mask=mask, other=0.0)
        if CODE == LAYER_SUM:
            c = scale * k + 0.0 * s
        elif CODE == LAYER_SUM_SQUARES:
            c = scale * k * 2.0 * s
        else:
            c = scale * k * slope / s
        c = tl.where(s > 0, c, 0.0).to(tl.float32)
        tl.store(out + n, tl.where(is_finite(c), c, 0.0), mask=mask)


@triton.jit
def rank_one(
    addresses,  # int64 (L,): where each gradient begins, 0 for none
    tables,  # int64 (L, 8): rows, columns, row stride, column stride, offsets of u and v, 0, 0
    tiles,  # int32 (grid, 4): layer, first row, first column, 0
    singular,  # fp32: long and short singular vectors, one behind the other
    factors,  # fp32 (L,)
    DTYPE: tl.constexpr,
    VEC: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Add c u v^T to one tile of one gradient: one read, one write, the sum in fp32 and rounded once."""
    tile = tiles + tl.program_id(0) * 4
    layer = tl.load(tile)
    address = tl.load(addresses + layer)
    c = tl.load(factors + layer)
    # A coefficient that is zero or not finite leaves the gradient as it is, whatever the vectors hold.
    if (address != 0) & (c != 0) & is_finite(c):
        row = tables + layer.to(tl.int64) * 8
        n_rows = tl.load(row).to(tl.int32)
        n_cols = tl.load(row + 1).to(tl.int32)
        row_stride = tl.load(row + 2)
        u_ptr = singular + tl.load(row + 4)
        v_ptr = singular + tl.load(row + 5)
        first = tl.load(tile + 2)
        base = address.to(tl.pointer_type(DTYPE))
        if ALIGNED:
            base = tl.multiple_of(base, 16)
            row_stride = tl.multiple_of(row_stride, VEC)
            n_cols = tl.multiple_of(n_cols, VEC)
            first = tl.multiple_of(first, 16)
        i = tl.load(tile + 1) + tl.arange(0, BM)
        j = first + tl.arange(0, BN)
        mask = (i < n_rows)[:, None] & (j < n_cols)[None, :]
        if ALIGNED:
            pointers = base + i.to(tl.int64)[:, None] * row_stride + j[None, :]
        else:
            pointers = base + i.to(tl.int64)[:, None] * row_stride + j.to(tl.int64)[None, :] * tl.load(row + 3)
        u = tl.load(u_ptr + i, mask=i < n_rows, other=0.0) * c
        v = tl.load(v_ptr + j, mask=j < n_cols, other=0.0)
        grad = tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        tl.store(pointers, (grad + u[:, None] * v[None, :]).to(DTYPE), mask=mask)
