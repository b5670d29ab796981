"""CertifiedValidation: what no perturbation of a given size can take away, at every validation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torchmetrics import MeanAbsoluteError, Metric
from typing_extensions import override

from lightning_lip.callbacks._base import BaseCallback
from lightning_lip.callbacks._batches import BatchToXY, unpack
from lightning_lip.certificates import certify
from lightning_lip.metrics import CertifiedAccuracy, certified_worst_case_mae


class CertifiedValidation(BaseCallback):
    """Certifies the network at every validation and logs what follows for perturbations of l2 norm at most eps.

    - ``lipschitz/certified``: the *certified upper bound* of the network's Lipschitz constant (``certify(...).upper``);
    - a classifier: ``val/certified_accuracy/eps=0.1``, the share of samples that stay correctly classified under every
      perturbation of the input of norm at most 0.1;
    - a regression: ``val/certified_worst_case_mae/eps=0.1``, an upper bound of the mean absolute error under the worst
      such perturbation of every sample.

    The statements hold for the network in exact arithmetic, in eval mode. Certifying costs fp64 work on the CPU, from
    milliseconds (an MLP) to seconds (a small ResNet) and more; use ``check_val_every_n_epoch`` where it is too much.
    Each size of the inputs is certified for itself; the largest bound is logged. Where something has no certificate a
    warning names it once, and nothing is logged. The sanity check is left out.

    Args:
        eps: The norms of the perturbations, distinct, at least 0.
        task: ``"classification"`` (logits and integer targets) or ``"regression"`` (outputs shaped like the target).
        batch_to_xy: A callable from a batch to ``(inputs, target)``; needed where batches are no such pair.
        prefix: First part of the logged names.

    Raises:
        ValueError: If `eps` is empty, holds a number below 0 or not finite, or one twice, or `task` is unknown.
        TypeError: At validation, for a batch that is no ``(inputs, target)`` pair of tensors.
    """

    def __init__(
        self,
        eps: Sequence[float] = (0.1,),
        task: Literal["classification", "regression"] = "classification",
        batch_to_xy: BatchToXY | None = None,
        prefix: str = "val",
    ) -> None:
        self.eps = tuple(float(e) for e in eps)
        if not self.eps or len(set(self.eps)) < len(self.eps) or not all(math.isfinite(e) and e >= 0 for e in self.eps):
            raise ValueError(f"Expected `eps` to be distinct finite numbers of at least 0, got {eps!r}.")
        if task not in ("classification", "regression"):
            raise ValueError(f"Expected `task` to be 'classification' or 'regression', got {task!r}.")
        self.task = task
        self.prefix = prefix
        self._batch_to_xy = batch_to_xy
        self._certified: dict[torch.Size, float | None] = {}
        self._warned = False
        self._metric: Metric | None = None
        self._n_outputs = 1

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._certified = {}
        metric: Metric = CertifiedAccuracy(list(self.eps)) if self.task == "classification" else MeanAbsoluteError()
        self._metric = metric.to(pl_module.device)

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.sanity_checking or self._metric is None:
            return
        inputs, target = unpack(batch, self._batch_to_xy)
        # A certificate holds at the size of its input: one for each size.
        size = inputs.shape[1:]
        if size not in self._certified:
            self._certified[size] = self._certify(pl_module, inputs)
        lipschitz = self._certified[size]
        if lipschitz is None:
            return
        with trainer.precision_plugin.forward_context(), isolate_rng(), torch.no_grad():
            outputs = pl_module(inputs)
        if self.task == "classification":
            self._metric.update(outputs, target, lipschitz)
            return
        if outputs.shape != target.shape:
            raise ValueError(
                f"Expected outputs of the target's shape {tuple(target.shape)}, got {tuple(outputs.shape)}: reshape "
                "one of them with batch_to_xy or in forward."
            )
        self._n_outputs = max(1, target[0].numel())
        self._metric.update(outputs.flatten(), target.flatten())

    def _certify(self, pl_module: LightningModule, inputs: torch.Tensor) -> float | None:
        result = certify(pl_module, inputs[:2])
        if not result.certified and not self._warned:
            self._warned = True
            warnings.warn(
                "CertifiedValidation logs nothing, because the network has no certificate:\n  - "
                + "\n  - ".join(result.refused),
                stacklevel=2,
            )
        return result.upper

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metric, self._metric = self._metric, None
        if metric is None or not self._certified or None in self._certified.values():
            return
        lipschitz = max(bound for bound in self._certified.values() if bound is not None)
        value = metric.compute()
        if self.task == "classification":
            name, values = "certified_accuracy", value.tolist()
        else:
            name = "certified_worst_case_mae"
            mae = float(value)
            values = [certified_worst_case_mae(mae, lipschitz, e, self._n_outputs) for e in self.eps]
        metrics = {f"{self.prefix}/{name}/eps={e:g}": v for e, v in zip(self.eps, values, strict=True)}
        # Every rank holds the same values: compute() has summed over them.
        pl_module.log_dict({"lipschitz/certified": lipschitz, **metrics}, sync_dist=True, reduce_fx="max")
