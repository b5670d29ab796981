"""What is in a batch: the model's input in a training batch, the inputs and the target in a validation batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

BatchToXY = Callable[[Any], tuple[Tensor, Tensor]]


FROM_BATCH = "batch"
"""The `example_input` that takes the first training batch; ``"batch:<key>"`` takes what stands under a key or index."""


def check_example_input(example_input: object) -> None:
    """Check that an `example_input` that is text names a part of the first training batch.

    Raises:
        ValueError: If it is another text.
    """
    if not isinstance(example_input, str):
        return
    kind, colon, key = example_input.partition(":")
    if kind != FROM_BATCH or bool(colon) != bool(key):
        raise ValueError(
            f"Expected `example_input` to be a tensor, a tuple of arguments, a dict of keyword arguments, or "
            f'"{FROM_BATCH}" or "{FROM_BATCH}:<key>" for what the first training batch holds, got {example_input!r}. A '
            "configuration file cannot hold tensors: set self.example_input_array (torch.zeros(1, 4), say) in the "
            "LightningModule instead."
        )


def input_of_batch(batch: Any, example_input: str) -> tuple[Any]:
    """Return the model's input in a training batch, as its only positional argument.

    Args:
        batch: The batch: a tensor is the input itself, and of a tuple or list the first entry is.
        example_input: ``"batch"``, or ``"batch:<key>"`` for ``batch[key]``, where a number is an index of a sequence.

    Raises:
        ValueError: If the batch has no such entry, or is no tensor, tuple or list, and no key is given.
    """
    key = example_input.partition(":")[2]
    if not key:
        if isinstance(batch, Tensor):
            return (batch,)
        if isinstance(batch, tuple | list) and batch:
            return (batch[0],)
    else:
        try:
            return (batch[int(key)] if isinstance(batch, tuple | list) else batch[key],)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            pass
    holds = f" with the keys {list(batch)}" if isinstance(batch, Mapping) else ""
    if isinstance(batch, tuple | list):
        holds = f" of {len(batch)} entries"
    raise ValueError(
        f"example_input={example_input!r} finds no input in the first training batch, a {type(batch).__name__}{holds}: "
        f'name the key or index of the input, example_input="{FROM_BATCH}:x" for batch["x"], say, or pass an input.'
    )


def check_batch_to_xy(batch_to_xy: object) -> None:
    """Check that `batch_to_xy` can be called.

    Raises:
        TypeError: If it cannot, and is not None.
    """
    if batch_to_xy is not None and not callable(batch_to_xy):
        raise TypeError(
            f"expected batch_to_xy to be a callable from a batch to (inputs, target), or None, got {batch_to_xy!r}"
        )


def unpack(batch: Any, batch_to_xy: BatchToXY | None) -> tuple[Tensor, Tensor]:
    """Return the inputs and the target of a batch.

    Args:
        batch: A batch of the data loader; a pair of tensors, unless `batch_to_xy` makes one of it.
        batch_to_xy: A callable from a batch to such a pair.

    Raises:
        TypeError: If the batch, or what `batch_to_xy` returns, is no pair of tensors.
    """
    pair = batch if batch_to_xy is None else batch_to_xy(batch)
    if isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(part, Tensor) for part in pair):
        inputs, target = pair
        return inputs, target
    what = "a batch" if batch_to_xy is None else "what batch_to_xy returns"
    parts = f" of {[type(part).__name__ for part in pair]}" if isinstance(pair, tuple | list) else ""
    raise TypeError(
        f"expected {what} to be (inputs, target), two tensors, got a {type(pair).__name__}{parts}: pass "
        "batch_to_xy=, a callable from a batch to such a pair"
    )
