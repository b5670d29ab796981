"""A model's inputs: as positional and keyword arguments, checked, and as a batch of two."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_lip.checks import shown
from lightning_lip.models.modules import parameters_kept

FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    RuntimeError,
    StopIteration,
    TypeError,
    ValueError,
)
"""What a forward pass raises that does not run in a dtype or at a point, or that torch.export does not take."""


def call_arguments(example_input: object) -> tuple[tuple[object, ...], Mapping[str, object]]:
    """Split an example input into positional and keyword arguments of a model."""
    if isinstance(example_input, Mapping):
        return (), example_input
    if isinstance(example_input, tuple):
        return example_input, {}
    return (example_input,), {}


BATCH = 2
"""Samples in the traced batch: two, so that an operation that mixes samples shows."""


def check_example(
    model: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object], batch_dim: BatchDim = 0
) -> None:
    """Check that the forward pass runs on the example, where it could not be traced on it; parameters are kept.

    Raises:
        ValueError: If it fails.
    """
    try:
        with parameters_kept(model):
            model(*args, **kwargs)
    # The user's forward pass may raise anything.
    except Exception as error:
        given = [*map(_described, args), *(f"{name}={_described(value)}" for name, value in kwargs.items())]
        raise ValueError(
            f"Expected `example_input` to be an input of {type(model).__name__}, whose forward takes "
            f"{inspect.signature(model.forward)}: a tensor, a tuple of positional arguments or a dict of keyword "
            f"arguments. The forward pass fails on what was given, taken as ({', '.join(given)}) "
            f"{f'with a batch of {BATCH}' if batch_dim == 0 else 'as one sample'}: {type(error).__name__}: {error}"
            + ("\nWhere there is no batch, as for a graph's nodes, say batch_dim=None." if batch_dim == 0 else "")
        ) from error


def _described(value: object) -> str:
    kind = type(value).__name__
    return f"{kind} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else kind


def floating_dtype(model: nn.Module) -> torch.dtype | None:
    """Return the dtype of the model's first floating-point parameter, or None if there is none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


BatchDim = Literal[0] | None
"""Where the samples of a batch lie in every tensor of an example input; None: the whole input is one sample."""


def check_batch_dim(batch_dim: object) -> None:
    """Check where the batch of an example input lies.

    Raises:
        ValueError: If it is neither the first dimension nor None.
    """
    if batch_dim is not None and (type(batch_dim) is not int or batch_dim != 0):
        raise ValueError(
            "Expected `batch_dim` to be 0 (samples lie along the first dimension) or None (the whole input is one "
            f"sample, as a graph's nodes are), got {shown(batch_dim)}."
        )


def traced_example(example_input: object, dtype: torch.dtype | None = None, batch_dim: BatchDim = 0) -> object:
    """Return copies of an example's tensors as they are traced, floating-point ones in the model's `dtype`.

    Args:
        example_input: A tensor, a tuple of arguments or a dict of keyword arguments.
        dtype: What floating-point tensors are converted to, or None.
        batch_dim: 0 cuts or repeats the batch along every tensor's first dimension to two samples; None keeps the
            whole.
    """
    tensors = [leaf for leaf in pytree.tree_leaves(example_input) if isinstance(leaf, Tensor)]
    for tensor in tensors:
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise TypeError(f"Expected dense tensors in `example_input`, got {shown(tensor)}.")
    if not tensors:
        raise ValueError(
            "Expected `example_input` to be a tensor, a tuple of arguments or a dict of keyword arguments, with at "
            f"least one tensor in it, got a {type(example_input).__name__} with none. A configuration file cannot hold "
            "tensors: set self.example_input_array (torch.zeros(1, 4), say) in the LightningModule instead."
        )
    shapes = [tuple(t.shape) for t in tensors]
    if batch_dim is None and any(t.numel() == 0 for t in tensors):
        raise ValueError(f"Expected tensors with elements in `example_input`, got shapes {shapes}.")
    if batch_dim == 0 and (
        any(t.dim() == 0 for t in tensors) or len({t.shape[0] for t in tensors}) != 1 or tensors[0].shape[0] == 0
    ):
        raise ValueError(
            "Expected every tensor in `example_input` to have the batch along its first dimension, all of one size of "
            f"at least 1, got shapes {shapes}. Where there is no batch, as for a graph's nodes, say batch_dim=None."
        )

    def fit(leaf: object) -> object:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf.detach()
        if dtype is not None and leaf.is_floating_point():
            # The example tells shapes; under 64-true or bf16-true it is still the fp32 that the user wrote.
            leaf = leaf.to(dtype)
        if batch_dim is None:
            return leaf.clone()
        return torch.cat([leaf, leaf])[:BATCH].clone() if leaf.shape[0] < BATCH else leaf[:BATCH].clone()

    if isinstance(example_input, Mapping):
        return {key: pytree.tree_map(fit, value) for key, value in example_input.items()}
    return pytree.tree_map(fit, example_input)
