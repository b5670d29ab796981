"""Rules of products with a weight of any shape: batched matrices, einsum, tensordot.

A contraction is linear in its input x. Of the dimensions of x and the weight w, those of both that the output keeps
number blocks; those of both that are summed are a block's columns; those of w alone that the output keeps are its rows;
those of w alone that are summed are summed beforehand, and those of x alone are summed by ``x -> sum x``, of norm
sqrt(n). All other dimensions of x only repeat it. So the norm is the largest of the blocks', times sqrt(n): *exact*.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lip.graph.builder import Builder, Dependent, Independent, RefusedError, SampleAxisError, rule
from lightning_lip.graph.rules.linear import linear, matrix_operator
from lightning_lip.operators.base import LinearOperator
from lightning_lip.operators.composed import ComputedMatrixOperator, DiagonalOperator
from lightning_lip.operators.convolutions.convolution import ConvolutionOperator
from lightning_lip.rigorous.rounding import multiply_up, sqrt_up

Label = Hashable

TWO_ACTIVATIONS = "a product of two activations has no finite Lipschitz constant"


@rule("einsum")
def _einsum(builder: Builder, node: torch.fx.Node, a: dict[str, Any]) -> Dependent:
    operands, equation = a["tensors"], a["equation"].replace(" ", "")
    if len(operands) > 2:
        raise RefusedError("einsum of more than two tensors has no rule")
    if sum(isinstance(operand, Dependent) for operand in operands) > 1:
        raise RefusedError(TWO_ACTIVATIONS)
    inputs, arrow, output = equation.partition("->")
    terms = [_expanded(term, len(operand.shape)) for term, operand in zip(inputs.split(","), operands, strict=True)]
    every = [label for term in terms for label in term]
    dots = sorted({label for label in every if isinstance(label, int)})
    if arrow:
        head, ellipsis, tail = output.partition("...")
        kept = [*head, *(dots if ellipsis else ()), *tail]
    else:
        kept = [*dots, *sorted({label for label in every if isinstance(label, str) and every.count(label) == 1})]
    at = next(i for i, operand in enumerate(operands) if isinstance(operand, Dependent))
    weight = operands[1 - at] if len(operands) == 2 else None
    return contracted(builder, node, operands[at], terms[at], weight, terms[1 - at] if weight else (), kept)


def _expanded(term: str, rank: int) -> list[Label]:
    """Return the labels of a term's dimensions; those of an ellipsis are negative numbers, as they are broadcast."""
    head, ellipsis, tail = term.partition("...")
    n = rank - len(head) - len(tail)
    return [*head, *(range(-n, 0) if ellipsis else ()), *tail]


@rule("matmul", "bmm", "baddbmm")
def _matmul(builder: Builder, node: torch.fx.Node, a: dict[str, Any]) -> Dependent:
    if "batch1" in a:
        if isinstance(a["self"], Dependent):
            raise RefusedError("the bias depends on the network's input")
        left, right, factor = a["batch1"], a["batch2"], abs(float(a["alpha"]))
    else:
        left, right, factor = a["self"], a["other"] if "other" in a else a["mat2"], 1.0
    if isinstance(left, Dependent) and isinstance(right, Dependent):
        raise RefusedError(TWO_ACTIVATIONS)
    value, weight = (left, right) if isinstance(left, Dependent) else (right, left)
    if len(weight.shape) == 2 and "batch1" not in a and not weight.compute().is_complex():
        result: Dependent = linear(builder, node, {"self": left, "other": right})
        return result
    # Matrices of rows r, columns c; what is contracted is k. The others are broadcast from the last one on.
    n_left, n_right = len(left.shape), len(right.shape)
    lefts = [*range(2 - n_left, 0), "r", "k"] if n_left > 1 else ["k"]
    rights = [*range(2 - n_right, 0), "k", "c"] if n_right > 1 else ["k"]
    numbers = sorted({label for label in (*lefts, *rights) if isinstance(label, int)})
    kept = [*numbers, *(["r"] if n_left > 1 else []), *(["c"] if n_right > 1 else [])]
    terms = (lefts, rights) if value is left else (rights, lefts)
    return contracted(builder, node, value, terms[0], weight, terms[1], kept, factor)


@rule("tensordot")
def _tensordot(builder: Builder, node: torch.fx.Node, a: dict[str, Any]) -> Dependent:
    first, second = a["self"], a["other"]
    if isinstance(first, Dependent) and isinstance(second, Dependent):
        raise RefusedError(TWO_ACTIVATIONS)
    lefts: list[Label] = [("left", d) for d in range(len(first.shape))]
    rights: list[Label] = [("right", d) for d in range(len(second.shape))]
    for d, e in zip(a["dims_self"], a["dims_other"], strict=True):
        rights[e % len(rights)] = lefts[d % len(lefts)]
    kept = [label for label in (*lefts, *rights) if (label in lefts) != (label in rights)]
    terms = (lefts, rights) if isinstance(first, Dependent) else (rights, lefts)
    value, weight = (first, second) if isinstance(first, Dependent) else (second, first)
    return contracted(builder, node, value, terms[0], weight, terms[1], kept)


def contracted(
    builder: Builder,
    node: torch.fx.Node,
    value: Dependent,
    of_value: Sequence[Label],
    weight: Independent | None,
    of_weight: Sequence[Label],
    kept: Sequence[Label],
    factor: float = 1.0,
) -> Dependent:
    """Return the contraction of a value with a weight, both with a label for each dimension.

    Args:
        builder: The builder.
        node: The operation.
        value: x.
        of_value: The labels of x.
        weight: w; None if x is only summed and permuted.
        of_weight: The labels of w.
        kept: The labels of the output; what it does not keep is summed.
        factor: Multiplies the result.
    """
    if len(set(of_value)) < len(of_value) or len(set(of_weight)) < len(of_weight):
        raise RefusedError("a diagonal in an einsum has no rule: take it beforehand")
    sizes = dict(zip(of_value, value.shape, strict=True))
    weight_shape = () if weight is None else weight.shape
    # A dimension of size 1 is broadcast along the other one, as if it were a dimension of the other alone.
    both = {label: n for label, n in zip(of_weight, weight_shape, strict=True) if label in sizes and n == sizes[label]}
    sample = None if value.axis is None else of_value[value.axis]
    if sample is not None and sample not in kept:
        raise SampleAxisError
    if sample in both:
        raise SampleAxisError("each sample of the batch has a factor of its own: give the factor without the batch")
    summed = [n for label, n in zip(of_value, value.shape, strict=True) if label not in kept and label not in both]
    constant = multiply_up(factor, sqrt_up(math.prod(summed))) if math.prod(summed) > 1 else factor
    axis = None if sample is None else list(kept).index(sample)
    if weight is None:
        return builder.chain(node, value, constant, axis=axis)
    layout = _Layout(of_weight, weight_shape, both, kept)
    index = builder.operator(*_operator(builder, node, weight, layout))
    return builder.chain(node, value, constant, operator=index, axis=axis)


class _Layout:
    """Which dimensions of a weight number its blocks, are their rows and columns, or are summed beforehand."""

    def __init__(
        self, labels: Sequence[Label], shape: Sequence[int], both: dict[Label, int], kept: Sequence[Label]
    ) -> None:
        self.shape = tuple(shape)
        self.blocks = [d for d, label in enumerate(labels) if label in both and label in kept]
        self.columns = [d for d, label in enumerate(labels) if label in both and label not in kept]
        self.rows = [d for d, label in enumerate(labels) if label not in both and label in kept]
        self.summed = [d for d, label in enumerate(labels) if label not in both and label not in kept]

    def size(self, dims: Sequence[int]) -> int:
        return math.prod(self.shape[d] for d in dims)

    def matrices(self, weight: Tensor) -> Tensor:
        """Return the blocks of a weight, shape (g, m, n)."""
        if self.summed:
            # In place of the sum, which would renumber the dimensions.
            weight = weight.sum(self.summed, keepdim=True)
        ordered = weight.permute([*self.blocks, *self.rows, *self.columns, *self.summed])
        return ordered.reshape(self.size(self.blocks), self.size(self.rows), self.size(self.columns))


def _operator(
    builder: Builder, node: torch.fx.Node, weight: Independent, layout: _Layout
) -> tuple[Hashable, LinearOperator]:
    """Return the operator of the weight's blocks, and the key of its identity."""
    n_blocks, m, n = (layout.size(dims) for dims in (layout.blocks, layout.rows, layout.columns))
    is_complex = weight.compute().is_complex()
    if is_complex and not bool(torch.view_as_real(weight.compute().resolve_conj()).isfinite().all()):
        raise RefusedError("its weight is not finite")
    if is_complex:
        # As maps of pairs of real numbers.
        m, n = 2 * m, 2 * n

    def matrices(values: Tensor) -> Tensor:
        blocks = layout.matrices(values)
        if not is_complex:
            return blocks
        real, imaginary = blocks.real, blocks.imag
        return torch.cat([torch.cat([real, -imaginary], 2), torch.cat([imaginary, real], 2)], 1)

    if not is_complex and not layout.blocks and not layout.summed and len(layout.rows) == len(layout.columns) == 1:
        return matrix_operator(builder, node, weight)
    name, module = builder.module_of(node)
    if weight.owner is not None:
        module, owner, key = weight.owner
        name = f"{owner}.{key}" if owner else key
    arrangement = (tuple(layout.blocks), tuple(layout.rows), tuple(layout.columns))
    identity = ("blocks", weight.identity, arrangement)
    if n_blocks == 1:
        return identity, ComputedMatrixOperator(name, module, lambda: matrices(weight.compute())[0], weight.parameters)
    if m == n == 1:
        return identity, DiagonalOperator(name, module, lambda: matrices(weight.compute()), weight.parameters)
    # Blocks along a diagonal: a convolution of one place with groups.
    blocks = nn.Conv1d(n_blocks * n, n_blocks * m, 1, groups=n_blocks, bias=False, device="meta")

    def kernel() -> Tensor:
        return matrices(weight.compute()).reshape(n_blocks * m, n, 1)

    source = ComputedMatrixOperator(name, blocks, kernel, weight.parameters)
    return identity, ConvolutionOperator(name, blocks, (n_blocks * n, 1), source)
