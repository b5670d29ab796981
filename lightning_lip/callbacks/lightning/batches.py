"""The inputs and the target in a validation batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

BatchToXY = Callable[[Any], tuple[Tensor, Tensor]]


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
