"""The norm of a convolution's symbol, by its definition: singular values on a grid of frequencies that is refined."""

import itertools
import math

import torch

from lightning_lip.operators.composed import ScaledOperator
from lightning_lip.operators.convolutions.symbol import SymbolOperator


def symbol_at_frequencies(kernel, w, stride, dilation, sizes=None):
    """Return P(w), (frequencies, rows, columns * residues), at w (frequencies, dims) of a kernel.

    Tap t of a dimension reads the places that are ``d t`` away. Modulo s that is the residue; of a circulant operator
    the exponent is what remains, otherwise s and d may be divided by what they share, and the lattice taken as dense.
    """
    blocks = {}
    for tap in itertools.product(*(range(k) for k in kernel.shape[2:])):
        residues, exponents = [], []
        for t, s, d in zip(tap, stride, dilation, strict=True):
            step, apart = (d, s) if sizes else (1, s // math.gcd(s, d))
            residues.append(step * t % apart)
            exponents.append(step * t // apart)
        phase = torch.exp(1j * (w @ torch.tensor(exponents, dtype=torch.float64)))
        term = phase[:, None, None] * kernel[(..., *tap)].to(torch.complex128)
        key = tuple(residues)
        blocks[key] = blocks[key] + term if key in blocks else term
    return torch.cat([blocks[key] for key in sorted(blocks)], 2)


def symbol_norm(kernel, stride, dilation, groups=1, sizes=None, density=24):
    """Return the largest singular value over all frequencies and groups, shape (), differentiable in the kernel."""
    dims = kernel.dim() - 2
    stride, dilation = ([n] * dims if isinstance(n, int) else list(n) for n in (stride, dilation))

    def sigmas(part, w):
        return torch.linalg.matrix_norm(symbol_at_frequencies(part, w, stride, dilation, sizes), 2)

    norms = []
    for part in kernel.double().unflatten(0, (groups, -1)):
        with torch.no_grad():
            counts = [n // s for n, s in zip(sizes, stride, strict=True)] if sizes else [density] * dims
            axes = [2 * math.pi * torch.arange(n, dtype=torch.float64) / n for n in counts]
            w = torch.cartesian_prod(*axes).view(-1, dims)
            best = w[sigmas(part, w).argmax()]
            half = 2 * math.pi / density
            for _ in range(0 if sizes else 16):
                ticks = [best[i] + half * torch.linspace(-1, 1, 5, dtype=torch.float64) for i in range(dims)]
                w = torch.cartesian_prod(*ticks).view(-1, dims)
                best, half = w[sigmas(part, w).argmax()], half / 2
        norms.append(sigmas(part, best[None])[0])
    return torch.stack(norms).max()


def norm_of_symbol(operator):
    """Return the norm of a :class:`SymbolOperator`, also of a scaled one, shape (), fp64; None for another operator."""
    base = operator.base if isinstance(operator, ScaledOperator) else operator
    if not isinstance(base, SymbolOperator):
        return None
    convolution = base.convolution
    _, sizes, factor = base.place
    return factor * symbol_norm(operator.weight(), convolution.stride, convolution.dilation, convolution.groups, sizes)
