"""CertifiedValidation: the certified bound at every validation, and the accuracy or error that it guarantees."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torchmetrics import CatMetric, MaxMetric, MeanAbsoluteError, MeanMetric, Metric, MetricCollection, MinMetric
from typing_extensions import override

from lightning_lip.callbacks.lightning.base import BaseCallback
from lightning_lip.callbacks.lightning.batches import BatchToXY, check_batch_to_xy, unpack
from lightning_lip.callbacks.tensorboard.certified_radii import show
from lightning_lip.certificates.interval import Certificate, certify
from lightning_lip.certificates.jacobians import largest_jacobian_norm
from lightning_lip.checks import check_choice, check_finite, check_integers, check_levels, check_type
from lightning_lip.metrics import CertifiedAccuracy, certified_radii, certified_worst_case_mae
from lightning_lip.models.inputs import check_batch_dim


class CertifiedValidation(BaseCallback):
    """Certifies the network at every validation and logs what follows for perturbations of l2 norm at most eps.

    - ``lipschitz/certified``: the *certified upper bound* of the network's Lipschitz constant (``certify(...).upper``);
    - ``lipschitz/estimate``: the graph bound at estimated norms, all of them at the input's size
      (``certify(...).estimate``); the certified bound can lie below it, where a tighter method gave it;
    - ``lipschitz/lower``: the largest Jacobian norm over the first `max_inputs` validation inputs of each rank, a
      *lower bound*, true up to rounding in fp32;
    - a classifier: ``val/certified_accuracy/eps=0.1``, the share of samples that stay correctly classified under every
      perturbation of the input of norm at most 0.1, and at ``eps=0`` the accuracy. Where the network ends in a linear
      layer, or `head` names it, each pair of classes has the constant of its own difference of logits (pairwise), which
      is often far smaller. A warning tells once if all predictions of a validation are one class. Loggers that can
      (TensorBoard) get a histogram of the samples' certified radii, ``val/certified_radius``, 0 for those classified
      wrongly, and the figure ``val/certified_accuracy``: certified accuracy against eps, with the clean accuracy. Its
      numbers are in ``certified_accuracy.csv`` in the folder of the first logger, anew at each validation;
    - a regression: ``val/certified_worst_case_mae/eps=0.1``, an upper bound of the mean absolute error under the worst
      such perturbation of every sample.

    The statements hold for the network in exact arithmetic, in eval mode. Certifying costs fp64 work on the CPU, from
    milliseconds (an MLP) to seconds (a small ResNet) and more; use ``check_val_every_n_epoch`` where it is too much.
    A certificate holds for one size of inputs: each size has its own, and the largest bound is logged. If something
    cannot be certified, a warning names it once and nothing is logged. The sanity check runs all of it and logs
    nothing: what fails, fails before training.

    Args:
        eps: The norms of the perturbations, distinct, at least 0.
        task: ``"classification"`` (logits and integer targets) or ``"regression"`` (outputs shaped like the target).
        batch_to_xy: A callable from a batch to ``(inputs, target)``; needed where batches are no such pair.
        prefix: First part of the logged names.
        max_inputs: How many inputs the lower bound is measured on; 0 measures none. Up to 32 outputs a sample it costs
            one backward pass each, with more outputs 60 passes.
        batch_dim: None says that each validation batch is one sample as a whole, as a graph's nodes are: a perturbation
            of norm eps is one of all of it.
        head: The name of the linear layer whose outputs are the logits, where other operations follow it in `forward`;
            the certificates are then of its largest output.
        curve: Where to write the curve instead: a CSV file, and beside it a PNG file where matplotlib is installed.

    Raises:
        ValueError: If `eps` is empty, holds a number below 0 or not finite, or one twice, `task` is unknown, or
            `max_inputs` is below 0. At validation: for NaN or an infinity in the data, or in a Jacobian.
        TypeError: At validation, for a batch that is no ``(inputs, target)`` pair of tensors.
    """

    def __init__(
        self,
        eps: Sequence[float] = (0.1,),
        task: Literal["classification", "regression"] = "classification",
        batch_to_xy: BatchToXY | None = None,
        prefix: str = "val",
        max_inputs: int = 64,
        batch_dim: Literal[0] | None = 0,
        head: str | None = None,
        curve: str | Path | None = None,
    ) -> None:
        self.eps = check_levels("eps", eps)
        check_choice("task", task, ("classification", "regression"))
        check_type("prefix", prefix, str, "a string")
        check_integers(0, max_inputs=max_inputs)
        check_batch_to_xy(batch_to_xy)
        check_batch_dim(batch_dim)
        if head is not None:
            check_type("head", head, str, "the name of a layer")
        if curve is not None:
            check_type("curve", curve, (str, Path), "a path")
        self.curve = None if curve is None else Path(curve)
        self._batch_dim = batch_dim
        self.head = head
        self.task = task
        self.prefix = prefix
        self.max_inputs = max_inputs
        self._batch_to_xy = batch_to_xy
        self._certified: dict[torch.Size, Certificate | None] = {}
        self._lower: float | None = None
        self._n_measured = 0
        self._warned = False
        self._metric: Metric | None = None
        self._growth: MeanMetric | None = None
        self._predicted: MetricCollection | None = None
        self._radii_seen: CatMetric | None = None
        self._warned_of_constant = False

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._certified, self._lower, self._n_measured = {}, None, 0
        metric: Metric = CertifiedAccuracy(self._radii()) if self.task == "classification" else MeanAbsoluteError()
        self._predicted = MetricCollection([MinMetric(), MaxMetric()]).to(pl_module.device)
        self._metric = metric.to(pl_module.device)
        self._growth = MeanMetric().to(pl_module.device)
        self._radii_seen = CatMetric().to(pl_module.device)

    def _radii(self) -> list[float]:
        """Return the norms that a classifier is certified at: 0, the accuracy, always among them."""
        return list(self.eps) if 0 in self.eps else [0.0, *self.eps]

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._metric is None or self._growth is None or self._radii_seen is None:
            return
        inputs, target = unpack(batch, self._batch_to_xy)
        check_finite("inputs", inputs)
        # A certificate holds at the size of its input: one for each size.
        size = inputs.shape if self._batch_dim is None else inputs.shape[1:]
        if size not in self._certified:
            self._certified[size] = self._certify(pl_module, inputs)
        certificate = self._certified[size]
        if certificate is None:
            return
        self._measure(pl_module, inputs)
        with trainer.precision_plugin.forward_context(), isolate_rng(), torch.no_grad():
            outputs = self._outputs(pl_module, inputs)
        if self.task == "classification":
            head = certificate.head
            if head is None:
                constants: tuple[Any, ...] = (certificate.upper,)
            else:
                # What follows a named head has no part in its outputs, and its constant none in theirs.
                constants = (head.features, head.weight, certificate.upper if self.head is None else None)
            self._metric.update(outputs, target, *constants)
            self._radii_seen.update(certified_radii(outputs, target, *constants))
            if self._predicted is not None and len(target):
                self._predicted.update(outputs.argmax(dim=1))
            return
        if outputs.shape != target.shape:
            raise ValueError(
                f"Expected outputs of the target's shape {tuple(target.shape)}, got {tuple(outputs.shape)}: reshape "
                "one of them with batch_to_xy or in forward."
            )
        check_finite("target", target)
        self._metric.update(outputs.flatten(), target.flatten())
        # If the m outputs of a sample move by 1 in norm, their mean moves by at most 1 / sqrt(m); m may differ between
        # batches.
        n_outputs = target.numel() if self._batch_dim is None else target[0].numel()
        self._growth.update(1 / math.sqrt(max(1, n_outputs)), target.numel())

    def _outputs(self, pl_module: LightningModule, inputs: torch.Tensor) -> torch.Tensor:
        """Return the outputs of the module, or those of the head that is named."""
        if self.head is None:
            outputs: torch.Tensor = pl_module(inputs)
            return outputs
        found: list[torch.Tensor] = []
        handle = self._named_head(pl_module).register_forward_hook(lambda module, args, output: found.append(output))
        try:
            pl_module(inputs)
        finally:
            handle.remove()
        return found[0]

    def _named_head(self, pl_module: LightningModule) -> torch.nn.Module:
        named: dict[str | None, torch.nn.Module] = {**dict(pl_module.named_modules())}
        if self.head not in named:
            raise ValueError(f"Expected `head` to name a layer of the module, got {self.head!r}.")
        return named[self.head]

    def _measure(self, pl_module: LightningModule, inputs: torch.Tensor) -> None:
        """Raise the lower bound to the largest Jacobian norm over these inputs, while there are inputs to go."""
        left = self.max_inputs - self._n_measured
        if left > 0:
            whole = [inputs] if self._batch_dim is None else inputs
            norm = largest_jacobian_norm(
                pl_module, whole, batch_dim=self._batch_dim, max_inputs=left, dtype=torch.float32
            )
            self._lower = norm if self._lower is None else max(self._lower, norm)
            self._n_measured += len(whole)

    def _certify(self, pl_module: LightningModule, inputs: torch.Tensor) -> Certificate | None:
        example = inputs if self._batch_dim is None else inputs[:2]
        head = None if self.head is None else self._named_head(pl_module)
        result = certify(pl_module, example, batch_dim=self._batch_dim, head=head)
        if result.certified:
            return result
        if not self._warned:
            self._warned = True
            warnings.warn(
                "CertifiedValidation logs nothing, because the network has no certificate:\n  - "
                + "\n  - ".join(result.refused),
                stacklevel=2,
            )
        return None

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metric, self._metric = self._metric, None
        growth, self._growth = self._growth, None
        predicted, self._predicted = self._predicted, None
        radii, self._radii_seen = self._radii_seen, None
        if metric is None or growth is None or predicted is None or radii is None or trainer.sanity_checking:
            return
        # Each rank certifies with inputs of its own: all log, or none, since what follows is collective.
        is_certified = bool(self._certified) and None not in self._certified.values()
        if not trainer.strategy.reduce_boolean_decision(is_certified):
            return
        certificates = [certificate for certificate in self._certified.values() if certificate is not None]
        lipschitz = max(certificate.upper for certificate in certificates)
        value = metric.compute()
        if self.task == "classification":
            name, values, levels = "certified_accuracy", value.flatten().tolist(), self._radii()
            accuracy = values[levels.index(0)]
            self._warn_of_constant(predicted.compute(), accuracy)
            self._show(trainer, radii.compute(), accuracy)
        else:
            levels = list(self.eps)
            name = "certified_worst_case_mae"
            mae, mean_growth = float(value), float(growth.compute())
            values = [certified_worst_case_mae(mae, lipschitz, e * mean_growth) for e in self.eps]
        metrics = {f"{self.prefix}/{name}/eps={e:g}": v for e, v in zip(levels, values, strict=True)}
        estimates = [math.nan if certificate.estimate is None else certificate.estimate for certificate in certificates]
        interval = {"lipschitz/certified": lipschitz, "lipschitz/estimate": max(estimates)}
        if self._lower is not None:
            interval["lipschitz/lower"] = self._lower
        # compute() has summed over ranks, so that all hold the same values; except the lower bound, which each measured
        # on its own inputs: the largest counts.
        pl_module.log_dict({**interval, **metrics}, sync_dist=True, reduce_fx="max")

    def _show(self, trainer: Trainer, radii: torch.Tensor, accuracy: float) -> None:
        """Show the radii of all ranks' samples, on the first rank."""
        folder = trainer.log_dir if trainer.loggers else None  # every rank asks for it
        if trainer.is_global_zero:
            local = None if folder is None or "://" in folder else Path(folder)
            show(trainer, radii, self.eps, accuracy, self.prefix, self.curve, local)

    def _warn_of_constant(self, predicted: dict[str, torch.Tensor], accuracy: float) -> None:
        """Warn once of a classifier that predicts one class, which the bound does not show."""
        lowest, highest = float(predicted["MinMetric"]), float(predicted["MaxMetric"])
        if lowest == highest and accuracy < 1 and not self._warned_of_constant:
            self._warned_of_constant = True
            warnings.warn(
                f"CertifiedValidation: all predictions are class {lowest:g}, at an accuracy of {accuracy:.3g}. A "
                "constant classifier is certified at every eps: train for a smaller eps, or penalise less.",
                stacklevel=2,
            )
