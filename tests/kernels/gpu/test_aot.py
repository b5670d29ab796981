"""Tier 2 of the proof without a GPU: what the compiled kernels use, for four GPUs that are not here.

Limits: nothing spilled and no stack (but for what the table ALLOWED measures), no atomics, at most 32 KiB of shared
memory, weights and gradients loaded and stored 128 bits at a time, at most 128 registers a thread. The sweep alone may
have 255: 128 of them hold the sums and the tile that make one read of the weights enough (kernels/gpu/tables.py); one
group of 256 threads then fills a multiprocessor.
"""

import os
from dataclasses import replace
from itertools import product
from typing import NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton", minversion="3.3")

from support.gpu import aot, planted  # noqa: E402

from lightning_lip.kernels.gpu import iteration as gpu  # noqa: E402
from lightning_lip.kernels.gpu import tables as gpu_tables  # noqa: E402

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing can be compiled ahead of time under the interpreter", allow_module_level=True)

FULL = os.environ.get("LIGHTNING_LIP_FULL_GATE") == "1"
TARGETS = list(aot.TARGETS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHARED = 32 * 1024
ORIENT_P, ORIENT_Q, ORIENT_NONE = range(3)


class Allowance(NamedTuple):
    """Stack and spills of one kernel as one Triton compiles it, as measured.

    Attributes:
        triton: The version that was measured.
        variant: The kernel with its target, as the tests here name it.
        stack: Bytes of stack a thread.
        spills: Loads and stores of spilled registers.
    """

    triton: str
    variant: str
    stack: int
    spills: int


PROMISED = ("sweep", "rank_one")
"""The kernels that touch every weight: no stack and no spill, from the Triton version SINCE on."""
SINCE = (3, 8)
# Triton and ptxas choose the registers, and these are the versions that choose badly. Beside the sweep, kernels run for
# a few microseconds: what is spilled there is recorded, for any version, and held to the record. The sweep and the
# update read every weight and gradient, so an entry of theirs may only be older than SINCE.
ALLOWED = [
    Allowance("3.6.0", "sweep-sm_90-float32-r1-p16384-one_pass", 32, 14),
    Allowance("3.6.0", "sweep-sm_90-bfloat16-r1-p16384-one_pass", 8, 4),
    Allowance("3.6.0", "sweep-sm_90-float16-r1-p16384-one_pass", 8, 4),
    Allowance("3.6.0", "sweep-sm_90-bfloat16-r8-q2048-one_pass", 16, 12),
    Allowance("3.6.0", "sweep-sm_90-float16-r8-q2048-one_pass", 32, 18),
    Allowance("3.6.0", "solve-sm_80-r4-T", 8, 2),
]


def allowed(variant):
    """Return the (stack, spills) that the installed Triton's code of a variant must have: none, or as measured."""
    found = [a for a in ALLOWED if (a.triton, a.variant) == (triton.__version__, variant)]
    return (found[0].stack, found[0].spills) if found else (0, 0)


def assert_clean(report, registers, variant):
    # Equal, not at most: an allowance that is no longer needed, or is too large, must go.
    assert (report.stack, report.spills) == allowed(variant)
    assert report.atomics == []
    assert report.registers <= registers
    assert report.shared <= SHARED


def sweep_name(target, dtype, block, tile):
    kind = "two_pass" if tile.two_pass else "one_pass"
    return f"{target}-{str(dtype)[6:]}-r{block}-{'pq'[tile.orientation]}{tile.width}-{kind}"


def sweep_cases():
    """The widest tile of one pass, which is the tightest; with LIGHTNING_LIP_FULL_GATE=1 every tile there is."""
    sizes = (1, 2, 4, 8, 16) if FULL else (1, 8)
    for target, dtype, block, orientation in product(TARGETS, DTYPES, sizes, (ORIENT_P, ORIENT_Q)):
        tiles = aot.all_tiles(block, dtype.itemsize, orientation)
        widest = max(tile.width for tile in tiles if not tile.two_pass)
        for tile in tiles:
            # fp16 differs from bf16 in one conversion: it stands for itself on one target.
            usual = block == 8 and dtype != torch.float16
            chosen = tile.width == widest and (target == "sm_90" or usual)
            chosen |= target == "sm_90" and usual and (tile.two_pass or tile.width in (32, 128))
            if FULL or chosen:
                yield pytest.param(target, dtype, block, tile, id=sweep_name(target, dtype, block, tile))


@pytest.mark.parametrize(("target", "dtype", "block", "tile"), list(sweep_cases()))
def test_sweep(target, dtype, block, tile):
    variant = f"sweep-{sweep_name(target, dtype, block, tile)}"
    report = aot.inspect(aot.compile_sweep(dtype, block, (tile,), True, target=target))
    # AMD's vector registers go to 512 at 256 threads a group.
    assert_clean(report, 512 if target == "gfx942" else 255, variant)
    width = 128
    if tile.orientation == ORIENT_Q and tile.rows * dtype.itemsize < 16:
        # Half precision along q: 4 rows of A a thread, 64 bits, where 8 do not fit (gpu_tables says where and why).
        assert dtype != torch.float32
        assert tile.width >= 4096 or (block == 16 and (tile.two_pass or tile.width < 512))
        width = 64
    if target == "gfx942":
        # All its global loads are counted, the block's too, which come 32 bits at a time where A lies along q.
        assert report.streams["load", width] > 0
        assert ("load", 16) not in report.streams
    else:
        assert report.widths("load") == {width}


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_rank_one(target, dtype, aligned):
    report = aot.inspect(aot.compile_rank_one(dtype, aligned, target))
    assert_clean(report, 128, f"rank_one-{target}-{str(dtype)[6:]}-{'aligned' if aligned else 'unaligned'}")
    assert report.widths("store") == {128 if aligned else 8 * dtype.itemsize}
    if aligned:
        assert 128 in report.widths("load") if target == "gfx942" else report.widths("load") == {128}


def small_cases():
    for target in TARGETS:
        # R = 16 and the form without an iteration are compiled for one target, which stands for the others.
        for block in (1, 2, 4, 8, 16) if FULL else (1, 8, 16) if target == "sm_90" else (1, 8):
            for name in ("reduce", "solve", "form", "orthonormalise"):
                if name == "orthonormalise" and block == 1:
                    continue
                yield target, name, block, False
                if name in ("solve", "form") and (FULL or target == "sm_90"):
                    yield target, name, block, True


@pytest.mark.parametrize(("target", "name", "block", "only_t"), list(small_cases()))
def test_small_kernels(target, name, block, only_t):
    variant = f"{name}-{target}-r{block}-{'T' if only_t else 'TZ'}"
    assert_clean(aot.inspect(aot.compile_small(name, block, only_t, target=target)), 128, variant)


@pytest.mark.parametrize(
    ("target", "code"), [(t, code) for t in TARGETS for code in (range(6) if FULL or t == "sm_90" else (0, 1))]
)
def test_coefficients(target, code):
    report = aot.inspect(aot.compile_small("coefficients", 1, code=code, target=target))
    assert_clean(report, 128, f"coefficients-{target}-{code}")


@pytest.mark.parametrize("orientation", [ORIENT_P, ORIENT_Q, ORIENT_NONE])
def test_unaligned_sweep(orientation):
    tile = gpu_tables.choose_tile(100, 8, 4, orientation)
    report = aot.inspect(aot.compile_sweep(torch.float32, 8, (tile,), False))
    assert_clean(report, 255, f"sweep-unaligned-{'pq-'[orientation]}")
    assert report.widths("load") == {32}


def test_several_tiles_in_one_launch():
    tiles = tuple(gpu_tables.choose_tile(p, 8, 4, o) for p, o in ((20, ORIENT_P), (1024, ORIENT_P), (64, ORIENT_Q)))
    assert_clean(aot.inspect(aot.compile_sweep(torch.float32, 8, tiles, True)), 255, "sweep-several")


def test_ritz_values_alone():
    tile = gpu_tables.choose_tile(2048, 8, 4, ORIENT_P)
    assert_clean(aot.inspect(aot.compile_sweep(torch.float32, 8, (tile,), True, only_t=True)), 255, "sweep-only_t")


def test_the_sweep_and_the_update_have_no_allowance_from_the_promised_version_on():
    for allowance in ALLOWED:
        version = tuple(int(part) for part in allowance.triton.split(".")[:2])
        assert version < SINCE or not allowance.variant.startswith(PROMISED), allowance


def test_every_allowance_is_for_a_variant_that_is_measured():
    sweeps = {f"sweep-{case.id}" for case in sweep_cases()}
    names = ("reduce", "solve", "form", "orthonormalise")
    small = {"-".join(parts) for parts in product(names, TARGETS, ("r1", "r2", "r4", "r8", "r16"), ("T", "TZ"))}
    assert {allowance.variant for allowance in ALLOWED} <= sweeps | small


def test_an_allowance_is_neither_exceeded_nor_left_when_it_is_not_needed(monkeypatch):
    report = aot.inspect(aot.compile_small("reduce", 1))
    assert_clean(report, 128, "reduce-sm_90-r1-TZ")
    for stack, spills in ((8, 2), (8, 0), (0, 2)):
        monkeypatch.setitem(globals(), "ALLOWED", [Allowance(triton.__version__, "reduce-sm_90-r1-TZ", stack, spills)])
        with pytest.raises(AssertionError):
            assert_clean(report, 128, "reduce-sm_90-r1-TZ")
        spilled = replace(report, stack=stack, spills=spills)
        assert_clean(spilled, 128, "reduce-sm_90-r1-TZ")
        with pytest.raises(AssertionError):
            assert_clean(replace(spilled, stack=stack + 8), 128, "reduce-sm_90-r1-TZ")
        with pytest.raises(AssertionError):
            assert_clean(spilled, 128, "reduce-sm_90-r2-TZ")


# The gate itself: each of its limits must be able to fail.


def test_a_tile_that_is_too_large_is_seen_to_spill():
    tile = gpu_tables.choose_tile(4096, 4, 4, ORIENT_P)._replace(vectors=8)
    report = aot.inspect(aot.compile_sweep(torch.float32, 8, (tile,), True))
    assert report.stack > 0
    assert report.spills > 0
    with pytest.raises(AssertionError):
        assert_clean(report, 255, "sweep-too-large")


def test_a_dropped_alignment_hint_is_seen_in_the_loads():
    # The aligned table without the hint: the same tile, scalar loads.
    tile = gpu_tables.choose_tile(2048, 8, 4, ORIENT_P)
    report = aot.inspect(aot.compile_sweep(torch.float32, 8, (tile,), False))
    assert report.streams["load", 32] > 0
    assert report.streams["load", 128] == 0


def test_an_atomic_is_seen(tmp_path):
    old = "tl.store(pointers, (grad + u[:, None] * v[None, :]).to(DTYPE), mask=mask)"
    kernels = planted.kernels_with(tmp_path, old, "tl.atomic_add(pointers, u[:, None] * v[None, :], mask=mask)")
    height, width = gpu_tables.RANK_ONE_TILE
    constants = {
        "DTYPE": gpu.triton_dtype(torch.float32), "VEC": 4, "BM": height, "BN": width, "ALIGNED": True,
    }  # fmt: skip
    for target in ("sm_90", "gfx942"):
        assert aot.inspect(aot.compile_kernel(kernels.rank_one, constants, target)).atomics
