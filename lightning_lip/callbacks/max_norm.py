"""MaxNorm: Keras's max-norm constraint, the paper's fourth regime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from lightning_lip.callbacks.lightning.base import BaseCallback
from lightning_lip.callbacks.lightning.trainer import refuse_strategy
from lightning_lip.checks import check_choice, check_number
from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.models.sharding import refuse_sharded
from lightning_lip.operators.base import LinearOperator
from lightning_lip.operators.known import operator_of
from lightning_lip.operators.selection import Unknown, check_selection, cover
from lightning_lip.reporting.messages import tell


class MaxNorm(BaseCallback):
    """Rescales, after every optimiser step, the incoming weights of each unit to a Euclidean norm of at most a value.

    A row of a weight (out_features, in_features) whose norm exceeds `max_value` is scaled down to it; other rows stay
    bit for bit. This is Keras's ``max_norm`` (whose weights are the transposes, hence its ``axis=0``). It bounds the
    units, not the layer: the spectral norm can still reach ``max_value * sqrt(out_features)``.

    Args:
        max_value: Largest norm of a unit's incoming weights; positive.
        layers: Names, glob patterns, submodules or types to select; None selects every layer with a weight.
        exclude: Names, glob patterns, submodules or types to leave out.
        unknown: ``"skip"`` leaves out the layers that are no plain matrix (convolutions, embeddings, parametrised
            weights) and tells so at the start, but for one that `layers` names; ``"refuse"`` refuses them by name.

    Raises:
        ValueError: If `max_value` is not a positive finite number. At the start of training: if a selection matches
            nothing.
        UnsupportedLayerError: At the start of training, if a layer is refused, or none is a plain matrix.
    """

    def __init__(
        self,
        max_value: float,
        layers: str | nn.Module | type[nn.Module] | Sequence[str | nn.Module | type[nn.Module]] | None = None,
        exclude: str | nn.Module | type[nn.Module] | Sequence[str | nn.Module | type[nn.Module]] | None = None,
        unknown: Unknown = "skip",
    ) -> None:
        self.max_value = check_number("max_value", max_value, positive=True)
        check_selection(layers, exclude)
        self._layers, self._exclude = layers, exclude
        check_choice("unknown", unknown, get_args(Unknown))
        self._unknown = unknown
        self._weights: list[nn.Parameter] = []
        self._n_clipped: Tensor | None = None

    @property
    def n_clipped(self) -> int:
        """How many rows were scaled down so far, over all steps."""
        return 0 if self._n_clipped is None else int(self._n_clipped)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            refuse_strategy(trainer, self)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_sharded(pl_module, "MaxNorm", "Use DDP or a single device, or remove the callback.")
        problem = "MaxNorm takes layers whose weight is a matrix of its own, and these selected ones have none"
        coverage = cover(pl_module, self._layers, self._exclude, self._unknown, [_plain_matrix], problem)
        if coverage.skipped:
            tell(f'MaxNorm: {coverage}\nWith unknown="refuse" these are refused.')
        self._weights = [op.direct_parameter for op in coverage.operators if op.direct_parameter is not None]

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for weight in self._weights:
            if weight.requires_grad:
                clipped = clip_rows_(weight.detach(), self.max_value)
                self._n_clipped = clipped if self._n_clipped is None else self._n_clipped + clipped.to(self._n_clipped)


def _plain_matrix(module: nn.Module, name: str) -> list[LinearOperator]:
    """Return the operator of a layer whose weight is a matrix that can be written.

    Raises:
        UnsupportedLayerError: If it is none.
    """
    if not isinstance(module, nn.Linear):
        raise UnsupportedLayerError("it is no linear layer")
    operator = operator_of(module, name)
    if operator.direct_parameter is None:
        raise UnsupportedLayerError("its weight is parametrised")
    return [operator]


@torch.no_grad()
def clip_rows_(weight: Tensor, max_value: float) -> Tensor:
    """Scale the rows of a weight (m, n) whose norm exceeds `max_value` down to it, in place.

    Returns:
        The number of rows scaled, an integer tensor of shape (). Rows within the limit stay bit for bit.
    """
    norms = torch.linalg.vector_norm(weight, dim=1, keepdim=True, dtype=torch.float64)
    over = norms > max_value
    weight.copy_(torch.where(over, (weight * (max_value / norms)).to(weight.dtype), weight))
    n_clipped: Tensor = over.sum()
    return n_clipped
