"""What the zoo knows of a model: how it is built, what it is fed, and what its loss is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BATCH = 8
CLASSES = 10

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes:
        name: ``package/model``.
        build: Makes the model, with random weights.
        batch: Makes its one batch, with `labels` among the entries.
        loss: ``(model, batch) -> ()``.
        example: Makes the example input over which its graph is traced, from a batch: floating-point, so that there is
            something to be Lipschitz in. A model that reads tokens starts at its embeddings.
        traced: Makes what is traced of the model, from it and a batch.
        batch_dim: Of the example input: 0, or None where it is one sample.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    example: Callable[[Batch], Any]
    traced: Callable[[nn.Module, Batch], nn.Module] = lambda model, batch: model
    batch_dim: Literal[0] | None = 0

    @property
    def package(self) -> str:
        """The package that the model is from."""
        return self.name.partition("/")[0]


def generator() -> torch.Generator:
    """Return the generator of the fixed random data."""
    return torch.Generator().manual_seed(1)


def labels(classes: int = CLASSES) -> Tensor:
    """Return the classes of the samples, shape (8,)."""
    return torch.arange(BATCH) % classes


def classify(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy of a model that takes the batch's other entries in their order.

    Auxiliary and distilled heads (a tuple of logits) count alike, and the pixels of a segmentation are averaged.
    """
    *inputs, target = batch.values()
    output = model(*inputs)
    if isinstance(output, Mapping):
        output = tuple(output.values())
    heads = output if isinstance(output, tuple) else (output,)
    logits = [head.flatten(2).mean(2) if head.dim() > 2 else head for head in heads]
    return torch.stack([F.cross_entropy(each, target) for each in logits]).mean()


def vector(name: str, build: Callable[[], nn.Module], shape: tuple[int, ...]) -> Entry:
    """Return an entry for a classifier of one floating-point tensor.

    Args:
        name: ``package/model``.
        build: Makes the model.
        shape: The shape of a sample.
    """

    def batch() -> Batch:
        return {"x": torch.randn(BATCH, *shape, generator=generator()), "labels": labels()}

    return Entry(name, build, batch, classify, lambda batch: batch["x"])
