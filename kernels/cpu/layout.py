"""Where the compiled CPU kernels and the module that calls them find everything: the fields of their tables."""

MAX_BLOCK_SIZE = 16


# A layer's row in the table. Leading dimensions (LD) are in elements. ALONG is 0 where the contiguous dimension is the
# shorter side p, 1 where it is q. BF16 is 0 for fp32.
(
    WEIGHT_LD,
    WEIGHT_BF16,
    WEIGHT_ALONG,
    GRAD_LD,
    GRAD_BF16,
    GRAD_ALONG,
    R,
    LANES,
    P,
    Q,
    VECTORS,  # V (p, lanes) fp32
    PRODUCTS,  # Z (p, lanes) fp32, scratch that layers share
    IMAGES,  # T (q, lanes) fp32, likewise
    LONG,  # the singular vector of q elements, fp32
    SHORT,  # the singular vector of p elements, fp32
    MULTIPLICITY,
    AGAIN,  # 1: T is to be formed (again)
    N_FIELDS,
) = range(18)

# The header. The addresses are those of the table, of L weights and then L gradients (0: leave it alone), of what else
# has one entry a layer, of the tasks, of the scratch of each thread, and of the two functions that threads start with.
(
    LAYERS,
    TABLE,
    ADDRESSES,
    SIGMA,
    COEFFICIENTS,
    SCALES,
    VALUE,
    TASKS,  # (n, 6): what, the layer, and where: rows of T from, to, rows of Z from, to
    PHASES,  # (n + 1,): each phase's first task; the next one begins when all are done
    N_PHASES,  # the last one is the update
    SMALL,  # (threads, small) fp64
    BAND,  # (threads, band) fp32
    BAND_SIZE,
    POOL,  # GOMP_parallel, 0 where there is none
    THREAD,  # what each thread runs
    THREADS,  # how many threads, 1 for none but the caller
    ADVANCE,
    NEXT_TASK,
    LAST_TASK,
    NEXT_THREAD,
    N_HEADER,
) = range(21)

FORM_IMAGES, FORM_PRODUCTS, FINISH, UPDATE = range(4)
"""What a task does."""

SMALL_SIZE = 3 * MAX_BLOCK_SIZE**2 + 4 * MAX_BLOCK_SIZE
BAND_ELEMENTS = 1 << 16
"""Columns of ``A^T`` (p, q) that are read twice are as many as lie in a second-level cache of 512 kB."""

# Bits of 2^-8, 2^8 and infinity in fp32.
LOW, HIGH, INFINITE = (127 - 8) << 23, (127 + 8) << 23, 255 << 23
MIN_NORM, MAX_NORM = 2.0**-8, 2.0**8

COEFFICIENTS_GIVEN, NO_UPDATE = -1, -2
