"""The padding of a convolution as a linear map: what it does, its adjoint, and its norm.

Along each dimension a padding copies inputs to further places (circular, reflect, replicate) or adds zeros, so it is a
matrix of zeros and ones with at most one 1 a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

PaddingMode = Literal["zeros", "circular", "reflect", "replicate"]
"""What stands at the padded places, as in ``nn.Conv2d``."""

Pairs = tuple[tuple[int, int], ...]
"""The places added before and after, dimension by dimension."""


def padding_pairs(
    padding: str | int | Sequence[int], kernel_size: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """Return the places that a convolution's `padding` adds before and after along each dimension.

    Args:
        padding: A number, one number a dimension, ``"same"`` or ``"valid"``, as ``nn.Conv2d`` takes them.
        kernel_size: One number a dimension.
        dilation: One number a dimension.

    Raises:
        ValueError: If `padding` is another word, negative, or of another length than `kernel_size`.
    """
    if padding == "valid":
        padding = 0
    if padding == "same":
        # Where the total is odd, torch adds the odd place after.
        totals = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    if isinstance(padding, str):
        raise ValueError(f"Expected `padding` to be numbers, 'same' or 'valid', got {padding!r}.")
    sizes = [padding] * len(kernel_size) if isinstance(padding, int) else list(padding)
    if len(sizes) != len(kernel_size) or any(p < 0 for p in sizes):
        raise ValueError(
            f"Expected `padding` to be {len(kernel_size)} numbers of at least 0, one a dimension, got {padding!r}."
        )
    return tuple((p, p) for p in sizes)


def check_padding(spatial: Sequence[int], pairs: Pairs, mode: PaddingMode) -> None:
    """Raise where `mode` cannot pad an input of size `spatial` by `pairs`.

    Raises:
        ValueError: If a reflection is as wide as the input, or a circular padding wider.
    """
    for size, pair in zip(spatial, pairs, strict=True):
        widest = {"reflect": size - 1, "circular": size}.get(mode)
        if widest is not None and max(pair) > widest:
            raise ValueError(
                f"Expected at most {widest} places of {mode} padding for an input of size {size}, got {max(pair)}: "
                "give the size of the layer's own input."
            )


def pad(inputs: Tensor, pairs: Pairs, mode: PaddingMode) -> Tensor:
    """Pad a batch (r, c, *spatial) along its spatial dimensions."""
    if not any(map(any, pairs)):
        return inputs
    # F.pad wants the last dimension first.
    flat = [p for pair in reversed(pairs) for p in pair]
    return F.pad(inputs, flat, mode="constant" if mode == "zeros" else mode)


def pad_adjoint(padded: Tensor, pairs: Pairs, mode: PaddingMode) -> Tensor:
    """Map a batch (r, c, *padded spatial) to (r, c, *spatial): the exact adjoint of :func:`pad`.

    Each place's value is added to the input it is a copy of. Made of slices and sums in a fixed order, it is
    deterministic on every device.
    """
    for dim, (before, after) in enumerate(pairs, start=2):
        if not before and not after:
            continue
        size = padded.shape[dim] - before - after
        inner = padded.narrow(dim, before, size)
        if mode != "zeros":
            inner = inner.clone()
            head, tail = padded.narrow(dim, 0, before), padded.narrow(dim, before + size, after)
            if mode == "circular":
                inner.narrow(dim, size - before, before).add_(head)
                inner.narrow(dim, 0, after).add_(tail)
            elif mode == "reflect":
                inner.narrow(dim, 1, before).add_(head.flip(dim))
                inner.narrow(dim, size - 1 - after, after).add_(tail.flip(dim))
            else:
                inner.narrow(dim, 0, 1).add_(head.sum(dim, keepdim=True))
                inner.narrow(dim, size - 1, 1).add_(tail.sum(dim, keepdim=True))
        padded = inner
    return padded


def most_copies(
    size: int | None, pair: tuple[int, int], mode: PaddingMode, kernel_size: int, stride: int, dilation: int
) -> int:
    """Return the largest number of copies of one input that a convolution reads along one dimension.

    The square root of it is *exactly* the norm of the padding in that dimension, restricted to the places read.

    Args:
        size: The input's size; None asks for the largest number over all sizes, with every place counted as read.
        pair: The places added before and after.
        mode: What stands there.
        kernel_size: Along this dimension, as all that follows.
        stride: Places between two outputs.
        dilation: Places between two taps.
    """
    if mode == "zeros" or not any(pair):
        return 1
    if size is None:
        smallest = max(pair) + 1 if mode == "reflect" else max(pair) if mode == "circular" else 1
        # The copies of the two ends can only fall apart in larger inputs.
        sizes = range(smallest, smallest + sum(pair) + 1)
        return max(int(torch.bincount(_sources(n, pair, mode)).max()) for n in sizes)
    sources = _sources(size, pair, mode)
    starts = torch.arange(0, len(sources) - dilation * (kernel_size - 1), stride, device="cpu")
    read = torch.zeros(len(sources), dtype=torch.bool, device="cpu")
    read[starts[:, None] + dilation * torch.arange(kernel_size, device="cpu")] = True
    return int(torch.bincount(sources[read]).max())


def _sources(size: int, pair: tuple[int, int], mode: PaddingMode) -> Tensor:
    """Return the index of the input that stands at each place, shape (size + before + after,)."""
    indices = torch.arange(size, dtype=torch.float64, device="cpu")
    return pad(indices[None, None], (pair,), mode)[0, 0].long()
