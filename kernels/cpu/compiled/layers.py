"""The compiled functions of the CPU backend: all layers in one call, each weight read once a step.

The functions of this file, of cpu_products and of cpu_ritz are compiled by Numba without the GIL. They know addresses
only. A table of int64 has one row a layer, with the fields of cpu_layout; everything that one object works on lies in
buffers of its own, so that objects in several threads never meet. What Python calls is cached between processes, with
everything that it calls; Numba would look at this file alone to tell whether that has changed, so a checksum of all
sources is part of the key.

Every layer is taken as ``A`` of shape (q, p), q >= p: the weight, or its transpose. Matrices with one row for each of
p or q and one column for each vector of the block ("lanes": 8, or 16 where r > 8; those beyond r are zero) serve its
products, so that eight lanes are one register, no sum runs across a register, and loops have no odd ends. Numba has no
vector types: the few loops over registers are in cpu_registers, in LLVM's own terms.

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

import functools
import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from lightning_lip.kernels.cpu.compiled.products import _band_width, _form_images, _form_products, _update
from lightning_lip.kernels.cpu.compiled.registers import (
    _I64,
    _compiled,
    _f32,
    _f64,
    _fetch_add,
    _i64,
    _start_threads,
    sources_checksum,
)
from lightning_lip.kernels.cpu.compiled.ritz import _finish
from lightning_lip.kernels.cpu.layout import (
    _ADDRESSES,
    _ADVANCE,
    _AGAIN,
    _BAND,
    _BAND_SIZE,
    _COEFFICIENTS,
    _COEFFICIENTS_GIVEN,
    _LAST_TASK,
    _LAYERS,
    _MULTIPLICITY,
    _N_FIELDS,
    _N_HEADER,
    _N_PHASES,
    _NEXT_TASK,
    _NEXT_THREAD,
    _P,
    _PHASES,
    _POOL,
    _Q,
    _SCALES,
    _SIGMA,
    _SMALL,
    _SMALL_SIZE,
    _TABLE,
    _TASKS,
    _THREAD,
    _THREADS,
    _VALUE,
    _WEIGHT_ALONG,
    FINISH,
    FORM_IMAGES,
    UPDATE,
)
from lightning_lip.kernels.reference import PENALTY_CODES, PRODUCT_CAP

PRODUCT, SOFTPLUS_LOG, HINGE_LOG, LOG, LAYER_SUM, LAYER_SUM_SQUARES = PENALTY_CODES.values()
_LARGEST_PRODUCT = math.exp(PRODUCT_CAP)


@_compiled
def _work(header: _I64, task: int, small: int, band: int) -> None:
    """Do one task."""
    what, layer, begin, end, first, last = _i64(header[_TASKS] + 48 * task, 6)
    if what == UPDATE:
        _update(header, layer, band, begin, end)
        return
    row = _i64(header[_TABLE] + 8 * _N_FIELDS * layer, _N_FIELDS)
    if not row[_AGAIN]:
        return
    weight = _i64(header[_ADDRESSES], header[_LAYERS])[layer]
    if what == FORM_IMAGES:
        scale = np.float32(_f64(header[_SCALES], header[_LAYERS])[layer])
        _form_images(row, weight, scale, band, begin, end)
    elif what == FINISH:
        row[_AGAIN] = _finish(header, layer, small)
    elif header[_ADVANCE]:
        _form_products(row, weight, band, begin, end, first, last)


@_compiled
def _run_thread(header: _I64) -> None:
    """Do tasks of the present phase until none is left."""
    number = _fetch_add(header.ctypes.data + 8 * _NEXT_THREAD, 1)
    small, band = header[_SMALL] + 8 * _SMALL_SIZE * number, header[_BAND] + 4 * header[_BAND_SIZE] * number
    while True:
        task = _fetch_add(header.ctypes.data + 8 * _NEXT_TASK, 1)
        if task >= header[_LAST_TASK]:
            return
        _work(header, task, small, band)


@_compiled
def _run_phase(header: _I64, phase: int) -> None:
    """Do all tasks of a phase in several threads."""
    limits = _i64(header[_PHASES] + 8 * phase, 2)
    header[_NEXT_TASK], header[_LAST_TASK], header[_NEXT_THREAD] = limits[0], limits[1], 0
    _start_threads(header[_POOL], header[_THREAD], header.ctypes.data, header[_THREADS])


@_compiled
def _iterate_layer(header: _I64, layer: int) -> None:
    """Iterate one layer in this thread: some rows serve T and Z while they lie in the cache."""
    row = _i64(header[_TABLE] + 8 * _N_FIELDS * layer, _N_FIELDS)
    weight = _i64(header[_ADDRESSES], header[_LAYERS])[layer]
    p, q, band = row[_P], row[_Q], header[_BAND]
    step = _band_width(p) if row[_WEIGHT_ALONG] else 8
    again = True
    while again:
        scale = np.float32(_f64(header[_SCALES], header[_LAYERS])[layer])
        for i in range(0, q, step):
            end = min(i + step, q)
            _form_images(row, weight, scale, band, i, end)
            if header[_ADVANCE]:
                _form_products(row, weight, band, i, end, 0, p)
        again = _finish(header, layer, header[_SMALL])


@_compiled
def _iterate(header: _I64) -> None:
    """Iterate all layers once."""
    if header[_THREADS] == 1:
        for layer in range(header[_LAYERS]):
            _iterate_layer(header, layer)
        return
    for layer in range(header[_LAYERS]):
        _i64(header[_TABLE] + 8 * (_N_FIELDS * layer + _AGAIN), 1)[0] = 1
    n_left = 1
    while n_left:
        for phase in range(header[_N_PHASES] - 1):
            _run_phase(header, phase)
        n_left = 0
        for layer in range(header[_LAYERS]):
            n_left += _i64(header[_TABLE] + 8 * (_N_FIELDS * layer + _AGAIN), 1)[0]


@_compiled
def _weigh(header: _I64, code: int, target_log: float, factor: float) -> None:
    """Write ``c = factor d penalty / d sigma`` and the value of one of :mod:`lightning_lip.penalty.penalties`."""
    n_layers = header[_LAYERS]
    sigma = _f64(header[_SIGMA], n_layers)
    coefficients = _f32(header[_COEFFICIENTS], n_layers)
    # S is the logarithm of the product, taken where that would leave the range. A logarithm or exponential that is not
    # called is a page of code that is not fetched: at four small layers that shows.
    log_bound, product, value = 0.0, 1.0, 0.0
    for layer in range(n_layers):
        for _ in range(_i64(header[_TABLE] + 8 * (_N_FIELDS * layer + _MULTIPLICITY), 1)[0]):
            product *= sigma[layer]
            value += sigma[layer] if code == LAYER_SUM else sigma[layer] * sigma[layer]
            if not 1e-100 < product < 1e100:
                log_bound += math.log(product)
                product = 1.0
    slope = 1.0
    is_short = code == PRODUCT and log_bound == 0.0 and product <= _LARGEST_PRODUCT
    if not is_short:
        log_bound += math.log(product)
    if is_short:
        slope = value = product
    elif code == PRODUCT:
        slope = math.exp(min(log_bound, PRODUCT_CAP))
        value = slope * (1.0 + max(log_bound - PRODUCT_CAP, 0.0))
    elif code == SOFTPLUS_LOG:
        # exp of a negative number only: it cannot overflow.
        small = math.exp(-abs(log_bound - target_log))
        value = max(log_bound - target_log, 0.0) + math.log1p(small)
        slope = (1.0 if log_bound > target_log else small) / (1.0 + small)
    elif code == HINGE_LOG:
        slope = 2.0 * max(log_bound - target_log, 0.0)
        value = 0.25 * slope * slope
    elif code == LOG:
        value = log_bound
    for layer in range(n_layers):
        count = _i64(header[_TABLE] + 8 * (_N_FIELDS * layer + _MULTIPLICITY), 1)[0]
        change = slope / sigma[layer]
        if code == LAYER_SUM:
            change = 1.0
        elif code == LAYER_SUM_SQUARES:
            change = 2.0 * sigma[layer]
        coefficient = np.float32(factor * count * change)
        usable = sigma[layer] > 0.0 and math.isfinite(coefficient)
        coefficients[layer] = coefficient if usable else np.float32(0.0)
    _f32(header[_VALUE], 1)[0] = np.float32(factor * value)


def _entries(checksum: int) -> tuple[Any, Callable[[int], None]]:
    """Return what Python calls, compiled and cached, and what a thread of the pool runs, still to be compiled.

    The checksum is a closure's variable, which Numba's cache takes into its key.
    """

    def run(header_address: int, n_iterations: int, code: int, target_log: float, factor: float) -> None:
        """Iterate (`n_iterations` >= 0), weigh (`code` >= 0) and update the gradients (`code` >= -1)."""
        _ = checksum
        header = _i64(header_address, _N_HEADER)
        header[_ADVANCE] = n_iterations > 0
        if n_iterations >= 0:
            for _ in range(max(n_iterations, 1)):
                _iterate(header)
        if code >= 0:
            _weigh(header, code, target_log, factor)
        if code < _COEFFICIENTS_GIVEN:
            return
        if header[_THREADS] > 1:
            _run_phase(header, header[_N_PHASES] - 1)
            return
        for layer in range(header[_LAYERS]):
            row = _i64(header[_TABLE] + 8 * _N_FIELDS * layer, _N_FIELDS)
            _update(header, layer, header[_BAND], 0, row[_Q])

    def thread(header_address: int) -> None:
        _ = checksum
        _run_thread(_i64(header_address, _N_HEADER))

    return numba.njit(nogil=True, cache=True, error_model="numpy")(run), thread


_run, _thread = _entries(sources_checksum())


@functools.cache
def thread_address() -> int:
    """Return the address of what a thread of the pool runs; the first call compiles it or loads it from the cache."""
    compiled: Any = numba.cfunc("void(int64)", cache=True, error_model="numpy")
    address: int = compiled(_thread).address
    return address
