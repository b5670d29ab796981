"""MaxNorm: Keras's max-norm constraint, the paper's fourth regime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from lightning_lip.callbacks.lightning.base import BaseCallback
from lightning_lip.callbacks.lightning.trainer import refuse_strategy
from lightning_lip.checks import check_number
from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.models.sharding import refuse_sharded
from lightning_lip.operators.selection import check_selection, find_operators


class MaxNorm(BaseCallback):
    """Rescales, after every optimiser step, the incoming weights of each unit to a Euclidean norm of at most a value.

    A row of a weight (out_features, in_features) whose norm exceeds `max_value` is scaled down to it; other rows stay
    bit for bit. This is Keras's ``max_norm`` (whose weights are the transposes, hence its ``axis=0``). It bounds the
    units, not the layer: the spectral norm can still reach ``max_value * sqrt(out_features)``.

    Args:
        max_value: Largest norm of a unit's incoming weights; positive.
        layers: Names, glob patterns or submodules to select; None selects every layer with a weight.
        exclude: Names, glob patterns or submodules to leave out.

    Raises:
        ValueError: If `max_value` is not a positive finite number. At the start of training: if a selection matches
            nothing, or a selected weight is parametrised.
        UnsupportedLayerError: At the start of training, if a selected layer with weights is not a matrix.
    """

    def __init__(
        self,
        max_value: float,
        layers: str | nn.Module | Sequence[str | nn.Module] | None = None,
        exclude: str | nn.Module | Sequence[str | nn.Module] | None = None,
    ) -> None:
        self.max_value = check_number("max_value", max_value, positive=True)
        check_selection(layers, exclude)
        self._layers, self._exclude = layers, exclude
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
        self._weights = []
        for op in find_operators(pl_module, self._layers, self._exclude):
            weight = op.direct_parameter
            if not op.is_matrix:
                raise UnsupportedLayerError(
                    f"MaxNorm takes linear layers only, not {op.name!r} ({type(op.module).__name__}): leave it out "
                    "with `exclude`."
                )
            if weight is None:
                raise ValueError(
                    f"MaxNorm cannot rescale the parametrised weight of layer {op.name!r}: leave it out with `exclude`."
                )
            self._weights.append(weight)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for weight in self._weights:
            if weight.requires_grad:
                clipped = clip_rows_(weight.detach(), self.max_value)
                self._n_clipped = clipped if self._n_clipped is None else self._n_clipped + clipped.to(self._n_clipped)


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
