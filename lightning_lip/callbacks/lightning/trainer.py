"""What the callbacks ask of a Trainer, of either Lightning package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lip.operators.selection import Selection

_UNSUPPORTED_STRATEGIES = {
    "DeepSpeedStrategy": "the DeepSpeed engine owns the gradients",
    "FSDPStrategy": "FSDP1 keeps weights as flat shards that straddle layers; ModelParallelStrategy (FSDP2) does not",
}


def class_names(instance: object) -> set[str]:
    """Return the names of an object's classes: those of the two Lightning packages differ, their names do not."""
    return {cls.__name__ for cls in type(instance).__mro__}


def refuse_strategy(trainer: Any, callback: object) -> None:
    """Refuse the strategies under which a callback cannot reach weights and gradients.

    Raises:
        RuntimeError: Naming the strategy and what to do.
    """
    for name in class_names(trainer.strategy) & set(_UNSUPPORTED_STRATEGIES):
        raise RuntimeError(
            f"{type(callback).__name__} does not support {name}: {_UNSUPPORTED_STRATEGIES[name]}. Use DDP or a single "
            "device, or remove the callback."
        )


def has_callback(trainer: Any, name: str) -> bool:
    """Whether one of the trainer's callbacks is of the class of this name."""
    return any(name in class_names(callback) for callback in trainer.callbacks)


def monitors_of(trainer: Any) -> list[Any]:
    """Return the trainer's :class:`LipschitzMonitor` callbacks."""
    return [callback for callback in trainer.callbacks if "LipschitzMonitor" in class_names(callback)]


def is_logging_step(trainer: Any) -> bool:
    """Whether Lightning itself logs at the end of this training batch (an optimiser step, every n-th of them)."""
    # The cheap check that answers most steps comes first: every callback asks this at every step.
    every = trainer.log_every_n_steps
    if not every or ((logging_step(trainer) + 1) % every and not trainer.should_stop):
        return False
    return not trainer.fit_loop._should_accumulate()


def is_end_or_logging_step(trainer: Any) -> bool:
    """Whether loggers or the end of the epoch will read metrics at the end of this training batch, asked within it."""
    if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
        return True
    return bool(trainer.loggers) and is_logging_step(trainer)


def batches_begun(trainer: Any) -> int:
    """Return how many training batches have begun, the present one included: it tells batches apart."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.ready)


def logging_step(trainer: Any) -> int:
    """Return the x-axis that Lightning gives to metrics: batches that stepped, whatever the number of optimisers."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def log_to_loggers(trainer: Any, metrics: Mapping[str, float], step: int | None = None) -> None:
    """Hand metrics to every logger, at `step` or the present one: `pl_module.log` costs a quarter of a ms each."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=logging_step(trainer) if step is None else step)


def monitored_metrics(trainer: Any) -> list[str]:
    """Return the metrics that are watched by callbacks (``EarlyStopping``, ``ModelCheckpoint``) or schedulers."""
    watching = [*trainer.callbacks, *trainer.lr_scheduler_configs]
    names = (getattr(one, "monitor", None) for one in watching)
    return list(dict.fromkeys(name for name in names if isinstance(name, str)))


def refuse_other_kind(trainer: Any, tag: str, kind: str) -> None:
    """Refuse a callback or scheduler that needs ``<tag>/bound`` where ``<tag>/product`` is logged, or the reverse.

    Lightning would end the training at the first look at it.

    Args:
        trainer: The Trainer.
        tag: The prefix of the logged names.
        kind: What is logged, ``"bound"`` or ``"product"``.

    Raises:
        RuntimeError: Naming who watches it, and what to watch instead.
    """
    wanted = f"{tag}/{'product' if kind == 'bound' else 'bound'}"
    watching = [*trainer.callbacks, *trainer.lr_scheduler_configs]
    names = [
        type(one).__name__
        for one in watching
        if getattr(one, "monitor", None) == wanted and getattr(one, "strict", True)
    ]
    if names:
        why = "the network's graph was traced" if kind == "bound" else "no graph of the network was traced, or could be"
        raise RuntimeError(
            f"Monitored by {' and '.join(names)}: {wanted!r}, which this training does not log. Use "
            f"monitor='{tag}/{kind}', since {why}."
        )


def is_watched_within_epochs(trainer: Any, *tags: str) -> bool:
    """Whether something reads metrics ``<tag>/...`` before the end of an epoch.

    ``EarlyStopping`` and ``ModelCheckpoint`` read them at validations within an epoch; checkpoints every so many steps
    or minutes, and schedulers with ``interval="step"``, at any step.
    """
    prefixes = tuple(f"{tag}/" for tag in tags)
    watching = [one for one in (*trainer.callbacks, *trainer.lr_scheduler_configs) if _is_of(one, prefixes)]
    if not watching:
        return False
    return trainer.val_check_batch != trainer.num_training_batches or any(
        getattr(one, "_every_n_train_steps", 0)
        or getattr(one, "_train_time_interval", None) is not None
        or getattr(one, "interval", "epoch") == "step"
        for one in watching
    )


def _is_of(watching: Any, prefixes: tuple[str, ...]) -> bool:
    monitor = getattr(watching, "monitor", None)
    return isinstance(monitor, str) and monitor.startswith(prefixes)


def is_read(trainer: Any, is_watched: bool, *tags: str) -> bool:
    """Whether anyone reads the metrics ``<tag>/...`` at the end of this training batch, so that they must be computed.

    Loggers read them on logging steps, ``callback_metrics`` holds them at the end of an epoch, and what watches a
    metric reads it at every optimiser step if `is_watched`, the answer of :func:`is_watched_within_epochs`. The result
    is the same on every rank.
    """
    if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
        return True
    if is_watched:
        return not trainer.fit_loop._should_accumulate()
    if not is_logging_step(trainer):
        return False
    return bool(trainer.loggers) or any(
        name.startswith(tuple(f"{tag}/" for tag in tags)) for name in monitored_metrics(trainer)
    )


def log_to_trainer(trainer: Any, pl_module: Any, metrics: Mapping[str, float]) -> None:
    """Put metrics into the trainer's ``callback_metrics``, at the end of an epoch or whenever one of them is watched.

    ``log_dict`` costs half a millisecond, as much as the training step of a small network.
    """
    if trainer.is_last_batch or not metrics.keys().isdisjoint(monitored_metrics(trainer)):
        pl_module.log_dict(metrics, logger=False)


def log_metrics(trainer: Any, pl_module: Any, metrics: Mapping[str, float]) -> None:
    """Hand metrics to every logger on logging steps, and to the trainer as :func:`log_to_trainer` does."""
    if is_logging_step(trainer):
        log_to_loggers(trainer, metrics)
    log_to_trainer(trainer, pl_module, metrics)


def has_tensorboard(trainer: Any) -> bool:
    """Whether the trainer has a TensorBoard logger: the same on every rank."""
    return any("TensorBoardLogger" in class_names(logger) for logger in trainer.loggers)


def tensorboard_writers(trainer: Any) -> list[Any]:
    """Return the SummaryWriters of the trainer's TensorBoard loggers; empty on other ranks than the first."""
    if not trainer.is_global_zero:
        return []
    return [logger.experiment for logger in trainer.loggers if "TensorBoardLogger" in class_names(logger)]


def gradient_scale(trainer: Any, optimizer: Optimizer) -> float | Tensor:
    """Return the factor that this optimiser's gradients are still scaled by: fused optimisers unscale in their step."""
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not scaler.is_enabled():
        return 1.0
    scale: Tensor | None = scaler._scale
    return 1.0 if scale is None else scale


def selection_text(selection: Selection | None) -> str:
    """Return a selection of layers as text: names and patterns as they are, a submodule by its type."""
    if selection is None or isinstance(selection, str):
        return selection or ""
    if isinstance(selection, type):
        return selection.__name__
    if isinstance(selection, nn.Module):
        return type(selection).__name__
    return ", ".join(selection_text(item) for item in selection)
