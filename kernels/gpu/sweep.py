"""The Triton kernel that reads the weights: ``T = A V^T`` and partial sums of ``Z = T^T A`` from one read of ``A``.

Part of :mod:`lightning_lip.kernels.gpu.kernels`, which explains the whole.
"""

# Triton's decorators and its tensor language carry no types that mypy could check.
# mypy: ignore-errors
# Triton compiles the concatenation of tuples, not their unpacking.
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

from lightning_lip.kernels.gpu.columns import (
    CONFIG,
    LD,
    LONG_OFFSET,
    N_COLUMNS,
    P_STRIDE,
    PARTIAL_OFFSET,
    Q_STRIDE,
    SHORT_OFFSET,
    STRIP_BEGIN,
    P,
)

# Bits of 2^-119 and 2^125: between them the reciprocal of a power of two is a normal number.
LOWEST: tl.constexpr = tl.constexpr(0x04000000)
HIGHEST: tl.constexpr = tl.constexpr(0x7E000000)
RECIPROCAL: tl.constexpr = tl.constexpr(0x7F000000)

ORIENT_P: tl.constexpr = tl.constexpr(0)
ORIENT_Q: tl.constexpr = tl.constexpr(1)


# Arguments that go together: `weight` is (base, q_stride), a layer's matrix; `memory` is (v_ptr, ld, t_ptr,
# partial_ptr, scale_ptr), where its block is read and its results are written; TILE holds the fields of tables.Tile.


@triton.jit
def _tile(weight, i, i1, c, p, p_stride, TILE: tl.constexpr):
    """Load rows [i, i + U BA) and columns [c, c + BP) of A as (U, BA, BP), row i + ba U + u; zeros beyond i1 and p."""
    base, q_stride = weight
    U: tl.constexpr = TILE[1]
    ORIENT: tl.constexpr = TILE[5]
    rows = i + tl.arange(0, U)[:, None] + tl.arange(0, TILE[3])[None, :] * U
    cols = c + tl.arange(0, TILE[0])
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
    tl.store(
        pointers, tl.broadcast_to(t, pointers.shape), mask=tl.broadcast_to((rows < i1)[:, None, :], pointers.shape)
    )


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
    tile, i, first: tl.constexpr, i1, p, memory, sums, tops, R: tl.constexpr, TILE: tl.constexpr, ONLY_T: tl.constexpr
):
    """Take the slices u = first, first + step, .. of a tile of U: store their images, add to the sums of all groups.

    The block is read again for every tile, from L1: held in registers beside the sums it would spill.
    """
    v_ptr, ld, t_ptr, _, _ = memory
    U: tl.constexpr = TILE[1]
    RG: tl.constexpr = TILE[4]
    step: tl.constexpr = U // tile.shape[0]
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
    weight,
    i0,
    i1,
    p,
    p_stride,
    stride_ptr,
    memory,
    R: tl.constexpr,
    TILE: tl.constexpr,
    VEC: tl.constexpr,
    ONLY_T: tl.constexpr,
):
    """Rows [i0, i1) of one layer with p <= BP: every element of the weight is loaded once.

    The tile is worked off in slices of US rows and groups of RG vectors, which bounds the dot products that are alive
    at a time: their sums over BP are what fills the registers.
    """
    _, ld, _, partial_ptr, scale_ptr = memory
    BP: tl.constexpr = TILE[0]
    U: tl.constexpr = TILE[1]
    BA: tl.constexpr = TILE[3]
    RG: tl.constexpr = TILE[4]
    PREFETCH: tl.constexpr = TILE[6]
    sums = ()
    tops = ()
    for _ in tl.static_range(R // RG):
        sums = sums + (tl.zeros([RG, BA, BP], tl.float32),)
        tops = tops + (tl.full([], LOWEST, tl.int32),)
    next_stride = p_stride
    if PREFETCH:
        ahead = _tile(weight, i0, i1, 0, p, p_stride, TILE)
    for i in range(i0, i1, U * BA):
        if TILE[5] == ORIENT_Q:
            # The stride goes through memory so that the compiler cannot hoist the addresses of all BP columns out of
            # the loop: at p = 8192 they alone would take 64 registers a thread.
            p_stride = next_stride
            next_stride = tl.multiple_of(tl.load(stride_ptr, volatile=True), VEC)
        if PREFETCH:
            tile = ahead
            ahead = _tile(weight, i + U * BA, i1, 0, p, p_stride, TILE)
        else:
            tile = _tile(weight, i, i1, 0, p, p_stride, TILE)
        if TILE[2] == U:
            sums, tops = _advance(tile, i, 0, i1, p, memory, sums, tops, R, TILE, ONLY_T)
        else:
            even, odd = _halves(tile)
            sums, tops = _advance(even, i, 0, i1, p, memory, sums, tops, R, TILE, ONLY_T)
            sums, tops = _advance(odd, i, 1, i1, p, memory, sums, tops, R, TILE, ONLY_T)
    if not ONLY_T:
        cols = tl.arange(0, BP)
        for g in tl.static_range(R // RG):
            k = g * RG + tl.arange(0, RG)
            z = tl.sum(sums[g], axis=1)
            tl.store(
                partial_ptr + k[:, None] * ld + cols[None, :], z, mask=tl.broadcast_to((cols < p)[None, :], [RG, BP])
            )
            tl.store(scale_ptr + k, tl.zeros([RG], tl.float32) + _as_float(tops[g]))


@triton.jit
def _two_pass(weight, i0, i1, p, p_stride, memory, R: tl.constexpr, TILE: tl.constexpr, ONLY_T: tl.constexpr):
    """Rows [i0, i1) of one layer of any width, U BA rows at a time: T from a first read, Z from a second right after.

    The partial sum lives in memory (L2); this program alone writes it, and reads it back behind a barrier.
    """
    v_ptr, ld, t_ptr, partial_ptr, scale_ptr = memory
    BP: tl.constexpr = TILE[0]
    U: tl.constexpr = TILE[1]
    BA: tl.constexpr = TILE[3]
    RG: tl.constexpr = TILE[4]
    tops = ()
    for _ in tl.static_range(R // RG):
        tops = tops + (tl.full([], LOWEST, tl.int32),)
    for i in range(i0, i1, U * BA):
        rows = i + tl.arange(0, U)[:, None] + tl.arange(0, BA)[None, :] * U
        images = ()
        for _ in tl.static_range(R // RG):
            images = images + (tl.zeros([U, RG, BA], tl.float32),)
        for c in range(0, p, BP):
            weights = _tile(weight, i, i1, c, p, p_stride, TILE).to(tl.float32)
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
                weights = _tile(weight, i, i1, c, p, p_stride, TILE).to(tl.float32)
                cols = c + tl.arange(0, BP)
                for g in tl.static_range(R // RG):
                    k = g * RG + tl.arange(0, RG)
                    pointers = partial_ptr + k[:, None] * ld + cols[None, :]
                    inside = cols < p
                    mask = tl.broadcast_to(inside[None, :], [RG, BP])
                    # Nothing has been written before the first row block.
                    written = tl.broadcast_to((inside & (cols - cols + i > i0))[None, :], [RG, BP])
                    z = tl.sum(tl.sum(weights[:, None, :, :] * scaled[g][:, :, :, None], axis=0), axis=1)
                    z += tl.load(pointers, mask=written, other=0.0) * factors[g]
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
    index = tl.load(strip + 3)
    row = layers + layer.to(tl.int64) * N_COLUMNS
    address = tl.load(addresses + layer)
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
            TILE: tl.constexpr = CONFIGS[n]
            # A hint belongs to the operation that made the number, in all branches: each branch loads its own.
            begin = tl.load(strip + 1)
            end = tl.load(strip + 2)
            width = tl.load(row + P).to(tl.int32)
            q_step = tl.load(row + Q_STRIDE)
            p_step = tl.load(row + P_STRIDE)
            if ALIGNED and TILE[5] == ORIENT_Q:
                begin = tl.multiple_of(begin, VEC)
                end = tl.multiple_of(end, VEC)
                p_step = tl.multiple_of(p_step, VEC)
            elif ALIGNED:
                width = tl.multiple_of(width, VEC)
                q_step = tl.multiple_of(q_step, VEC)
            weight = base, q_step
            memory = v_ptr, ld, t_ptr, partial_ptr, scale_ptr
            if TILE[7]:
                _two_pass(weight, begin, end, width, p_step, memory, R, TILE, ONLY_T)
            else:
                _one_pass(
                    weight, begin, end, width, p_step, row + P_STRIDE, memory, R, TILE, VEC if ALIGNED else 1, ONLY_T
                )
