"""Rules of operations that move, copy or resample elements: views, slices, padding, pooling, upsampling."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor

from lightning_lip.constants.pooling import (
    adaptive_average_pool_constant,
    adaptive_max_pool_constant,
    max_pool_constant,
    per_dimension,
    sized_average_pool_constant,
    upsample_constant,
)
from lightning_lip.graph.builder import (
    Builder,
    Dependent,
    Independent,
    RefusedError,
    SampleAxisError,
    arguments_of,
    dimensions,
    only_input,
    rule,
    shape_of,
)
from lightning_lip.graph.tracing import extreme_of_two, operation_name
from lightning_lip.models.inputs import BATCH
from lightning_lip.rigorous.rounding import sqrt_up

SAME = (
    "clone", "contiguous", "alias", "detach", "lift_fresh_copy", "lift_fresh", "to", "_to_copy", "type_as",
)  # fmt: skip
MOVES = (
    "view", "_unsafe_view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze",
    "permute", "transpose", "t", "swapaxes", "swapdims", "movedim", "moveaxis", "numpy_T", "mT", "adjoint", "slice",
    "select", "narrow", "split", "split_with_sizes", "chunk", "tensor_split", "unbind", "unsafe_split",
    "unsafe_chunk", "flip", "roll", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle",
    "expand", "expand_as", "broadcast_to", "repeat", "repeat_interleave", "tile", "unfold", "im2col", "index_select",
    "index", "gather", "diagonal", "rot90", "tril", "triu", "fft_fftshift", "fft_ifftshift",
    "view_copy", "permute_copy", "transpose_copy", "slice_copy", "select_copy", "unsqueeze_copy", "squeeze_copy",
    "expand_copy", "split_copy", "split_with_sizes_copy", "unbind_copy", "unfold_copy", "diagonal_copy",
)  # fmt: skip
PADS = (
    "pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d",
    "replication_pad2d", "replication_pad3d", "_pad_circular", "_pad_enum",
)  # fmt: skip


@rule(*SAME)
def _same(builder: Builder, node: torch.fx.Node, a: dict[str, Any]) -> Dependent:
    value = only_input(a, "other")
    return builder.chain(node, value)


@rule(*MOVES, *PADS)
def _move(builder: Builder, node: torch.fx.Node, a: dict[str, Any]) -> Any:
    """Run the operation on the elements' numbers: it shows exactly how often each is copied, and whose it is.

    *Exact*: a map that only copies has the norm sqrt(largest number of copies).
    """
    value = only_input(a, "other")
    if isinstance(a.get("dtype"), torch.dtype):
        raise RefusedError("a view as another dtype reads the bits anew")
    result = _carried_out(node, a, _numbers(value))
    if isinstance(result, Tensor):
        return _moved(builder, node, value, result)
    return tuple(_moved(builder, node, value, part) for part in result)


def _numbers(value: Dependent) -> Tensor:
    """Return the numbers of a value's elements, from 1 on, in its shape."""
    numbers = torch.arange(1, 1 + torch.Size(value.shape).numel(), dtype=torch.float64, device="cpu")
    return numbers.reshape(value.shape)


def _carried_out(node: torch.fx.Node, a: dict[str, Any], numbers: Tensor) -> Any:
    """Return the result of an operation that moves elements, on numbers in place of its first argument."""
    arguments = dict(a)
    arguments[next(iter(a))] = numbers
    for name, argument in a.items():
        if isinstance(argument, (Dependent, Independent)) and name == "other":
            arguments[name] = torch.empty(argument.shape, device="cpu")
        elif name in ("index", "indices"):
            arguments[name] = _indices(argument)
    if "pad" in str(node.target) and a.get("value") is not None:
        # Padded elements are 0 here, whatever the constant.
        arguments["value"] = 0.0
    return node.target(**arguments)  # type: ignore[operator]


def _indices(argument: Any) -> Any:
    if isinstance(argument, (list, tuple)):
        return [_indices(part) for part in argument]
    return argument.compute().cpu() if hasattr(argument, "compute") else argument


def _moved(builder: Builder, node: torch.fx.Node, value: Dependent, numbers: Tensor) -> Dependent:
    copies, axis = _copies(value, numbers)
    return builder.chain(
        node, value, sqrt_up(copies) if copies > 1 else 1.0, how="moves elements", shape=numbers.shape, axis=axis
    )


def _copies(value: Dependent, numbers: Tensor) -> tuple[int, int | None]:
    """Return how often an element is copied at most, and the samples' axis, by the elements' numbers from 1 on."""
    flat = numbers.long() - 1
    counts = torch.bincount(flat.flatten().clamp(min=-1) + 1, minlength=2)[1:]
    copies = int(counts.max())
    axis = None
    if value.axis is not None:
        inner = torch.Size(value.shape[value.axis + 1 :]).numel()
        size = value.shape[value.axis]
        axis = _sample_axis(torch.where(flat < 0, -1, (flat // inner) % size // (size // BATCH)))
    return copies, axis


def _sample_axis(sample: Tensor) -> int:
    """Return the dimension along which the samples of the batch lie one after the other.

    Raises:
        RefusedError: If there is none.
    """
    for axis, size in enumerate(sample.shape):
        if size % BATCH:
            continue
        expected = torch.arange(size).div(size // BATCH, rounding_mode="floor")
        expected = expected.view(-1, *[1] * (sample.dim() - axis - 1))
        if bool(((sample == expected) | (sample < 0)).all()):
            return axis
    raise SampleAxisError


def _spatial(value: Dependent, rank: int) -> tuple[int, ...]:
    """Return the last `rank` sizes, none of which may hold the batch."""
    if value.axis is not None and value.axis >= len(value.shape) - rank:
        raise SampleAxisError
    return value.shape[len(value.shape) - rank :]


def _rank(node: torch.fx.Node) -> int:
    return next(rank for rank in (1, 2, 3) if f"{rank}d" in str(node.target))


def _pooled(builder: Builder, node: torch.fx.Node, value: Dependent, constant: float) -> Any:
    result = node.meta["val"]
    if isinstance(result, Tensor):
        return builder.chain(node, value, constant)
    return (builder.chain(node, value, constant, shape=tuple(result[0].shape)), None)


@rule("max_pool1d", "max_pool2d", "max_pool3d", "max_pool1d_with_indices", "max_pool2d_with_indices",
      "max_pool3d_with_indices")  # fmt: skip
def _max_pool(builder: Builder, node: torch.fx.Node, a: dict[str, Any]) -> Any:
    value = only_input(a)
    rank = _rank(node)
    _spatial(value, rank)
    return _pooled(builder, node, value, max_pool_constant(rank, a["kernel_size"], a["stride"], a["dilation"]))


@rule("avg_pool1d", "avg_pool2d", "avg_pool3d")
def _average_pool(builder: Builder, node: torch.fx.Node, a: dict[str, Any]) -> Any:
    value = only_input(a)
    constant = sized_average_pool_constant(
        _spatial(value, _rank(node)),
        a["kernel_size"],
        a["stride"],
        a["padding"],
        a["ceil_mode"],
        a["count_include_pad"],
        a.get("divisor_override"),
    )
    return _pooled(builder, node, value, constant)


@rule("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "_adaptive_avg_pool2d",
      "_adaptive_avg_pool3d")  # fmt: skip
def _adaptive_average_pool(builder: Builder, node: torch.fx.Node, a: dict[str, Any]) -> Any:
    value = only_input(a)
    rank = _rank(node)
    sizes = per_dimension(a["output_size"], rank)
    return _pooled(builder, node, value, adaptive_average_pool_constant(_spatial(value, rank), sizes))


@rule("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d")
def _adaptive_max_pool(builder: Builder, node: torch.fx.Node, a: dict[str, Any]) -> Any:
    value = only_input(a)
    rank = _rank(node)
    sizes = per_dimension(a["output_size"], rank)
    return _pooled(builder, node, value, adaptive_max_pool_constant(_spatial(value, rank), sizes))


@rule("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d",
      "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "upsample_linear1d", "upsample_bilinear2d",
      "upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")  # fmt: skip
def _upsample(builder: Builder, node: torch.fx.Node, a: dict[str, Any]) -> Dependent:
    value = only_input(a)
    rank = _rank(node)
    arguments = dict(list(a.items())[1:])
    constant = upsample_constant(node.target, arguments, _spatial(value, rank), shape_of(node)[-rank:])  # type: ignore[arg-type]
    return builder.chain(node, value, constant)


@rule("sort", "msort", "topk", "kthvalue", "median", "cummax", "cummin")
def _ordered(builder: Builder, node: torch.fx.Node, a: dict[str, Any]) -> Any:
    """Order statistics: continuous, and everywhere a selection of elements.

    *Exact*: 1 where each element is selected once; sqrt(n) for running maxima, which one element may all be. The
    indices beside the values jump: they are refused where they are used.
    """
    value = only_input(a)
    if a.get("sorted") is False:
        raise RefusedError("unsorted, topk returns its values in no stated order")
    (dim,) = dimensions(value, a.get("dim", 0 if "msort" in str(node.target) else None))[-1:]
    running = "cum" in str(node.target)
    n = value.shape[dim]
    shape = shape_of(node)
    is_before = value.axis is not None and dim < value.axis
    axis = value.axis_after(-1 if len(shape) < len(value.shape) and is_before else 0)
    result = builder.chain(node, value, sqrt_up(n) if running and n > 1 else 1.0, shape=shape, axis=axis)
    return result if isinstance(node.meta["val"], Tensor) else (result, None)


@rule("cat", "concat", "concatenate", "stack")
def _concatenate(builder: Builder, node: torch.fx.Node, a: dict[str, Any]) -> Dependent:
    shape = shape_of(node)
    dim = a["dim"] % len(shape)
    branches = [v for v in a["tensors"] if isinstance(v, Dependent)]
    stacked = "stack" in str(node.target)
    axes = [v.axis_after(1 if stacked and v.axis is not None and dim <= v.axis else 0) for v in branches]
    if not stacked and dim in axes:
        raise SampleAxisError
    sorted_value = _extremes_of_one(builder, node.args[0]) if len(set(axes)) == 1 else None
    if sorted_value is not None:
        return builder.chain(node, sorted_value, how="largest and smallest of disjoint groups", axis=axes[0])
    return builder.join(node, "norm", branches, [1.0] * len(branches), axes)


def _extremes_of_one(builder: Builder, nodes: Any) -> Dependent | None:
    """Return the value of which two branches are the maxima and the minima of the same disjoint groups of elements.

    MaxMin and GroupSort of two, written out. Side by side they are continuous and, piece by piece, a selection in which
    no element stands twice, for a group has two elements at least. *Exact*: the constant is 1.
    """
    found = [_extreme(builder, node) for node in nodes]
    if len(found) != 2 or found[0] is None or found[1] is None or found[0][:2] == found[1][:2]:
        return None
    (_, root, first), (_, other, second) = found[0], found[1]
    is_one = root is other and first.shape == second.shape and first.shape[1] > 1
    if not is_one or any(len(set(g.flatten().tolist())) < g.numel() for g in (first, second)):
        return None
    groups = [g.sort(1).values for g in (first, second)]
    alike = torch.equal(*(g[g[:, 0].argsort()] for g in groups))
    return builder.values[root] if alike else None


def _extreme(builder: Builder, node: torch.fx.Node) -> tuple[str, torch.fx.Node, Tensor] | None:
    """Return which extreme an operation takes, of what value, and the numbers of the elements by group (n, g)."""
    if node.target is operator.getitem and node.args[1] == 0:
        node = node.all_input_nodes[0]
    name, sources = extreme_of_two(node) or (operation_name(node), node.all_input_nodes)
    is_extreme = name in ("max", "min", "amax", "amin", "maximum", "minimum")
    if not is_extreme or not all(isinstance(source, torch.fx.Node) for source in sources):
        return None
    roots = {_root(source) for source in sources}
    root = next(iter(roots))
    if len(roots) != 1 or not isinstance(builder.values[root], Dependent):
        return None
    numbers = [_moved_numbers(builder, source, root) for source in sources]
    dims = arguments_of(node, lambda leaf: leaf).get("dim")
    if len(numbers) == 2:
        first, second = (n.expand(shape_of(node)) for n in numbers)
        groups = torch.stack([first, second], -1)
    elif isinstance(dims, int) or (isinstance(dims, (list, tuple)) and len(dims) == 1):
        groups = numbers[0].movedim(dims if isinstance(dims, int) else dims[0], -1)
    else:
        return None
    return "max" if "max" in name else "min", root, groups.flatten(0, -2)


def _is_move(node: torch.fx.Node) -> bool:
    parent = node.all_input_nodes[0] if node.target is operator.getitem else node
    return operation_name(parent) in (*SAME, *MOVES)


def _root(node: torch.fx.Node) -> torch.fx.Node:
    """Return the last value on the way to a node from which on elements are only moved."""
    while _is_move(node):
        node = node.all_input_nodes[0]
    return node


def _moved_numbers(builder: Builder, node: torch.fx.Node, root: torch.fx.Node) -> Any:
    """Return the numbers of the root's elements where the operations up to a node move them."""
    path = [node]
    while path[-1] is not root:
        path.append(path[-1].all_input_nodes[0])
    numbers: Any = _numbers(builder.values[root])
    for step in reversed(path[:-1]):
        if step.target is operator.getitem:
            numbers = numbers[step.args[1]]
        elif operation_name(step) in MOVES:
            numbers = _carried_out(step, arguments_of(step, lambda leaf: builder.values.get(leaf, leaf)), numbers)
    return numbers


@rule("scatter_add", "index_add", "scatter_reduce")
def _scattered(builder: Builder, node: torch.fx.Node, a: dict[str, Any]) -> Dependent:
    """Sums, means or maxima of elements at given places, each element once.

    For sums of c elements and fewer, *exact*: the matrix A has one 1 in each column and c in a row, so that A A^T is
    diagonal: sqrt(c). A maximum or a mean of elements, itself among them, moves by no more than all of them together.
    """
    index, source = a["index"], a["src"] if "src" in a else a["source"]
    if not isinstance(index, Independent):
        raise RefusedError("its index depends on the network's input")
    how, size = a.get("reduce", "sum"), abs(float(a.get("alpha", 1)))
    if how not in ("sum", "amax", "amin", "mean"):
        raise RefusedError(f"the reduction {how!r} has no rule")
    branches = [(v, part) for v, part in ((a["self"], 1.0), (source, size)) if isinstance(v, Dependent)]
    dim = a["dim"] % max(1, len(shape_of(node)))
    sampled = [(v, v.axis) for v, _ in branches if v.axis is not None]
    if any(axis == dim or v.shape[axis] != shape_of(node)[axis] for v, axis in sampled):
        raise SampleAxisError
    if how != "sum":
        return builder.join(
            node, "norm", [v for v, _ in branches], [1.0] * len(branches), [v.axis for v, _ in branches]
        )
    places = index.compute().cpu()
    zeros, ones = torch.zeros(shape_of(node), device="cpu"), torch.ones(source.shape, device="cpu")
    add = zeros.index_add if "index_add" in str(node.target) else zeros.scatter_add
    together = int(add(dim, places, ones).max()) if zeros.numel() else 0
    scales = [size * sqrt_up(together) if v is source and together > 1 else part for v, part in branches]
    return builder.join(node, "sum", [v for v, _ in branches], scales, [v.axis for v, _ in branches])


@rule("slice_scatter", "select_scatter", "diagonal_scatter", "copy")
def _placed(builder: Builder, node: torch.fx.Node, a: dict[str, Any]) -> Dependent:
    """Write one tensor into places of another: each element of the result is one of either. *Exact* for each branch."""
    branches, scales, axes = [], [], []
    for key in ("self", "src"):
        value = a[key]
        if not isinstance(value, Dependent):
            continue
        arguments = {k: _zeros(v) if k in ("self", "src") else v for k, v in a.items()}
        numbers = torch.arange(1, 1 + torch.Size(value.shape).numel(), dtype=torch.float64, device="cpu")
        arguments[key] = numbers.reshape(value.shape)
        copies, axis = _copies(value, node.target(**arguments))  # type: ignore[operator]
        if copies:
            branches.append(value)
            scales.append(sqrt_up(copies) if copies > 1 else 1.0)
            axes.append(axis)
    if not branches:
        raise RefusedError("of the network's input nothing is left")
    return builder.join(node, "norm", branches, scales, axes)


def _zeros(value: Dependent | Independent) -> Tensor:
    return torch.zeros(value.shape, dtype=torch.float64, device="cpu")


@rule("col2im")
def _fold(builder: Builder, node: torch.fx.Node, a: dict[str, Any]) -> Dependent:
    """Sum overlapping blocks: *exact*, the root of the largest number of elements at one place, as in scatter_add."""
    value = only_input(a)
    if len(value.shape) != 3 or not value.has_batch_first:
        raise SampleAxisError("it takes the batch for channels or places")
    arguments = dict(list(a.items())[1:])
    places = math.prod(per_dimension(a["kernel_size"], 2))
    ones = torch.ones(1, places, value.shape[2], device="cpu")
    together = int(torch.ops.aten.col2im(ones, **arguments).max())
    return builder.chain(node, value, sqrt_up(together) if together > 1 else 1.0)


@rule("cumsum", "diff")
def _along(builder: Builder, node: torch.fx.Node, a: dict[str, Any]) -> Dependent:
    """Cumulative sums and differences along a dimension of n elements.

    *Exact*: differences D have ``D D^T = tridiag(-1, 2, -1)`` of size n - 1, whose largest eigenvalue is
    ``4 cos^2(pi / 2n)``; the inverse of the sums is D with another first row, whose smallest singular value is
    ``2 sin(pi / (4n + 2))``. Differences of order k are at most the product of k such, at n, n - 1, .. elements; given
    ends count as elements.
    """
    value = only_input(a)
    (dim,) = dimensions(value, a["dim"])
    if "cumsum" in str(node.target):
        constant = 1 / (2 * math.sin(math.pi / (4 * value.shape[dim] + 2))) * (1 + 1e-14)
        return builder.chain(node, value, constant)
    ends = sum(a[key].shape[dim] for key in ("prepend", "append") if a.get(key) is not None)
    n = value.shape[dim] + ends
    constant = 1.0
    for size in range(n, n - int(a["n"]), -1):
        constant *= 2 * math.cos(math.pi / (2 * size)) * (1 + 1e-15) if size > 1 else 0.0
    return builder.chain(node, value, constant)
