"""TensorBoard's HPARAMS tab: the penalties' arguments beside the user's own hyperparameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lightning.fabric.utilities.logger import _convert_params, _flatten_dict, _sanitize_params

from lightning_lip.callbacks.lightning.trainer import tensorboard_writers


def _hparams() -> Callable[..., tuple[Any, Any, Any]]:
    """Return what makes the entries; TensorBoard is imported when a run has a logger for it, and no earlier."""
    from torch.utils.tensorboard.summary import hparams

    return hparams


def start_session(trainer: Any, pl_module: Any, arguments: Mapping[str, Any], metrics: Iterable[str]) -> None:
    """Write the hyperparameters of a run, to TensorBoard loggers only.

    Call it in ``setup``: TensorBoard keeps a run's first entry only, which must hold both, and Lightning writes the
    user's own hyperparameters right after ``setup``. The entry goes to the event file alone: ``logger.log_hyperparams``
    would also put `arguments` in ``hparams.yaml``, from which modules are built.

    Args:
        trainer: The trainer.
        pl_module: The module; what it and the datamodule saved with ``save_hyperparameters`` is written as well.
        arguments: The penalties' arguments, by the names to be shown; None for an argument without a value in this run.
            It has a column all the same, because TensorBoard takes the columns of all runs from one of them.
        metrics: Tags of the scalars to show beside them; TensorBoard takes the last value of each.
    """
    writers = tensorboard_writers(trainer)
    if not writers:
        return
    saved: dict[str, Any] = {}
    for owner in (pl_module, trainer.datamodule):
        if owner is not None and owner._log_hyperparams:
            saved |= {key: value for key, value in owner.hparams_initial.items() if key != "_class_path"}
    saved = _sanitize_params(_flatten_dict(_convert_params(saved)))
    columns = {name: 0.0 if value is None else value for name, value in arguments.items()}
    hparams = _hparams()
    experiment, _, _ = hparams({**saved, **columns}, dict.fromkeys(metrics, 0.0))
    _, start, _ = hparams({**saved, **arguments}, {})
    for writer in writers:
        for summary in (experiment, start):
            writer._get_file_writer().add_summary(summary)


def end_session(trainer: Any) -> None:
    """Mark a run in the HPARAMS tab as ended with success."""
    _, _, end = _hparams()({}, {})
    for writer in tensorboard_writers(trainer):
        writer._get_file_writer().add_summary(end)
