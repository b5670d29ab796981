"""Where the compiled CPU kernels and the module that calls them find everything: the fields of their tables."""

MAX_BLOCK_SIZE = 16
"""Vectors of a matrix."""

MAX_WAVES = 16
"""Of a symbol, each of which takes two rows."""

MATRIX, SYMBOL, SCALARS = range(3)
"""What a unit is: scalars are all channels of a depthwise convolution."""

# A unit's row in the table: of a matrix, or of a group of a convolution. Leading dimensions (LD) are in elements. ALONG
# is 0 where the contiguous dimension is p, 1 where it is q; p is the shorter side of a matrix, and of a symbol columns
# times taps. BF16 is 0 for fp32. `lanes` are those of the unit.
(
    WEIGHT_LD,
    WEIGHT_BF16,
    WEIGHT_ALONG,
    GRAD_LD,
    GRAD_BF16,
    GRAD_ALONG,
    R,  # vectors, of a symbol two a wave
    LANES,
    P,
    Q,
    VECTORS,  # V (p, lanes) fp32, of a symbol x
    PRODUCTS,  # Z (p, lanes) fp32, scratch that layers share
    IMAGES,  # T (q, lanes) fp32, likewise
    LONG,  # the singular vector of q elements, fp32; of a symbol real and imaginary part, one behind the other
    SHORT,  # the singular vector of p elements, fp32; likewise
    MULTIPLICITY,
    AGAIN,  # 1: T is to be formed (again)
    KIND,
    LAYER,  # which weight it is of, or a group of
    GROUP,  # which one: its kernel lies GROUP q rows behind the weight's address
    # Of symbols and scalars only:
    SCALED_IMAGES,  # T times the scales of the rows once more, (q, lanes) fp32
    LEFT,  # LONG times the scales of the rows
    STATE,  # of :mod:`lightning_lip.kernels.symbol`, a row a cell
    CHOSEN,  # (R / 2,) the cells of this step
    N_CELLS,
    N_TURN,  # how many cells of a step are taken in turn
    COLUMNS,
    TAPS,
    COLUMN_STEP,  # elements of a row from a column of a tap to the next, and from tap to tap
    TAP_STEP,
    N_RESIDUES,
    DIMS,
    N_LAGS,
    N_PAIRS,
    N_POWERS,  # one more than the largest exponent
    N_DOUBLES,  # of a thread's scratch, before its fp32 numbers
    RESIDUES,  # (taps,)
    EXPONENTS,  # (taps, dims)
    LAGS,  # (N_LAGS, dims): 0, and those of which the first number that is not 0 is positive
    PAIRS,  # (N_PAIRS, 3): two taps, and the lag from the first to the second
    CENTRES,  # (N_CELLS, dims) fp64
    HALVES,  # (dims,) fp64
    # Of scalars only, whose CENTRES are the points of their grid and have the factor behind their HALVES:
    COSINES,  # what the coefficient of each lag counts at each point, (N_CELLS, N_LAGS) fp32
    NEIGHBOURS,  # (N_CELLS, 2 * dims)
    LEADING_ROW,  # where LONG is not zero
    N_FIELDS,
) = range(46)

# The header. The addresses are those of the table, of L weights, then L gradients (0: leave it alone), then L scales of
# rows (0: none), of what else has one entry a layer or a unit, of the tasks, of the scratch of each thread, and of the
# two functions that threads start with.
(
    LAYERS,
    UNITS,
    TABLE,
    FIRSTS,  # (L + 1,): the first unit of each layer
    LEADERS,  # (L,): the unit of each layer that has its largest sigma
    ADDRESSES,
    SIGMA,  # (L,) fp64
    SIGMAS,  # of the units, fp64
    COEFFICIENTS,  # (L,) fp32
    SCALES,  # the powers of two of the units, fp64
    VALUE,
    TASKS,  # (n, 6): what, the unit, and where: rows of T from, to, rows of Z from, to
    PHASES,  # (n + 1,): each phase's first task; the next one begins when all are done
    N_PHASES,  # the last one is the update
    SMALL,  # (threads, small) fp64
    SMALL_SIZE,
    BAND,  # (threads, band) fp32
    BAND_SIZE,
    POOL,  # GOMP_parallel, 0 where there is none
    THREAD,  # what each thread runs
    THREADS,  # how many threads, 1 for none but the caller
    ADVANCE,
    READY,  # which value of ADVANCE the rows x of symbols were written for, -1 for none
    NEXT_TASK,
    LAST_TASK,
    NEXT_THREAD,
    N_HEADER,
) = range(27)

FORM_IMAGES, FORM_PRODUCTS, FINISH, UPDATE = range(4)
"""What a task does."""

SMALL_OF_MATRICES = 3 * MAX_BLOCK_SIZE**2 + 4 * MAX_BLOCK_SIZE
BAND_ELEMENTS = 1 << 16
"""Columns of ``A^T`` (p, q) that are read twice are as many as lie in a second-level cache of 512 kB."""

# Bits of 2^-8, 2^8 and infinity in fp32.
LOW, HIGH, INFINITE = (127 - 8) << 23, (127 + 8) << 23, 255 << 23
MIN_NORM, MAX_NORM = 2.0**-8, 2.0**8

COEFFICIENTS_GIVEN, NO_UPDATE = -1, -2
