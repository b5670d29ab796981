"""Validation error under noise on the inputs, logged at every validation epoch."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset
from typing_extensions import override

from lightning_lip.callbacks.lightning.base import BaseCallback
from lightning_lip.callbacks.lightning.batches import BatchToXY, check_batch_to_xy, unpack
from lightning_lip.callbacks.lightning.trainer import class_names
from lightning_lip.checks import check_state, check_type
from lightning_lip.metrics import NoisyMeanAbsoluteError, feature_ranges
from lightning_lip.metrics.noisy_mae import Range, check_feature_range

GIVE_RANGES = "pass feature_min and feature_max to NoisyValidation"


class NoisyValidation(BaseCallback):
    """Log the mean absolute error under uniform input noise as ``val/noisy_mae/eta=0.2`` and so on.

    Each validation batch is seen once more by the module's ``forward``, stacked over all noise levels (so with L times
    the memory of one batch), in the Trainer's precision; see :class:`~lightning_lip.metrics.NoisyMeanAbsoluteError`.
    The values are *estimates*: exact means over one draw of the noise, which is the same at every epoch (keep the
    validation loader unshuffled, so that it meets the same samples) and different on every rank. They are logged over
    all ranks, once a validation epoch, for EarlyStopping and ModelCheckpoint to monitor. With several validation
    loaders the names end with ``/dataloader_idx_0`` and so on, as Lightning's own do (with ``/dataloader_0`` where an
    older Lightning keeps that ending to itself). The sanity check runs the metric, but logs nothing.

    Training is left untouched: a run with the callback ends with bit-identical weights to one without. The global
    random generators are restored after the forward passes and after the pass over the training data.

    **Feature ranges.** Given as arguments, or learnt when ``fit`` starts, in one epoch of the training loader (with
    copies of its samplers and ``drop_last=False``) on the CPU, and reduced over ranks; ``fit`` learns them anew, unless
    a checkpoint that holds them was loaded. They are then in ``feature_min`` and ``feature_max``, and in checkpoints.
    The pass calls ``train_dataloader()`` once more, and does not see what ``on_after_batch_transfer`` does to a batch.
    A loader without a length is read up to ``limit_train_batches``, where that is an int. A dataset that keeps a random
    generator or a stream of its own moves on by one epoch in the pass: give the ranges there.

    Args:
        noise_levels: the levels eta of ``x + eta (x_max - x_min) u``: distinct, finite, not negative.
        feature_min: x_min, broadcastable to one sample's shape (*features). Learnt where both ends are None.
        feature_max: x_max, at least ``feature_min``.
        symmetric: draw u from U[-1, 1] instead of U[0, 1].
        seed: seed of the noise, a non-negative int.
        batch_to_xy: callable from a batch (training and validation) to ``(inputs, target)``, of shapes (B, *features)
            and (B, *outputs); needed where batches are no such pair. The target must have the shape of what ``forward``
            returns.
        prefix: first part of the logged names; two callbacks on one Trainer need different prefixes.

    Raises:
        TypeError: for a batch that is no ``(inputs, target)`` pair of tensors.
        ValueError: for noise levels or feature ranges other than stated above, NaN in the inputs, and predictions whose
            shape is not the target's.
        RuntimeError: where the ranges are neither given, nor loaded, nor can be learnt.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_lip import NoisyValidation
        >>> callback = NoisyValidation(noise_levels=(0.0, 0.2), feature_min=0.0, feature_max=1.0)
        >>> trainer = Trainer(callbacks=[callback], logger=False, enable_checkpointing=False)
        >>> callback.names
        ('val/noisy_mae/eta=0', 'val/noisy_mae/eta=0.2')
    """

    def __init__(
        self,
        noise_levels: Sequence[float] = (0.0, 0.2, 0.4, 0.6),
        feature_min: Range | None = None,
        feature_max: Range | None = None,
        symmetric: bool = False,
        seed: int = 0,
        batch_to_xy: BatchToXY | None = None,
        prefix: str = "val/noisy_mae",
    ) -> None:
        self._ranges_given = feature_min is not None or feature_max is not None
        # Stands in for the ranges to come, so that the other arguments are checked here and not in the first epoch.
        low, high = (feature_min, feature_max) if self._ranges_given else (0.0, 0.0)
        metric = NoisyMeanAbsoluteError(noise_levels, low, high, symmetric, seed)
        check_batch_to_xy(batch_to_xy)
        check_type("prefix", prefix, str, "a string")
        self.noise_levels = metric.noise_levels
        self.names = tuple(f"{prefix}/eta={eta:g}" for eta in self.noise_levels)
        if len(set(self.names)) != len(self.names):
            raise ValueError(
                f"expected noise levels that differ in their first six digits, got {self.noise_levels}, which would be "
                f"logged under the same name: {self.names}"
            )
        self.feature_min: Tensor | None = metric.feature_min if self._ranges_given else None
        self.feature_max: Tensor | None = metric.feature_max if self._ranges_given else None
        self.symmetric = symmetric
        self.seed = seed
        self.batch_to_xy = batch_to_xy
        self.prefix = prefix
        self._ranges_loaded = False
        self._metrics: list[NoisyMeanAbsoluteError] = []

    @property
    @override
    def state_key(self) -> str:
        return f"NoisyValidation[prefix={self.prefix!r}]"

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._ranges_given or self.feature_min is None:
            return {}
        return {"feature_min": self.feature_min, "feature_max": self.feature_max}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_type("state", state_dict, Mapping, "a mapping")
        if state_dict and not self._ranges_given:
            check_state(state_dict, ("feature_min", "feature_max"), "NoisyValidation")
            self.feature_min, self.feature_max = check_feature_range(
                state_dict["feature_min"], state_dict["feature_max"]
            )
            self._ranges_loaded = True

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._ranges_given or self._ranges_loaded:
            return
        with isolate_rng():
            batches = _training_batches(trainer)
            low, high = feature_ranges(unpack(batch, self.batch_to_xy)[0] for batch in batches)
        if trainer.world_size > 1:
            # One reduction for both ends: max(-x) = -min(x).
            ends = torch.stack([-low, high]).to(trainer.strategy.root_device)
            low_negated, high = trainer.strategy.reduce(ends, reduce_op="max").cpu()
            low = -low_negated
        self.feature_min, self.feature_max = low, high

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._ranges_loaded = False

    @override
    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.feature_min is None:
            raise RuntimeError(
                "no feature ranges: they are learnt from the training data when trainer.fit starts, or loaded from a "
                f"checkpoint of such a run; to validate without either, {GIVE_RANGES}"
            )
        self._metrics = [
            NoisyMeanAbsoluteError(self.noise_levels, self.feature_min, self.feature_max, self.symmetric, self.seed).to(
                pl_module.device
            )
            for _ in trainer.num_val_batches
        ]

    # Before the step: validation_step may change its batch in place.
    @override
    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        def predict(inputs: Tensor) -> Tensor:
            # A forward that draws random numbers must not shift those of training.
            with trainer.precision_plugin.forward_context(), isolate_rng():
                predictions: Tensor = pl_module(inputs)
            return predictions

        self._metrics[dataloader_idx].update(predict, *unpack(batch, self.batch_to_xy))

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics, self._metrics = self._metrics, []
        if trainer.sanity_checking:
            return
        # Over ranks, because compute() communicates and all must agree on which loaders had batches.
        counts = torch.tensor([metric.update_count for metric in metrics], device=pl_module.device)
        used = [index for index, count in enumerate(trainer.strategy.reduce(counts, reduce_op="sum").tolist()) if count]
        for index in used:
            suffix = f"/dataloader_idx_{index}" if len(used) > 1 else ""
            for name, value in zip(self.names, metrics[index].compute(), strict=True):
                # All ranks hold the same value. The maximum over ranks keeps it exactly; without sync_dist, Lightning
                # warns that values may differ.
                _log(pl_module, name, suffix, value)


def _log(pl_module: pl.LightningModule, name: str, suffix: str, value: Tensor) -> None:
    """Log a value that all ranks hold under its name with the validation loader's."""
    options: dict[str, Any] = {"sync_dist": True, "reduce_fx": "max", "add_dataloader_idx": False}
    try:
        pl_module.log(name + suffix, value, **options)
    except Exception as error:
        # By name: `lightning` and `pytorch_lightning` have a class each.
        if type(error).__name__ != "MisconfigurationException" or "dataloader_idx" not in str(error):
            raise
        pl_module.log(name + suffix.replace("dataloader_idx", "dataloader"), value, **options)


def _training_batches(trainer: pl.Trainer) -> Iterator[Any]:
    """One epoch of the training data, without a trace in the loader that training will use."""
    source = trainer.fit_loop._data_source
    if not source.is_defined():
        raise RuntimeError(f"the feature ranges cannot be learnt, there is no training data: {GIVE_RANGES}")
    # Not fit_loop.setup_data(): it makes the first epoch's iterator, and so draws training's random numbers too early.
    loader = source.dataloader()
    if isinstance(loader, DataLoader):
        loader = _replay(loader)
    elif (
        not isinstance(loader, Iterable)
        or isinstance(loader, dict | list | tuple)
        or "CombinedLoader" in class_names(loader)
    ):
        raise RuntimeError(
            f"the feature ranges can be learnt from one training loader only, got a {type(loader).__name__}: "
            f"{GIVE_RANGES}"
        )
    elif isinstance(loader, Iterator):
        raise RuntimeError(
            f"the training data is an iterator ({type(loader).__name__}), which a pass to learn the feature ranges "
            f"would use up: {GIVE_RANGES}"
        )
    limit = trainer.limit_train_batches
    fast_dev_run = trainer.fast_dev_run  # type: ignore[attr-defined]  # Lightning sets it from outside the class
    limited = isinstance(limit, int) and (fast_dev_run or sized_len(loader) is None)
    return islice(loader, int(limit) if limited else None)


def _replay(loader: DataLoader[Any]) -> DataLoader[Any]:
    """A loader of the same batches, which shares neither samplers nor generators nor workers with ``loader``."""
    options: dict[str, Any] = {
        "collate_fn": loader.collate_fn,
        "num_workers": loader.num_workers,
        "multiprocessing_context": loader.multiprocessing_context,
        "worker_init_fn": loader.worker_init_fn,
        "timeout": loader.timeout,
    }
    if isinstance(loader.dataset, IterableDataset):
        return DataLoader(loader.dataset, batch_size=loader.batch_size, **options)
    sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    try:
        # Samplers hold the dataset: it is shared, not copied.
        sampler = copy.deepcopy(sampler, {id(loader.dataset): loader.dataset})
    except TypeError as error:
        raise RuntimeError(
            f"the feature ranges cannot be learnt, the sampler {type(sampler).__name__} cannot be copied: {GIVE_RANGES}"
        ) from error
    if isinstance(sampler, BatchSampler):
        sampler.drop_last = False
    if loader.batch_sampler is None:
        return DataLoader(loader.dataset, batch_size=None, sampler=sampler, **options)
    return DataLoader(loader.dataset, batch_sampler=sampler, **options)
