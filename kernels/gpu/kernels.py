"""The Triton kernels of :mod:`lightning_lip.kernels.gpu.iteration`; importing this module needs Triton, not a GPU.

One iteration of all L layers is a chain of launches without a host synchronisation between them:

1. :func:`sweep` reads the weights, once: a program takes a strip of rows of ``A``, stores their images ``T`` and one
   partial sum of ``Z = T^T A``, both from the same registers.
2. :func:`reduce` adds the partial sums in a fixed order and forms partial Gram matrices of ``T`` and ``Z`` in fp64.
3. :func:`solve` does the r x r work, one program a layer: the leading Ritz vector, sigma, the rotation.
4. :func:`form` writes the singular vectors and the rows of the next block, rotated but not yet orthonormal.
5. :func:`orthonormalise` (r > 1) multiplies these rows by the inverse Cholesky factor of their Gram matrix.

This differs from :mod:`lightning_lip.kernels.reference` in the r x r work, for the same pair, sigma and span:

* Only the leading Ritz vector is computed, by squaring the Gram matrix 20 times (twenty products of r x r matrices;
  a Jacobi iteration needs five times that, one after the other). An error is left only where the two leading Ritz
  values agree to a few 1e-7, and costs sigma less than 1e-7. A Householder reflection completes it to a rotation.
* The next block is a Cholesky orthonormalisation in fp64 of the rows of ``Z``, rotated. Where these are dependent (a
  Cholesky pivot below 1e-8 of the row's square, or a row 10^6 times shorter than the longest) it is one of
  ``Z + mu V`` below the first row, mu = 2^-15 |Z|_F: a step with ``A^T A + mu``, which has the same singular vectors.
  Its condition number is at most 2^15 + 1 *whatever the weight*, so one factorisation serves (condition number 1e9 in
  fp64: orthonormal to 1e-7 and the rounding to fp32) and no row has to be replaced. The first row, and with it sigma
  and the singular vectors, is never shifted.

Magnitudes: a running power of two, the largest |t| so far, divides ``t`` before it multiplies ``A`` again (as the
running maximum of an online softmax does), so nothing of the order sigma^2 is formed in fp32; Gram matrices are fp64.

Layouts. ``A`` (q, p), q >= p, is the weight or its transpose. ``T`` is (q, R), ``V``, ``Z``, ``Y`` are (R, ld) a layer,
with ld = p rounded up to 16 and R the block size of the whole group; rows of zeros fill narrower blocks, and stay zero.
"""

# Triton's decorators carry no types that mypy could check.
# mypy: ignore-errors

from lightning_lip.kernels.gpu.rayleigh_ritz import form, orthonormalise, reduce, solve
from lightning_lip.kernels.gpu.sweep import sweep
from lightning_lip.kernels.gpu.update import coefficients, rank_one

__all__ = ["coefficients", "form", "orthonormalise", "rank_one", "reduce", "solve", "sweep"]
