"""What must be the same on every rank, or the ranks' weights would drift apart."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from lightning_lip.operators.base import LinearOperator
from lightning_lip.operators.convolutions.recorded import recorded


def refuse_statistics_of_one_rank(module: nn.Module, instead: str) -> None:
    """Refuse batch normalisation whose running statistics differ between ranks: a traced bound reads them.

    Args:
        module: The module in training.
        instead: The alternative to synchronised statistics, for the message.

    Raises:
        RuntimeError: If there is such a layer.
    """
    own = [
        name
        for name, m in module.named_modules()
        if isinstance(m, _BatchNorm) and m.track_running_stats and not isinstance(m, nn.SyncBatchNorm)
    ]
    if own:
        raise RuntimeError(
            f"The bound over the traced graph reads the running statistics of {own}, which differ between ranks: "
            f"their weights would drift apart. Use Trainer(sync_batchnorm=True), or {instead}."
        )


def refuse_inputs_of_one_rank(example_input: object) -> None:
    """Refuse first batches whose inputs have other shapes on other ranks; every rank must call it.

    Raises:
        RuntimeError: If they have, the size of the batch aside.
    """
    leaves = pytree.tree_leaves(example_input)
    shapes = [tuple(leaf.shape[1:]) for leaf in leaves if isinstance(leaf, torch.Tensor)]
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, shapes)
    if any(other != gathered[0] for other in gathered):
        raise RuntimeError(
            f"The first batch has inputs of different sizes on different ranks, {gathered}: their weights would drift "
            "apart. Pass an input as example_input= to choose one."
        )


def refuse_sizes_of_one_rank(operators: Iterable[LinearOperator]) -> None:
    """Refuse layers, and recorded input sizes of convolutions, that differ between ranks; every rank must call it.

    Raises:
        RuntimeError: If there is such a layer.
    """
    operators = list(operators)
    recording = {op.name: op.domain_shape for op in recorded(operators)}
    sizes = {op.name: recording.get(op.name) for op in operators}
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, sizes)
    if any(other != gathered[0] for other in gathered):
        raise RuntimeError(
            f"The first batch showed other layers, or inputs of different sizes on different ranks, {gathered}: pass "
            "example_input= to choose one."
        )
