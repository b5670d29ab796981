"""The Triton kernels of :mod:`lightning_lip.kernels.gpu`; importing this module needs Triton, not a GPU.

One iteration of all L layers is a chain of launches without a host synchronisation between them:

1. :func:`sweep` reads the weights, once: a program holds the block ``V`` of its layer and a strip of rows of ``A``, stores
   the images ``T`` of those rows and one partial sum of ``Z = T^T A``, all from the same registers.
2. :func:`reduce` adds the partial sums in a fixed order and forms partial Gram matrices of ``T`` and ``Z`` in fp64.
3. :func:`solve` does the r x r work, one program a layer: the leading Ritz vector, sigma, the rotation.
4. :func:`form` writes the singular vectors and the rows of the next block, rotated but not yet orthonormal.
5. :func:`orthonormalise` (r > 1) multiplies these rows by the inverse Cholesky factor of their Gram matrix.

This differs from :mod:`lightning_lip.kernels.reference` in the r x r work, for the same pair, sigma and span:

* Only the leading Ritz vector is computed, by squaring the Gram matrix 20 times (twenty products of r x r matrices;
  a Jacobi iteration needs five times that, one after the other). An error is left only where the two leading Ritz
  values agree to a few 1e-7, and costs sigma less than 1e-7. A Householder reflection completes it to a rotation.
* The next block is an orthonormal basis of ``Z + mu V`` below its first row, mu = 2^-15 |Z|_F: one step with
  ``A^T A + mu``, which has the same singular vectors. Its condition number is at most 2^15 + 1 *whatever the weight*,
  so that one Cholesky factorisation in fp64 (condition number 1e9, orthonormal to 1e-7 and the rounding to fp32) serves
  where ``Z`` alone may have rank one. The first row, and with it sigma and the singular vectors, has no shift.

Magnitudes: a running power of two, the largest |t| so far, divides ``t`` before it multiplies ``A`` again (as the
running maximum of an online softmax does), so nothing of the order sigma^2 is formed in fp32; Gram matrices are fp64.

Layouts. ``A`` (q, p), q >= p, is the weight or its transpose. ``T`` is (q, R), ``V``, ``Z``, ``Y`` are (R, ld) a layer, with
ld = p rounded up to 16 and R the block size of the whole group; narrower blocks have rows of zeros, which stay zero.
"""

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
N_COLUMNS: tl.constexpr = tl.constexpr(16)

# Columns of the solved scalars (fp64).
USABLE: tl.constexpr = tl.constexpr(0)
INVERSE_T: tl.constexpr = tl.constexpr(1)
INVERSE_Z: tl.constexpr = tl.constexpr(2)
SHIFT: tl.constexpr = tl.constexpr(3)
SIGMA: tl.constexpr = tl.constexpr(4)
N_SCALARS: tl.constexpr = tl.constexpr(8)

# Bits of 2^-119 and 2^125: between them the reciprocal of a power of two is a normal number.
LOWEST: tl.constexpr = tl.constexpr(0x04000000)
HIGHEST: tl.constexpr = tl.constexpr(0x7E000000)
RECIPROCAL: tl.constexpr = tl.constexpr(0x7F000000)

N_SQUARINGS: tl.constexpr = tl.constexpr(20)
RELATIVE_SHIFT: tl.constexpr = tl.constexpr(2.0**-15)
ORIENT_P: tl.constexpr = tl.constexpr(0)
ORIENT_Q: tl.constexpr = tl.constexpr(1)


@triton.jit
def _tile(
    base, i, i1, c, p, q_stride, p_stride, U: tl.constexpr, BA: tl.constexpr, BP: tl.constexpr, ORIENT: tl.constexpr
):
    """Load rows [i, i + U BA) and columns [c, c + BP) of A as (U, BA, BP), row i + ba U + u; zeros beyond i1 and p."""
    rows = i + tl.arange(0, U)[:, None] + tl.arange(0, BA)[None, :] * U
    cols = c + tl.arange(0, BP)
    mask = (rows < i1)[:, :, None] & (cols < p)[None, None, :]
    # A literal stride of one is what tells the compiler which axis may be loaded 128 bits at a time.
    if ORIENT == ORIENT_P:
        offsets = rows.to(tl.int64)[:, :, None] * q_stride + cols[None, None, :]
    elif ORIENT == ORIENT_Q:
        offsets = rows.to(tl.int64)[:, :, None] + cols.to(tl.int64)[None, None, :] * p_stride
    else:
        offsets = rows.to(tl.int64)[:, :, None] * q_stride + cols.to(tl.int64)[None, None, :] * p_stride
    return tl.load(base + offsets, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _halves(tile):
    """Split (U, BA, BP) into its even and its odd slices along U; no data move between threads."""
    pairs = tl.reshape(tile, [tile.shape[0] // 2, 2, tile.shape[1], tile.shape[2]])
    return tl.split(tl.permute(pairs, (0, 2, 3, 1)))


@triton.jit
def _block_rows(v_ptr, g: tl.constexpr, c, p, ld, RG: tl.constexpr, BP: tl.constexpr):
    """Load vectors [g RG, (g + 1) RG) of the block at columns [c, c + BP), shape (RG, BP)."""
    k = g * RG + tl.arange(0, RG)
    cols = c + tl.arange(0, BP)
    return tl.load(v_ptr + k[:, None] * ld + cols[None, :], mask=(cols < p)[None, :], other=0.0)


@triton.jit
def _store_images(t_ptr, t, rows, i1, g: tl.constexpr, R: tl.constexpr, RG: tl.constexpr):
    """Store t (U, RG, BA) as columns [g RG, (g + 1) RG) of rows `rows` (U, BA) of T (q, R)."""
    k = g * RG + tl.arange(0, RG)
    pointers = t_ptr + rows.to(tl.int64)[:, None, :] * R + k[None, :, None]
    tl.store(pointers, tl.broadcast_to(t, pointers.shape), mask=tl.broadcast_to((rows < i1)[:, None, :], pointers.shape))


@triton.jit
def _raise_scale(top, t):
    """Return the bits of the power of two that bounds |t| and the past from below by half."""
    bits = tl.max(tl.max(tl.max(tl.abs(t).to(tl.int32, bitcast=True), axis=2), axis=1), axis=0)
    return tl.minimum(tl.maximum(top, bits & 0x7F800000), HIGHEST)


@triton.jit
def _as_float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _reciprocal(bits):
    """Return one over the power of two with these bits: exponents subtract."""
    return _as_float(-(bits - RECIPROCAL))


@triton.jit
def _advance(
    tile,
    i,
    first: tl.constexpr,
    step: tl.constexpr,
    U: tl.constexpr,
    i1,
    p,
    ld,
    v_ptr,
    t_ptr,
    sums,
    tops,
    R: tl.constexpr,
    RG: tl.constexpr,
    ONLY_T: tl.constexpr,
):
    """Take the slices u = first, first + step, .. of a tile of U: store their images, add to the sums of all groups.

    The block is read again for every tile, from L1: held in registers beside the sums it would spill.
    """
    BA: tl.constexpr = tile.shape[1]
    BP: tl.constexpr = tile.shape[2]
    rows = i + first + tl.arange(0, tile.shape[0])[:, None] * step + tl.arange(0, BA)[None, :] * U
    weights = tile.to(tl.float32)
    new_sums = ()
    new_tops = ()
    for g in tl.static_range(R // RG):
        v = _block_rows(v_ptr, g, 0, p, ld, RG, BP)
        t = tl.sum(weights[:, None, :, :] * v[None, :, None, :], axis=3)
        _store_images(t_ptr, t, rows, i1, g, R, RG)
        if ONLY_T:
            new_sums = sums
            new_tops = tops
        else:
            z = sums[g]
            top = tops[g]
            raised = _raise_scale(top, t)
            if raised > top:
                z *= _as_float(top) / _as_float(raised)
            scaled = t * _reciprocal(raised)
            z += tl.sum(weights[:, None, :, :] * scaled[:, :, :, None], axis=0)
            new_sums = new_sums + (z,)
            new_tops = new_tops + (raised,)
    return new_sums, new_tops


@triton.jit
def _one_pass(
    base,
    i0,
    i1,
    p,
    q_stride,
    p_stride,
    stride_ptr,
    ld,
    v_ptr,
    t_ptr,
    partial_ptr,
    scale_ptr,
    R: tl.constexpr,
    RG: tl.constexpr,
    BP: tl.constexpr,
    U: tl.constexpr,
    US: tl.constexpr,
    BA: tl.constexpr,
    ORIENT: tl.constexpr,
    PREFETCH: tl.constexpr,
    ALIGNED: tl.constexpr,
    VEC: tl.constexpr,
    ONLY_T: tl.constexpr,
):
    """Rows [i0, i1) of one layer with p <= BP: every element of the weight is loaded once.

    The tile is worked off in slices of US rows and groups of RG vectors, which bounds the dot products that are alive
    at a time: their sums over BP are what fills the registers.
    """
    sums = ()
    tops = ()
    for _ in tl.static_range(R // RG):
        sums = sums + (tl.zeros([RG, BA, BP], tl.float32),)
        tops = tops + (tl.full([], LOWEST, tl.int32),)
    next_stride = p_stride
    if PREFETCH:
        ahead = _tile(base, i0, i1, 0, p, q_stride, p_stride, U, BA, BP, ORIENT)
    for i in range(i0, i1, U * BA):
        if ORIENT == ORIENT_Q:
            # The stride goes through memory so that the compiler cannot hoist the addresses of all BP columns out of
            # the loop: at p = 8192 they alone would take 64 registers a thread.
            p_stride = next_stride
            next_stride = tl.load(stride_ptr, volatile=True)
            if ALIGNED:
                next_stride = tl.multiple_of(next_stride, VEC)
        if PREFETCH:
            tile = ahead
            ahead = _tile(base, i + U * BA, i1, 0, p, q_stride, p_stride, U, BA, BP, ORIENT)
        else:
            tile = _tile(base, i, i1, 0, p, q_stride, p_stride, U, BA, BP, ORIENT)
        if US == U:
            sums, tops = _advance(tile, i, 0, 1, U, i1, p, ld, v_ptr, t_ptr, sums, tops, R, RG, ONLY_T)
        else:
            even, odd = _halves(tile)
            sums, tops = _advance(even, i, 0, 2, U, i1, p, ld, v_ptr, t_ptr, sums, tops, R, RG, ONLY_T)
            sums, tops = _advance(odd, i, 1, 2, U, i1, p, ld, v_ptr, t_ptr, sums, tops, R, RG, ONLY_T)
    if not ONLY_T:
        cols = tl.arange(0, BP)
        for g in tl.static_range(R // RG):
            k = g * RG + tl.arange(0, RG)
            z = tl.sum(sums[g], axis=1)
            tl.store(partial_ptr + k[:, None] * ld + cols[None, :], z, mask=tl.broadcast_to((cols < p)[None, :], [RG, BP]))
            tl.store(scale_ptr + k, tl.zeros([RG], tl.float32) + _as_float(tops[g]))


@triton.jit
def _two_pass(
    base,
    i0,
    i1,
    p,
    q_stride,
    p_stride,
    ld,
    v_ptr,
    t_ptr,
    partial_ptr,
    scale_ptr,
    R: tl.constexpr,
    RG: tl.constexpr,
    BP: tl.constexpr,
    U: tl.constexpr,
    BA: tl.constexpr,
    ORIENT: tl.constexpr,
    ONLY_T: tl.constexpr,
):
    """Rows [i0, i1) of one layer of any width, U BA rows at a time: T from a first read, Z from a second right after.

    The partial sum lives in memory (L2); this program alone writes it, and reads it back behind a barrier.
    """
    tops = ()
    for _ in tl.static_range(R // RG):
        tops = tops + (tl.full([], LOWEST, tl.int32),)
    for i in range(i0, i1, U * BA):
        rows = i + tl.arange(0, U)[:, None] + tl.arange(0, BA)[None, :] * U
        images = ()
        for _ in tl.static_range(R // RG):
            images = images + (tl.zeros([U, RG, BA], tl.float32),)
        for c in range(0, p, BP):
            weights = _tile(base, i, i1, c, p, q_stride, p_stride, U, BA, BP, ORIENT).to(tl.float32)
            new_images = ()
            for g in tl.static_range(R // RG):
                v = _block_rows(v_ptr, g, c, p, ld, RG, BP)
                new_images = new_images + (images[g] + tl.sum(weights[:, None, :, :] * v[None, :, None, :], axis=3),)
            images = new_images
        factors = ()
        scaled = ()
        new_tops = ()
        for g in tl.static_range(R // RG):
            _store_images(t_ptr, images[g], rows, i1, g, R, RG)
            raised = _raise_scale(tops[g], images[g])
            factors = factors + (_as_float(tops[g]) / _as_float(raised),)
            scaled = scaled + (images[g] * _reciprocal(raised),)
            new_tops = new_tops + (raised,)
        tops = new_tops
        if not ONLY_T:
            for c in range(0, p, BP):
                weights = _tile(base, i, i1, c, p, q_stride, p_stride, U, BA, BP, ORIENT).to(tl.float32)
                cols = c + tl.arange(0, BP)
                for g in tl.static_range(R // RG):
                    k = g * RG + tl.arange(0, RG)
                    pointers = partial_ptr + k[:, None] * ld + cols[None, :]
                    mask = tl.broadcast_to((cols < p)[None, :], [RG, BP])
                    z = tl.sum(tl.sum(weights[:, None, :, :] * scaled[g][:, :, :, None], axis=0), axis=1)
                    z += tl.load(pointers, mask=mask & (i > i0), other=0.0) * factors[g]
                    tl.store(pointers, z, mask=mask)
            tl.debug_barrier()
    if not ONLY_T:
        for g in tl.static_range(R // RG):
            k = g * RG + tl.arange(0, RG)
            tl.store(scale_ptr + k, tl.zeros([RG], tl.float32) + _as_float(tops[g]))


@triton.jit
def sweep(
    addresses,  # int64 (L,): where each weight begins
    layers,  # int64 (L, N_COLUMNS)
    strips,  # int32 (grid, 4): layer, first row, end row, index among all strips
    vectors,  # fp32: V of every layer, (R, ld) at SHORT_OFFSET R
    images,  # fp32: T of every layer, (q, R) at LONG_OFFSET R
    partials,  # fp32: (strips of the layer, R, ld) at PARTIAL_OFFSET
    scales,  # fp32 (all strips, R)
    DTYPE: tl.constexpr,
    VEC: tl.constexpr,
    R: tl.constexpr,
    CONFIGS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ONLY_T: tl.constexpr,
):
    """One program a strip of rows of one weight; the branch taken is the layer's tile, chosen in gpu_tables."""
    strip = strips + tl.program_id(0) * 4
    layer = tl.load(strip)
    i0 = tl.load(strip + 1)
    i1 = tl.load(strip + 2)
    index = tl.load(strip + 3)
    row = layers + layer.to(tl.int64) * N_COLUMNS
    address = tl.load(addresses + layer)
    p = tl.load(row + P).to(tl.int32)
    q_stride = tl.load(row + Q_STRIDE)
    p_stride = tl.load(row + P_STRIDE)
    config = tl.load(row + CONFIG)
    ld = tl.multiple_of(tl.load(row + LD).to(tl.int32), 16)
    local = (index - tl.load(row + STRIP_BEGIN)) * R * ld
    v_ptr = vectors + tl.multiple_of(tl.load(row + SHORT_OFFSET), 16) * R
    t_ptr = images + tl.load(row + LONG_OFFSET) * R
    partial_ptr = partials + tl.multiple_of(tl.load(row + PARTIAL_OFFSET), 16) + tl.multiple_of(local, 16)
    scale_ptr = scales + index * R
    base = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        # The hint counts on the pointer behind the cast only.
        base = tl.multiple_of(base, 16)
    for n in tl.static_range(len(CONFIGS)):
        if config == n:
            BP: tl.constexpr = CONFIGS[n][0]
            ORIENT: tl.constexpr = CONFIGS[n][5]
            begin, end, width, q_step, p_step = i0, i1, p, q_stride, p_stride
            if ALIGNED and ORIENT == ORIENT_Q:
                begin = tl.multiple_of(begin, VEC)
                end = tl.multiple_of(end, VEC)
                p_step = tl.multiple_of(p_step, VEC)
            elif ALIGNED:
                width = tl.multiple_of(width, VEC)
                q_step = tl.multiple_of(q_step, VEC)
            if CONFIGS[n][7]:
                _two_pass(
                    base, begin, end, width, q_step, p_step, ld, v_ptr, t_ptr, partial_ptr, scale_ptr,
                    R, CONFIGS[n][4], BP, CONFIGS[n][1], CONFIGS[n][3], ORIENT, ONLY_T,
                )  # fmt: skip
            else:
                _one_pass(
                    base, begin, end, width, q_step, p_step, row + P_STRIDE, ld, v_ptr, t_ptr, partial_ptr, scale_ptr,
                    R, CONFIGS[n][4], BP, CONFIGS[n][1], CONFIGS[n][2], CONFIGS[n][3], ORIENT, CONFIGS[n][6],
                    ALIGNED, VEC, ONLY_T,
                )  # fmt: skip


@triton.jit
def _finite(x):
    return (x - x) == 0


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
def _largest_diagonal(matrix, R: tl.constexpr):
    return tl.max(_diagonal(matrix, R), axis=0)


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
    """One program a layer: the leading eigenvector x of T^T T, sigma = |Z^T x| / |T x|, a rotation whose first row is x."""
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
    finite = _finite(trace_t) & _finite(trace_z)
    positive = finite & (trace_t > 0) & (trace_z > 0)

    power = tl.where(positive, gram_t / tl.where(positive, trace_t, 1.0), tl.where(i[:, None] + i[None, :] == 0, 1.0, 0.0))
    for _ in range(N_SQUARINGS):
        # The matrix is symmetric, so rows times rows is its square, symmetric again to the last bit.
        power = tl.sum(power[:, None, :] * power[None, :, :], axis=2)
        power = power / _largest_diagonal(power, R)
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
    if ONLY_T:
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
    tl.store(out + SHIFT, tl.sqrt(tl.where(usable, trace_z, 0.0)) * RELATIVE_SHIFT)
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
        same = i[:, None] == i[None, :]
        gram = _sum_of_grams(grams, tl.load(row + SHORT_BEGIN).to(tl.int32), tl.load(row + SHORT_END).to(tl.int32), R)
        down = tl.sum(tl.where(same, gram, 0.0), axis=1)
        across = tl.sum(tl.where(same, gram, 0.0), axis=0)
        # Rows of zeros pad a narrow block; a unit diagonal lets them pass through and stay zero.
        down = tl.where(down > 0, 1.0 / tl.sqrt(tl.where(down > 0, down, 1.0)), 0.0)
        across = tl.where(across > 0, 1.0 / tl.sqrt(tl.where(across > 0, across, 1.0)), 0.0)
        gram = tl.where(same, 1.0, gram * down[:, None] * across[None, :])
        inverse = tl.where(same, across[None, :] + 0.0 * down[:, None], 0.0)
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


@triton.jit
def coefficients(
    scalars,  # fp64 (L, N_SCALARS)
    multiplicities,  # fp64 (L,)
    out,  # fp32 (L,): scale df/dsigma
    value,  # fp32 (1,): scale f
    target_high,  # log M and the factor of the penalty, each as the sum of two fp32: Triton passes no fp64
    target_low,
    scale_high,
    scale_low,
    n_layers,
    CODE: tl.constexpr,
    BL: tl.constexpr,
):
    """One program: a built-in penalty and its derivative in closed form (lightning_lip/penalties.py), in fp64."""
    target = tl.full([], 0.0, tl.float64) + target_high + target_low
    scale = tl.full([], 0.0, tl.float64) + scale_high + scale_low
    total = tl.zeros([BL], tl.float64)
    for begin in range(0, n_layers, BL):
        n = begin + tl.arange(0, BL)
        mask = n < n_layers
        s = tl.load(scalars + n * N_SCALARS + SIGMA, mask=mask, other=1.0)
        k = tl.load(multiplicities + n, mask=mask, other=0.0)
        if CODE == 4:
            total += k * s
        elif CODE == 5:
            total += k * s * s
        else:
            total += tl.where(mask, k * tl.log(s), 0.0)
    x = tl.sum(total, axis=0)
    slope = tl.full([], 1.0, tl.float64)
    f = x
    if CODE == 0:
        capped = tl.where(x > 30.0, 30.0, x)
        slope = tl.exp(capped)
        f = slope * (1.0 + (x - capped))
        f = tl.where(slope == 0, 0.0, f)
    elif CODE == 1:
        x -= target
        e = tl.exp(-tl.abs(x))
        f = tl.where(x > 0, x, 0.0) + tl.log(1.0 + e)
        f = tl.where(x == x, f, x)
        slope = tl.where(x > 0, 1.0, e) / (1.0 + e)
    elif CODE == 2:
        excess = x - target
        excess = tl.where(excess <= 0, 0.0, excess)
        f = excess * excess
        slope = 2.0 * excess
    tl.store(value, (scale * f).to(tl.float32))
    for begin in range(0, n_layers, BL):
        n = begin + tl.arange(0, BL)
        mask = n < n_layers
        s = tl.load(scalars + n * N_SCALARS + SIGMA, mask=mask, other=1.0)
        k = tl.load(multiplicities + n, mask=mask, other=0.0)
        if CODE == 4:
            c = scale * k + 0.0 * s
        elif CODE == 5:
            c = scale * k * 2.0 * s
        else:
            c = scale * k * slope / s
        c = tl.where(s > 0, c, 0.0).to(tl.float32)
        tl.store(out + n, tl.where(_finite(c), c, 0.0), mask=mask)


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
    # A coefficient of zero leaves the gradient as it is, also where a vector is not finite.
    if (address != 0) & (c != 0):
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
