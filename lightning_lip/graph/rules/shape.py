"""Rules of operations that move, copy or resample elements: views, slices, padding, pooling, upsampling."""

from __future__ import annotations

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
from lightning_lip.graph.builder import Builder, Dependent, Independent, RefusedError, only_input, rule, shape_of
from lightning_lip.models.inputs import BATCH
from lightning_lip.rigorous.rounding import sqrt_up

SAME = (
    "clone", "contiguous", "alias", "detach", "lift_fresh_copy", "lift_fresh", "to", "_to_copy", "type_as",
)  # fmt: skip
MOVES = (
    "view", "_unsafe_view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze",
    "permute", "transpose", "t", "swapaxes", "swapdims", "movedim", "moveaxis", "numpy_T", "adjoint", "slice",
    "select", "narrow", "split", "split_with_sizes", "chunk", "tensor_split", "unbind", "unsafe_split",
    "unsafe_chunk", "flip", "roll", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle",
    "expand", "expand_as", "broadcast_to", "repeat", "repeat_interleave", "tile", "unfold", "im2col", "index_select",
    "index", "gather", "diagonal", "rot90", "tril", "triu",
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
    numbers = torch.arange(1, 1 + torch.Size(value.shape).numel(), dtype=torch.float64, device="cpu")
    arguments = dict(a)
    arguments[next(iter(a))] = numbers.reshape(value.shape)
    for name, argument in a.items():
        if isinstance(argument, (Dependent, Independent)) and name == "other":
            arguments[name] = torch.empty(argument.shape, device="cpu")
        elif name in ("index", "indices"):
            arguments[name] = _indices(argument)
    if "pad" in str(node.target) and a.get("value") is not None:
        # Padded elements are 0 here, whatever the constant.
        arguments["value"] = 0.0
    result = node.target(**arguments)  # type: ignore[operator]
    if isinstance(result, Tensor):
        return _moved(builder, node, value, result)
    return tuple(_moved(builder, node, value, part) for part in result)


def _indices(argument: Any) -> Any:
    if isinstance(argument, (list, tuple)):
        return [_indices(part) for part in argument]
    return argument.compute().cpu() if hasattr(argument, "compute") else argument


def _moved(builder: Builder, node: torch.fx.Node, value: Dependent, numbers: Tensor) -> Dependent:
    flat = numbers.long() - 1
    counts = torch.bincount(flat.flatten().clamp(min=-1) + 1, minlength=2)[1:]
    copies = int(counts.max())
    axis = None
    if value.axis is not None:
        inner = torch.Size(value.shape[value.axis + 1 :]).numel()
        size = value.shape[value.axis]
        axis = _sample_axis(torch.where(flat < 0, -1, (flat // inner) % size // (size // BATCH)))
    return builder.chain(
        node, value, sqrt_up(copies) if copies > 1 else 1.0, how="moves elements", shape=numbers.shape, axis=axis
    )


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
    raise RefusedError("it mixes the samples of a batch")


def _spatial(value: Dependent, rank: int) -> tuple[int, ...]:
    """Return the last `rank` sizes, none of which may hold the batch."""
    if value.axis is not None and value.axis >= len(value.shape) - rank:
        raise RefusedError("it mixes the samples of a batch")
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
