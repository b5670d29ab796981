"""The compiled functions of the CPU backend: all layers in one call, each weight read once a step.

The functions of this room are compiled by Numba without the GIL. They know addresses only. A table of int64 has one row
a layer, with the fields of :mod:`lightning_lip.kernels.cpu.layout`; each object works on buffers of its own, so that
several threads may use one object each. What Python calls is cached between processes, with everything that it calls.
Numba would look at this file alone to tell whether that has changed, so a checksum of all sources is part of the key.

Every layer is taken as ``A`` of shape (q, p), q >= p: the weight, or its transpose. Matrices with one row for each of p
or q and one column for each vector of the block ("lanes": a multiple of 8; those beyond r are zero) serve its products,
so that eight lanes are one register, no sum runs across a register, and loops have no odd ends. Numba has no vector
types: the few loops over registers are in `registers`, in LLVM's own terms. A convolution's kernel is a unit for each
of its groups, (rows, columns * taps) whichever is longer, whose T and Z are formed in the same way and mean something
else: :mod:`~lightning_lip.kernels.cpu.compiled.symbols.finish`.

One thread forms ``T`` and ``Z`` of a few rows of ``A`` at a time. Several form ``T`` of as many rows as lie in a cache,
each thread some of them, and then ``Z``, each thread some of its rows: no sum is split over threads, and results are
the same bit for bit, however many there are. They are the threads of torch's own OpenMP runtime, which are awake
already; Numba's threading layers would be threads beside them, and break forked workers.

Deltas from the specification, :mod:`lightning_lip.kernels.reference`:

1. ``T`` cannot be scaled by its largest magnitude before ``Z = T A``, which would cost a second read. It is multiplied
   by a power of two that the layer keeps from step to step; a step whose ``T`` leaves [2^-8, 2^8] is done again with
   a new one, so fp32 holds at weights of 1e+-30 too.
2. ``Z`` is formed of the images as they come and rotated afterwards. After the first steps the rotation is close to
   the identity.
3. The Gram matrix and its eigen-decomposition (Jacobi) are in fp64; rotations that move no Ritz value by more than a
   tenth of fp32's rounding are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from lightning_lip.kernels.cpu import layout as at
from lightning_lip.kernels.cpu.compiled.emitter import I64, compiled, f32, f64, i64, sources_checksum
from lightning_lip.kernels.cpu.compiled.products import (
    band_width,
    form_images,
    form_products,
    row_of,
    scales_of,
    update,
    weight_of,
)
from lightning_lip.kernels.cpu.compiled.registers import fetch_add, start_threads
from lightning_lip.kernels.cpu.compiled.ritz import finish
from lightning_lip.kernels.cpu.compiled.symbols.cells import prepare
from lightning_lip.kernels.cpu.compiled.symbols.finish import finish_symbol
from lightning_lip.kernels.cpu.compiled.symbols.scalars import finish_scalars
from lightning_lip.kernels.penalties import PENALTY_CODES

PRODUCT, SOFTPLUS_LOG, HINGE_LOG, LOG, LAYER_SUM, LAYER_SUM_SQUARES = PENALTY_CODES.values()


@compiled
def _finish(header: I64, unit: int, small: int) -> bool:
    """Finish a unit; True if its T must be formed again."""
    kind = row_of(header, unit)[at.KIND]
    if kind == at.SCALARS:
        finish_scalars(header, unit, small)
        return False
    return finish(header, unit, small) if kind == at.MATRIX else finish_symbol(header, unit, small)


@compiled
def _images_for_products(header: I64, row: I64) -> int:
    """Return the address of what ``Z = A^T T`` is formed of; 0 where it is not formed."""
    if row[at.KIND] == at.MATRIX:
        images: int = row[at.IMAGES] if header[at.ADVANCE] else 0
    else:
        images = row[at.SCALED_IMAGES] if scales_of(header, row) else row[at.IMAGES]
    return images


@compiled
def _work(header: I64, task: int, small: int, band: int) -> None:
    """Do one task."""
    what, unit, begin, end, first, last = i64(header[at.TASKS] + 48 * task, 6)
    if what == at.UPDATE:
        update(header, unit, band, begin, end)
        return
    row = row_of(header, unit)
    if not row[at.AGAIN]:
        return
    if what == at.FORM_IMAGES:
        scale = np.float32(f64(header[at.SCALES], header[at.UNITS])[unit])
        form_images(row, weight_of(header, row), scales_of(header, row), scale, band, begin, end)
    elif what == at.FINISH:
        row[at.AGAIN] = _finish(header, unit, small)
    else:
        images = _images_for_products(header, row)
        if images:
            form_products(row, weight_of(header, row), images, band, begin, end, first, last)


@compiled
def _run_thread(header: I64) -> None:
    """Do tasks of the present phase until none is left."""
    number = fetch_add(header.ctypes.data + 8 * at.NEXT_THREAD, 1)
    small, band = (
        header[at.SMALL] + 8 * header[at.SMALL_SIZE] * number,
        header[at.BAND] + 4 * header[at.BAND_SIZE] * number,
    )
    while True:
        task = fetch_add(header.ctypes.data + 8 * at.NEXT_TASK, 1)
        if task >= header[at.LAST_TASK]:
            return
        _work(header, task, small, band)


@compiled
def _run_phase(header: I64, phase: int) -> None:
    """Do all tasks of a phase in several threads."""
    limits = i64(header[at.PHASES] + 8 * phase, 2)
    header[at.NEXT_TASK], header[at.LAST_TASK], header[at.NEXT_THREAD] = limits[0], limits[1], 0
    start_threads(header[at.POOL], header[at.THREAD], header.ctypes.data, header[at.THREADS])


@compiled
def _iterate_unit(header: I64, unit: int) -> None:
    """Iterate one unit in this thread: some rows serve T and Z while they lie in the cache."""
    row = row_of(header, unit)
    weight, scales, images = weight_of(header, row), scales_of(header, row), _images_for_products(header, row)
    p, q, band = row[at.P], row[at.Q] if row[at.LANES] else 0, header[at.BAND]
    step = band_width(p) if row[at.WEIGHT_ALONG] else 8
    again = True
    while again:
        scale = np.float32(f64(header[at.SCALES], header[at.UNITS])[unit])
        for i in range(0, q, step):
            end = min(i + step, q)
            form_images(row, weight, scales, scale, band, i, end)
            if images:
                form_products(row, weight, images, band, i, end, 0, p)
        again = _finish(header, unit, header[at.SMALL])


@compiled
def _iterate(header: I64) -> None:
    """Iterate all units once."""
    if header[at.THREADS] == 1:
        for unit in range(header[at.UNITS]):
            _iterate_unit(header, unit)
        return
    for unit in range(header[at.UNITS]):
        row_of(header, unit)[at.AGAIN] = 1
    again = True
    while again:
        for phase in range(header[at.N_PHASES] - 1):
            _run_phase(header, phase)
        again = False
        for unit in range(header[at.UNITS]):
            again |= row_of(header, unit)[at.AGAIN] != 0


@compiled
def _lead(header: I64) -> None:
    """Write the largest sigma of each layer's units, and whose it is; one that is NaN is the largest."""
    n_layers = header[at.LAYERS]
    firsts, leaders = i64(header[at.FIRSTS], n_layers + 1), i64(header[at.LEADERS], n_layers)
    sigma, sigmas = f64(header[at.SIGMA], n_layers), f64(header[at.SIGMAS], header[at.UNITS])
    for layer in range(n_layers):
        best = firsts[layer]
        for unit in range(best + 1, firsts[layer + 1]):
            if not sigmas[unit] <= sigmas[best] and not math.isnan(sigmas[best]):
                best = unit
        leaders[layer], sigma[layer] = best, sigmas[best]


@compiled
def _weigh(header: I64, code: int, level: float, factor: float) -> None:
    """Write ``c = factor d penalty / d sigma`` and the value of one of :mod:`lightning_lip.penalty.penalties`."""
    n_layers = header[at.LAYERS]
    sigma, leaders = f64(header[at.SIGMA], n_layers), i64(header[at.LEADERS], n_layers)
    coefficients = f32(header[at.COEFFICIENTS], n_layers)
    # S is the logarithm of the product, taken where that would leave the range. A logarithm or exponential that is not
    # called is a page of code that is not fetched: at four small layers that shows.
    log_bound, product, value = 0.0, 1.0, 0.0
    for layer in range(n_layers):
        for _ in range(row_of(header, leaders[layer])[at.MULTIPLICITY]):
            product *= sigma[layer]
            value += sigma[layer] if code == LAYER_SUM else sigma[layer] * sigma[layer]
            if not 1e-100 < product < 1e100:
                log_bound += math.log(product)
                product = 1.0
    slope = 1.0
    is_short = code == PRODUCT and log_bound == 0.0 and product <= level
    log_level = 0.0
    if not is_short:
        log_bound += math.log(product)
        log_level = math.log(level)
    if is_short:
        slope = value = product
    elif code == PRODUCT:
        slope = math.exp(min(log_bound, log_level))
        value = slope * (1.0 + max(log_bound - log_level, 0.0))
    elif code == SOFTPLUS_LOG:
        # exp of a negative number only: it cannot overflow.
        small = math.exp(-abs(log_bound - log_level))
        value = max(log_bound - log_level, 0.0) + math.log1p(small)
        slope = (1.0 if log_bound > log_level else small) / (1.0 + small)
    elif code == HINGE_LOG:
        slope = 2.0 * max(log_bound - log_level, 0.0)
        value = 0.25 * slope * slope
    elif code == LOG:
        value = log_bound
    for layer in range(n_layers):
        count = row_of(header, leaders[layer])[at.MULTIPLICITY]
        change = slope / sigma[layer]
        if code == LAYER_SUM:
            change = 1.0
        elif code == LAYER_SUM_SQUARES:
            change = 2.0 * sigma[layer]
        coefficient = np.float32(factor * count * change)
        usable = sigma[layer] > 0.0 and math.isfinite(coefficient)
        coefficients[layer] = coefficient if usable else np.float32(0.0)
    f32(header[at.VALUE], 1)[0] = np.float32(factor * value)


def entries(checksum: int) -> tuple[Any, Callable[[int], None]]:
    """Return what Python calls, compiled and cached, and what a thread of the pool runs, still to be compiled.

    The checksum is a closure's variable, which Numba's cache takes into its key.
    """

    def run(header_address: int, n_iterations: int, code: int, level: float, factor: float) -> None:
        """Iterate (`n_iterations` >= 0), weigh (`code` >= 0) and update the gradients (`code` >= -1)."""
        _ = checksum
        header = i64(header_address, at.N_HEADER)
        header[at.ADVANCE] = n_iterations > 0
        if n_iterations >= 0:
            if header[at.READY] != header[at.ADVANCE]:
                for unit in range(header[at.UNITS]):
                    if row_of(header, unit)[at.KIND] == at.SYMBOL:
                        prepare(header, unit, header[at.SMALL])
                header[at.READY] = header[at.ADVANCE]
            for _ in range(max(n_iterations, 1)):
                _iterate(header)
            _lead(header)
        if code >= 0:
            _weigh(header, code, level, factor)
        if code < at.COEFFICIENTS_GIVEN:
            return
        if header[at.THREADS] > 1:
            _run_phase(header, header[at.N_PHASES] - 1)
            return
        for unit in range(header[at.UNITS]):
            update(header, unit, header[at.BAND], 0, row_of(header, unit)[at.Q])

    def thread(header_address: int) -> None:
        _ = checksum
        _run_thread(i64(header_address, at.N_HEADER))

    return numba.njit(nogil=True, cache=True, error_model="numpy")(run), thread


run, thread = entries(sources_checksum())
