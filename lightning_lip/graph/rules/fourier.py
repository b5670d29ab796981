"""Rules of Fourier transforms, and of the complex values between them, taken as pairs of real numbers.

The norm of complex values is the Euclidean one of their real and imaginary parts. Complex values come from a real
input by a Fourier transform or ``view_as_complex`` only, and none may be left in the output.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_lip.graph.builder import (
    Builder,
    Dependent,
    Independent,
    RefusedError,
    SampleAxisError,
    dimensions,
    only_input,
    rule,
)
from lightning_lip.graph.rules.shape import MOVES, SAME
from lightning_lip.rigorous.rounding import divide_up, multiply_up, sqrt_up

_TRANSFORMS = tuple(
    f"fft_{inverse}{real}fft{dims}"
    for dims in ("", "2", "n")
    for inverse, real in (("", ""), ("i", ""), ("", "r"), ("i", "r"))
)

BEGIN = frozenset((*_TRANSFORMS, "view_as_complex"))
"""Operations whose complex values are known, also those of a real argument."""

CONTINUE = frozenset(
    {*SAME, *MOVES, "fft_fftshift", "fft_ifftshift", "real", "imag", "view_as_real", "conj", "_conj", "resolve_conj"}
    | {"resolve_neg", "_neg_view", "neg", "add", "sub", "subtract", "rsub", "mul", "multiply", "div", "divide"}
    | {"true_divide", "cat", "concat", "concatenate", "stack", "sum", "mean", "einsum", "matmul", "bmm", "baddbmm"}
    | {"slice_scatter", "select_scatter", "diagonal_scatter", "copy", "constant_pad_nd", "tensordot"}
)
"""Operations whose rule holds for complex arguments as well."""


def has_complex_rule(name: str, node: torch.fx.Node, values: dict[torch.fx.Node, Any]) -> bool:
    """Whether a rule knows the complex values that an operation takes or returns."""
    takes = (source for source in node.all_input_nodes if isinstance(values.get(source), Dependent))
    return name in BEGIN or (name in CONTINUE and any(is_complex(source) for source in takes))


def is_complex(node: torch.fx.Node) -> bool:
    """Whether a node's value is a complex tensor."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_complex()


def real_of(builder: Builder, tensor: Any) -> Any:
    """Return the magnitudes of a complex tensor that does not depend on the input; anything else as it is.

    Raises:
        RefusedError: If one is not finite.
    """
    if not isinstance(tensor, Independent) or not tensor.compute().is_complex():
        return tensor
    if not bool(torch.view_as_real(tensor.compute().resolve_conj()).isfinite().all()):
        raise RefusedError("a complex factor is not finite")

    def magnitudes(values: Tensor) -> Tensor:
        sizes: Tensor = torch.linalg.vector_norm(torch.view_as_real(values.resolve_conj()), dim=-1)
        return sizes

    identity = builder.identity(("magnitudes", tensor.identity))
    return Independent(tensor.shape, magnitudes, identity, (tensor,), tensor.parameters, tensor.live)


@rule(*_TRANSFORMS)
def _transform(builder: Builder, node: torch.fx.Node, a: dict[str, Any]) -> Dependent:
    """Discrete Fourier transforms of n elements: sqrt(n) without a scale, *exact*, as they are orthogonal times that.

    Cutting and padding to a size move no more. A real transform leaves out one of each conjugate pair, and the
    constant, of norm sqrt(n), remains: *exact*. Its inverse counts the elements between the first and the one of half
    the frequency twice, and only real parts of those two: sqrt 2 times as much from n = 3 on.
    """
    value = only_input(a)
    name = str(node.target).split(".")[1]
    sizes = a.get("s", a.get("n"))
    sizes = sizes if sizes is None or isinstance(sizes, (list, tuple)) else [sizes]
    dims = a["dim"]
    if dims is None:
        rank = len(value.shape)
        dims = list(range(rank)) if sizes is None else list(range(rank - len(sizes), rank))
    chosen = dimensions(value, dims)
    if not chosen or len(chosen) != len([dims] if isinstance(dims, int) else dims):
        raise SampleAxisError
    lengths = [value.shape[d] for d in chosen]
    inverse, real = "ifft" in name or "irfft" in name, "rfft" in name
    if inverse and real:
        lengths[-1] = 2 * (lengths[-1] - 1)
    if sizes is not None:
        lengths = [n if size in (None, -1) else int(size) for n, size in zip(lengths, sizes, strict=True)]
    n = math.prod(lengths)
    # The scale is 1, 1 / sqrt n or 1 / n.
    scaled = {"backward": inverse, "forward": not inverse, "ortho": None}[a.get("norm") or "backward"]
    constant = (
        1.0 if scaled is None else sqrt_up(n) if not scaled else divide_up(1.0, math.nextafter(math.sqrt(n), 0.0))
    )
    if inverse and real and lengths[-1] > 2:
        constant = multiply_up(constant, sqrt_up(2.0))
    return builder.chain(node, value, constant)


@rule("view_as_real", "view_as_complex", "real", "imag", "conj", "_conj", "resolve_conj", "resolve_neg", "_neg_view")
def _parts(builder: Builder, node: torch.fx.Node, a: dict[str, Any]) -> Dependent:
    """Pairs of real numbers for complex ones and back, or one of each pair: *exact*, 1."""
    value = only_input(a)
    if "view_as_complex" in str(node.target) and value.axis == len(value.shape) - 1:
        raise SampleAxisError
    return builder.chain(node, value)
