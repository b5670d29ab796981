"""Where the compiled CPU kernels and the module that calls them find everything: the fields of their tables."""

MAX_BLOCK_SIZE = 16


# A layer's row in the table. Leading dimensions (LD) are in elements. ALONG is 0 where the contiguous dimension is the
# shorter side p, 1 where it is q. BF16 is 0 for fp32.
(
    _WEIGHT_LD,
    _WEIGHT_BF16,
    _WEIGHT_ALONG,
    _GRAD_LD,
    _GRAD_BF16,
    _GRAD_ALONG,
    _R,
    _LANES,
    _P,
    _Q,
    _VECTORS,  # V (p, lanes) fp32
    _PRODUCTS,  # Z (p, lanes) fp32, scratch that layers share
    _IMAGES,  # T (q, lanes) fp32, likewise
    _LONG,  # the singular vector of q elements, fp32
    _SHORT,  # the singular vector of p elements, fp32
    _MULTIPLICITY,
    _AGAIN,  # 1: T is to be formed (again)
    _N_FIELDS,
) = range(18)

# The header. The addresses are those of the table, of L weights and then L gradients (0: leave it alone), of what else
# has one entry a layer, of the tasks, of the scratch of each thread, and of the two functions that threads start with.
(
    _LAYERS,
    _TABLE,
    _ADDRESSES,
    _SIGMA,
    _COEFFICIENTS,
    _SCALES,
    _VALUE,
    _TASKS,  # (n, 6): what, the layer, and where: rows of T from, to, rows of Z from, to
    _PHASES,  # (n + 1,): each phase's first task; the next one begins when all are done
    _N_PHASES,  # the last one is the update
    _SMALL,  # (threads, small) fp64
    _BAND,  # (threads, band) fp32
    _BAND_SIZE,
    _POOL,  # GOMP_parallel, 0 where there is none
    _THREAD,  # what each thread runs
    _THREADS,  # how many threads, 1 for none but the caller
    _ADVANCE,
    _NEXT_TASK,
    _LAST_TASK,
    _NEXT_THREAD,
    _N_HEADER,
) = range(21)

FORM_IMAGES, FORM_PRODUCTS, FINISH, UPDATE = range(4)
"""What a task does."""

_SMALL_SIZE = 3 * MAX_BLOCK_SIZE**2 + 4 * MAX_BLOCK_SIZE
_BAND_ELEMENTS = 1 << 16
"""Columns of ``A^T`` (p, q) that are read twice are as many as lie in a second-level cache of 512 kB."""

# Bits of 2^-8, 2^8 and infinity in fp32.
_LOW, _HIGH, _INFINITE = (127 - 8) << 23, (127 + 8) << 23, 255 << 23
_MIN_NORM, _MAX_NORM = 2.0**-8, 2.0**8

_COEFFICIENTS_GIVEN, _NO_UPDATE = -1, -2
