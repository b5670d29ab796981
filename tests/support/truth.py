"""Truths that tests compare with: matrices whose spectrum is known, orthonormal vectors, exact norms."""

import torch

from lightning_lip.kernels.tensors import compute_dtype


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def orthonormal_columns(n, k, seed=0):
    """Return k random orthonormal columns, shape (n, k), fp64."""
    return torch.linalg.qr(torch.randn(n, k, generator=generator(seed), dtype=torch.float64)).Q


def geometric(k, ratio, top=1.0):
    """Return k singular values, of which the second lies `ratio` below the first, and so on."""
    return [top * ratio**i for i in range(k)]


def matrix_of(m, n, spectrum, seed=0):
    """Return an (m, n) matrix with the given singular values (those not given are zero), fp64."""
    spectrum = torch.as_tensor(spectrum, dtype=torch.float64)
    k = len(spectrum)
    return (orthonormal_columns(m, k, seed) * spectrum) @ orthonormal_columns(n, k, seed + 1).T


def nearly_dependent(distance, n, r):
    """Return unit rows (r, n), fp64, each of which after the first lies `distance` from the span of those before it."""
    first, *others = orthonormal_columns(n, r, 3).T
    return torch.stack([first, *((1 - distance**2) ** 0.5 * first + distance * row for row in others)])


def _among_nan(matrix):
    """Return the matrix in every second row, and from the ninth column on, of a larger one that else holds NaN."""
    m, n = matrix.shape
    return matrix.new_full((2 * m, n + 16), float("nan"))[::2, 8 : 8 + n].copy_(matrix)


LAYOUTS = {
    "contiguous": lambda w: w.clone(),
    "transposed": lambda w: w.T.clone(memory_format=torch.contiguous_format).T,
    "row_strided": _among_nan,
    "column_strided": lambda w: _among_nan(w.T).T,
}
"""Copies of a matrix in other layouts; gaps hold NaN, so that a wrong read shows."""


def blocks(weights, size, seed=0):
    """Return a random starting block of up to `size` orthonormal rows for each weight, in its compute dtype."""
    return [
        orthonormal_columns(min(w.shape), min(size, *w.shape), seed).T.contiguous().to(w.device, compute_dtype(w.dtype))
        for w in weights
    ]


def largest_singular_value(matrix):
    """Return the spectral norm of a matrix in fp64, as a tensor of shape ()."""
    return torch.linalg.matrix_norm(matrix.detach().double(), 2)
