"""The Triton kernels behind the sweep: Z from its parts, the leading Ritz pair, the next block.

Part of :mod:`lightning_lip.kernels.gpu.kernels`, which explains the whole.
"""

# Triton's decorators and its tensor language carry no types that mypy could check.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from lightning_lip.kernels.gpu.columns import (
    BLOCK,
    INVERSE_T,
    INVERSE_Z,
    LD,
    LONG_BEGIN,
    LONG_END,
    LONG_OFFSET,
    N_COLUMNS,
    N_SCALARS,
    PARTIAL_OFFSET,
    SHIFT,
    SHORT_BEGIN,
    SHORT_END,
    SHORT_OFFSET,
    SIGMA,
    STRIP_BEGIN,
    STRIP_END,
    USABLE,
    P,
    Q,
    is_finite,
)

N_SQUARINGS: tl.constexpr = tl.constexpr(20)
RELATIVE_SHIFT: tl.constexpr = tl.constexpr(2.0**-15)
ENOUGH: tl.constexpr = tl.constexpr(1e-8)
NOISE: tl.constexpr = tl.constexpr(1e-12)


@triton.jit
def _sum_of_grams(grams, begin, end, R: tl.constexpr):
    """Add the partial Gram matrices [begin, end) in a fixed order, shape (R, R), fp64."""
    BS: tl.constexpr = 512 // (R * R) if R < 16 else 2
    i = tl.arange(0, R)
    square = i[:, None] * R + i[None, :]
    total = tl.zeros([BS, R, R], tl.float64)
    for s in range(begin, end, BS):
        n = s + tl.arange(0, BS)
        pointers = grams + n.to(tl.int64)[:, None, None] * (R * R) + square[None, :, :]
        total += tl.load(pointers, mask=tl.broadcast_to((n < end)[:, None, None], [BS, R, R]), other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _store_gram(grams, task, gram, R: tl.constexpr):
    i = tl.arange(0, R)
    tl.store(grams + task.to(tl.int64) * (R * R) + i[:, None] * R + i[None, :], gram)


@triton.jit
def reduce(
    layers,  # int64 (L, N_COLUMNS)
    tasks,  # int32 (grid, 4): layer, first column of Z or first row of T, 1 for T, unused
    images,  # fp32, T
    partials,  # fp32
    scales,  # fp32 (all strips, R)
    rows_z,  # fp32: Z of every layer, (R, ld) at SHORT_OFFSET R, divided by the layer's scale
    layer_scales,  # fp32 (L,)
    grams,  # fp64 (tasks, R, R)
    R: tl.constexpr,
    BC: tl.constexpr,
    SHORT: tl.constexpr,
    LONG: tl.constexpr,
):
    """Z = sum of the strips' partial sums, in a fixed order; partial Gram matrices of T and of Z."""
    task = tl.program_id(0)
    layer = tl.load(tasks + task * 4)
    begin = tl.load(tasks + task * 4 + 1)
    of_images = tl.load(tasks + task * 4 + 2)
    row = layers + layer.to(tl.int64) * N_COLUMNS
    k = tl.arange(0, R)
    gram = tl.zeros([R, R, BC], tl.float64)
    if of_images != 0:
        t_ptr = images + tl.load(row + LONG_OFFSET) * R
        end = tl.minimum(begin + LONG, tl.load(row + Q).to(tl.int32))
        for c in range(begin, end, BC):
            i = c + tl.arange(0, BC)
            t = tl.load(
                t_ptr + i.to(tl.int64)[None, :] * R + k[:, None],
                mask=tl.broadcast_to((i < end)[None, :], [R, BC]),
                other=0.0,
            ).to(tl.float64)
            gram += t[:, None, :] * t[None, :, :]
    else:
        BS: tl.constexpr = 4096 // (R * BC) if R * BC < 4096 else 1
        ld = tl.multiple_of(tl.load(row + LD).to(tl.int32), 16)
        first = tl.load(row + STRIP_BEGIN).to(tl.int32)
        last = tl.load(row + STRIP_END).to(tl.int32)
        z_ptr = rows_z + tl.multiple_of(tl.load(row + SHORT_OFFSET), 16) * R
        partial_ptr = partials + tl.multiple_of(tl.load(row + PARTIAL_OFFSET), 16)
        end = tl.minimum(begin + SHORT, tl.load(row + P).to(tl.int32))
        highest = tl.zeros([BS, R], tl.float32)
        for s in range(first, last, BS):
            n = s + tl.arange(0, BS)
            mask = tl.broadcast_to((n < last)[:, None], [BS, R])
            highest = tl.maximum(highest, tl.load(scales + n[:, None] * R + k[None, :], mask=mask, other=0.0))
        scale = tl.max(tl.max(highest, axis=1), axis=0)
        if begin == 0:
            tl.store(layer_scales + layer, scale)
        for c in range(begin, end, BC):
            cols = c + tl.arange(0, BC)
            inside = (cols < end)[None, :]
            total = tl.zeros([BS, R, BC], tl.float32)
            for s in range(first, last, BS):
                n = s + tl.arange(0, BS)
                mask = tl.broadcast_to((n < last)[:, None], [BS, R])
                factor = tl.load(scales + n[:, None] * R + k[None, :], mask=mask, other=0.0) / scale
                pointers = (
                    partial_ptr
                    + ((n - first).to(tl.int64) * R)[:, None, None] * ld
                    + k[None, :, None] * ld
                    + cols[None, None, :]
                )
                part = tl.load(pointers, mask=(n < last)[:, None, None] & inside[None, :, :], other=0.0)
                total += part * factor[:, :, None]
            z = tl.sum(total, axis=0)
            tl.store(z_ptr + k[:, None] * ld + cols[None, :], z, mask=tl.broadcast_to(inside, [R, BC]))
            z = z.to(tl.float64)
            gram += z[:, None, :] * z[None, :, :]
    _store_gram(grams, task, tl.sum(gram, axis=2), R)


@triton.jit
def _diagonal(matrix, R: tl.constexpr):
    i = tl.arange(0, R)
    return tl.sum(tl.where(i[:, None] == i[None, :], matrix, 0.0), axis=1)


@triton.jit
def _unit_rows(gram, R: tl.constexpr):
    """Return the Gram matrix of the rows divided by their lengths, and the diagonal matrix of one over these lengths.

    Rows of zeros pad a narrow block; a unit diagonal lets them pass through and stay zero.
    """
    i = tl.arange(0, R)
    same = i[:, None] == i[None, :]
    down = _diagonal(gram, R)
    across = tl.sum(tl.where(same, gram, 0.0), axis=0)
    down = tl.where(down > 0, 1.0 / tl.sqrt(tl.where(down > 0, down, 1.0)), 0.0)
    across = tl.where(across > 0, 1.0 / tl.sqrt(tl.where(across > 0, across, 1.0)), 0.0)
    unit = tl.where(same, 1.0, gram * down[:, None] * across[None, :])
    return unit, tl.where(same, across[None, :] + 0.0 * down[:, None], 0.0)


@triton.jit
def _smallest_pivot(gram, rotation, trace, size, R: tl.constexpr):
    """Return the smallest Cholesky pivot of the Gram matrix of the rotated rows [0, size), scaled to length one.

    It is zero where a row is so much shorter than the longest one that its length is lost in rounding.
    """
    i = tl.arange(0, R)
    half = tl.sum(rotation[:, :, None] * gram[None, :, :], axis=1)
    rotated = tl.sum(half[:, None, :] * rotation[None, :, :], axis=2)
    shortest = tl.min(tl.where(i < size, _diagonal(rotated, R), trace), axis=0)
    rest = _unit_rows(rotated, R)[0]
    smallest = tl.where(shortest > trace * NOISE, 1.0, 0.0).to(tl.float64)
    for j in range(R):
        column = tl.sum(tl.where(i[None, :] == j, rest, 0.0), axis=1)
        line = tl.sum(tl.where(i[:, None] == j, rest, 0.0), axis=0)
        pivot = tl.sum(tl.where(i == j, column, 0.0), axis=0)
        smallest = tl.where(smallest < pivot, smallest, pivot)
        rest -= column[:, None] * (line / tl.where(pivot > 0, pivot, 1.0))[None, :]
    return smallest


@triton.jit
def solve(
    layers,  # int64 (L, N_COLUMNS)
    grams,  # fp64 (tasks, R, R)
    layer_scales,  # fp32 (L,)
    rotations,  # fp64 (L, R, R)
    scalars,  # fp64 (L, N_SCALARS)
    sigma,  # fp32 (L,)
    R: tl.constexpr,
    ONLY_T: tl.constexpr,
):
    """One program a layer: the leading eigenvector x of T^T T, sigma = |x Z| / |T x|, a rotation with x first."""
    layer = tl.program_id(0)
    row = layers + layer.to(tl.int64) * N_COLUMNS
    i = tl.arange(0, R)
    gram_t = _sum_of_grams(grams, tl.load(row + LONG_BEGIN).to(tl.int32), tl.load(row + LONG_END).to(tl.int32), R)
    if ONLY_T:
        gram_z = gram_t
    else:
        gram_z = _sum_of_grams(grams, tl.load(row + SHORT_BEGIN).to(tl.int32), tl.load(row + SHORT_END).to(tl.int32), R)
    trace_t = tl.sum(_diagonal(gram_t, R), axis=0)
    trace_z = tl.sum(_diagonal(gram_z, R), axis=0)
    finite = is_finite(trace_t) & is_finite(trace_z)
    positive = finite & (trace_t > 0) & (trace_z > 0)

    power = tl.where(
        positive, gram_t / tl.where(positive, trace_t, 1.0), tl.where(i[:, None] + i[None, :] == 0, 1.0, 0.0)
    )
    for _ in range(N_SQUARINGS):
        # The matrix is symmetric, so rows times rows is its square, symmetric again to the last bit.
        power = tl.sum(power[:, None, :] * power[None, :, :], axis=2)
        # One division for all: as many as there are elements would cost registers, and spill some.
        power = power * (1.0 / tl.max(_diagonal(power, R), axis=0))
    diagonal = _diagonal(power, R)
    best = tl.min(tl.where(diagonal == tl.max(diagonal, axis=0), i, R), axis=0)
    x = tl.sum(tl.where(i[None, :] == best, power, 0.0), axis=1)
    x = x / tl.sqrt(tl.sum(x * x, axis=0))
    x = tl.where(tl.sum(tl.where(i == 0, x, 0.0), axis=0) < 0, -x, x)

    # The reflection I - 2 w w^T / |w|^2 with w = x + e_0 maps e_0 to -x: row 0 becomes x when its sign is turned.
    w = x + tl.where(i == 0, 1.0, 0.0)
    scaled = w * (2.0 / tl.sum(w * w, axis=0))
    # One vector in the two layouts: a product with the identity costs less than a conversion in the code.
    eye = tl.where(i[:, None] == i[None, :], 1.0, 0.0).to(tl.float64)
    across = tl.sum(eye * w[:, None], axis=0)
    x_across = tl.sum(eye * x[:, None], axis=0)
    rotation = tl.where(i[:, None] == 0, x_across[None, :], eye - scaled[:, None] * across[None, :])
    tl.store(rotations + layer.to(tl.int64) * (R * R) + i[:, None] * R + i[None, :], rotation)

    square_t = tl.sum(tl.sum(gram_t * x[:, None] * x_across[None, :], axis=1), axis=0)
    square_z = tl.sum(tl.sum(gram_z * x[:, None] * x_across[None, :], axis=1), axis=0)
    usable = positive & (square_t > 0) & (square_z > 0)
    norm_t = tl.sqrt(tl.where(usable, square_t, 1.0))
    norm_z = tl.sqrt(tl.where(usable, square_z, 1.0))
    if ONLY_T:  # noqa: SIM108
        value = norm_t
    else:
        value = norm_z / norm_t * tl.load(layer_scales + layer).to(tl.float64)
    # Weights that are not finite give NaN, weights that are zero give 0.
    empty = tl.where(finite, 0.0, float("nan")).to(tl.float64)
    value = tl.where(usable, value, empty)
    out = scalars + layer * N_SCALARS
    tl.store(out + USABLE, tl.where(usable, 1.0, 0.0).to(tl.float64))
    tl.store(out + INVERSE_T, tl.where(usable, 1.0 / norm_t, empty))
    tl.store(out + INVERSE_Z, tl.where(usable, 1.0 / norm_z, empty))
    if ONLY_T:
        shift = 0.0 * trace_z
    else:
        pivot = _smallest_pivot(gram_z, rotation, trace_z, tl.load(row + BLOCK), R)
        shift = tl.where(pivot > ENOUGH, 0.0, tl.sqrt(tl.where(usable, trace_z, 0.0)) * RELATIVE_SHIFT)
    tl.store(out + SHIFT, shift)
    tl.store(out + SIGMA, value)
    tl.store(sigma + layer, value.to(tl.float32))


@triton.jit
def form(
    layers,  # int64 (L, N_COLUMNS)
    tasks,  # int32 (grid, 4), as for reduce
    images,  # fp32, T
    rows_z,  # fp32, Z
    rotations,  # fp64 (L, R, R)
    scalars,  # fp64 (L, N_SCALARS)
    vectors,  # fp32, V; written where R = 1
    rows_y,  # fp32: Y of every layer, (R, ld) at SHORT_OFFSET R
    long_vectors,  # fp32: the singular vector of the longer side, (q,) at LONG_OFFSET
    short_vectors,  # fp32: of the shorter side, (p,) at SHORT_OFFSET
    grams,  # fp64 (tasks, R, R): of Y
    R: tl.constexpr,
    BC: tl.constexpr,
    SHORT: tl.constexpr,
    LONG: tl.constexpr,
    ONLY_T: tl.constexpr,
):
    """The singular vectors, and Y = rotation (Z + mu V), without mu in its first row, with partial Gram matrices."""
    task = tl.program_id(0)
    layer = tl.load(tasks + task * 4)
    begin = tl.load(tasks + task * 4 + 1)
    of_images = tl.load(tasks + task * 4 + 2)
    row = layers + layer.to(tl.int64) * N_COLUMNS
    solved = scalars + layer * N_SCALARS
    rotation_ptr = rotations + layer.to(tl.int64) * (R * R)
    k = tl.arange(0, R)
    usable = tl.load(solved + USABLE) > 0
    if of_images != 0:
        offset = tl.load(row + LONG_OFFSET)
        end = tl.minimum(begin + LONG, tl.load(row + Q).to(tl.int32))
        x = tl.load(rotation_ptr + k)
        inverse = tl.load(solved + INVERSE_T)
        for c in range(begin, end, BC):
            i = c + tl.arange(0, BC)
            mask = tl.broadcast_to((i < end)[None, :], [R, BC])
            t = tl.load(images + offset * R + i.to(tl.int64)[None, :] * R + k[:, None], mask=mask, other=0.0)
            u = tl.sum(t.to(tl.float64) * x[:, None], axis=0) * inverse
            tl.store(long_vectors + offset + i, u.to(tl.float32), mask=i < end)
    else:
        offset = tl.multiple_of(tl.load(row + SHORT_OFFSET), 16)
        ld = tl.multiple_of(tl.load(row + LD).to(tl.int32), 16)
        end = tl.minimum(begin + SHORT, tl.load(row + P).to(tl.int32))
        shift = tl.load(solved + SHIFT)
        inverse = tl.load(solved + INVERSE_Z)
        square = rotation_ptr + k[:, None] * R + k[None, :]
        rotation = tl.load(square)
        shifted = tl.where(k[:, None] > 0, rotation * shift, 0.0)
        gram = tl.zeros([R, R, BC], tl.float64)
        for c in range(begin, end, BC):
            cols = c + tl.arange(0, BC)
            inside = cols < end
            mask = tl.broadcast_to(inside[None, :], [R, BC])
            block = offset * R + k[:, None] * ld + cols[None, :]
            v = tl.load(vectors + block, mask=mask, other=0.0).to(tl.float64)
            if ONLY_T:
                y = tl.sum(rotation[:, :, None] * v[None, :, :], axis=1)
                top = tl.sum(tl.where(k[:, None] == 0, y, 0.0), axis=0)
            else:
                z = tl.load(rows_z + block, mask=mask, other=0.0).to(tl.float64)
                y = tl.sum(rotation[:, :, None] * z[None, :, :] + shifted[:, :, None] * v[None, :, :], axis=1)
                top = tl.sum(tl.where(k[:, None] == 0, y, 0.0), axis=0) * inverse
            if not usable:
                # Nothing to iterate on: the block stays as it is, and so does the singular vector.
                top = tl.sum(tl.where(k[:, None] == 0, v, 0.0), axis=0)
            tl.store(short_vectors + offset + cols, top.to(tl.float32), mask=inside)
            if not ONLY_T:
                if R == 1:
                    tl.store(vectors + offset + cols, top.to(tl.float32), mask=inside)
                else:
                    rounded = y.to(tl.float32)
                    tl.store(rows_y + block, rounded, mask=mask)
                    # Of the rounded rows, so that their orthonormalisation is exact to fp64.
                    y = tl.where(mask, rounded.to(tl.float64), 0.0)
                    gram += y[:, None, :] * y[None, :, :]
        if not ONLY_T and R > 1:
            _store_gram(grams, task, tl.sum(gram, axis=2), R)


@triton.jit
def orthonormalise(
    layers,  # int64 (L, N_COLUMNS)
    tasks,  # int32 (grid, 4): the tasks of Z, which come first
    rows_y,  # fp32, Y
    scalars,  # fp64 (L, N_SCALARS)
    grams,  # fp64 (tasks, R, R), of Y
    vectors,  # fp32, V: overwritten
    R: tl.constexpr,
    BC: tl.constexpr,
    SHORT: tl.constexpr,
):
    """V = L^-1 D Y with the Cholesky factor L of D Y Y^T D, D = 1 / |row|: every program factors its layer's matrix."""
    task = tl.program_id(0)
    layer = tl.load(tasks + task * 4)
    begin = tl.load(tasks + task * 4 + 1)
    row = layers + layer.to(tl.int64) * N_COLUMNS
    if tl.load(scalars + layer * N_SCALARS + USABLE) > 0:
        i = tl.arange(0, R)
        gram = _sum_of_grams(grams, tl.load(row + SHORT_BEGIN).to(tl.int32), tl.load(row + SHORT_END).to(tl.int32), R)
        gram, inverse = _unit_rows(gram, R)
        for j in range(R):
            column = tl.sum(tl.where(i[None, :] == j, gram, 0.0), axis=1)
            line = tl.sum(tl.where(i[:, None] == j, gram, 0.0), axis=0)
            pivot = 1.0 / tl.sqrt(tl.sum(tl.where(i == j, column, 0.0), axis=0))
            gram -= (column * pivot)[:, None] * (line * pivot)[None, :]
            solved = tl.sum(tl.where(i[:, None] == j, inverse, 0.0), axis=0) * pivot
            eliminated = inverse - (column * pivot)[:, None] * solved[None, :]
            inverse = tl.where(i[:, None] == j, solved[None, :], tl.where(i[:, None] > j, eliminated, inverse))
        offset = tl.multiple_of(tl.load(row + SHORT_OFFSET), 16) * R
        ld = tl.multiple_of(tl.load(row + LD).to(tl.int32), 16)
        end = tl.minimum(begin + SHORT, tl.load(row + P).to(tl.int32))
        for c in range(begin, end, BC):
            cols = c + tl.arange(0, BC)
            mask = tl.broadcast_to((cols < end)[None, :], [R, BC])
            block = offset + i[:, None] * ld + cols[None, :]
            y = tl.load(rows_y + block, mask=mask, other=0.0).to(tl.float64)
            v = tl.sum(inverse[:, :, None] * y[None, :, :], axis=1)
            tl.store(vectors + block, v.to(tl.float32), mask=mask)
