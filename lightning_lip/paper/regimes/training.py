"""One run of the experiment: Lightning's Trainer with the package's callbacks, and what is kept of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, TensorDataset
from typing_extensions import override

from lightning_lip.callbacks import LipschitzMonitor, LipschitzPenalty, MaxNorm, NoisyValidation
from lightning_lip.paper.data import Dataset, Split, batches, split, tensor
from lightning_lip.paper.model import PaperRegressor
from lightning_lip.paper.regimes.settings import MAX_NORM, Record, Run
from lightning_lip.paper.settings import BATCH_SIZE, NOISE_LEVELS, validation_key
from lightning_lip.reporting.documents import remove_events, replacing
from lightning_lip.reporting.messages import quiet
from lightning_lip.reporting.processes import one_thread

PICTURES = 10
"""How often a logged run draws the heat map of its spectral norms."""


class History(Callback):
    """Keep the training MAE and MSE and the validation MAE at each noise level, once per epoch.

    Args:
        inputs: The training inputs (n, features).
        target: The training target (n, 1).
    """

    def __init__(self, inputs: Tensor, target: Tensor) -> None:
        self._inputs = inputs
        self._target = target
        self.series: dict[str, list[float]] = {"train_mae": [], "train_mse": []}
        self.series.update({validation_key(level): [] for level in NOISE_LEVELS})

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # One forward over all training rows: a mean over the epoch's batches would mix 9 sets of weights
        # and could not be compared with the validation, which sees the last.
        with torch.no_grad():
            error = pl_module(self._inputs) - self._target
        values = {"train_mae": error.abs().mean(), "train_mse": error.square().mean()}
        if trainer.loggers:
            pl_module.log_dict({"train/mae": values["train_mae"], "train/mse": values["train_mse"]})
        for name, value in values.items():
            self.series[name].append(float(value))
        for level in NOISE_LEVELS:
            metric = trainer.callback_metrics[f"val/noisy_mae/eta={level:g}"]
            self.series[validation_key(level)].append(float(metric))


class _Batches(Sampler[Tensor]):
    """Row numbers in random order, a batch at a time: with `batch_size=None` a batch is one indexing operation."""

    def __init__(self, n_rows: int, seed: int) -> None:
        self._n_rows = n_rows
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return math.ceil(self._n_rows / BATCH_SIZE)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(batches(self._n_rows, self._generator))


def train(run: Run, data: Dataset, out: str | None = None) -> Record:
    """Train one run and return what it gave.

    The record depends on `run` and `data` only: split, initialisation, order of the batches, noise and
    the penalty's start all come from `run.seed`, so that the regimes of one seed are paired.

    Args:
        run: What to train.
        data: The data set.
        out: Where to leave a TensorBoard log with `LipschitzMonitor` and a checkpoint, at the places that
            `artefacts_of` names; None for neither. Leaving them does not change the record.

    Raises:
        FloatingPointError: If the run ends with an error that is not finite.
    """
    with one_thread(), quiet():
        return _train(run, split(data, run.seed, run.scaling), out)


def artefacts_of(run: Run) -> dict[str, str]:
    """Return where `train` leaves the checkpoint and the TensorBoard log of a run, relative to its `out`."""
    return {"checkpoint": f"checkpoints/{run.regime}.ckpt", "tensorboard": f"tensorboard/{run.regime}"}


def _train(run: Run, parts: Split, out: str | None) -> Record:
    train_inputs, train_target = tensor(parts.train_inputs), tensor(parts.train_target)[:, None]
    train_rows = _Batches(len(train_inputs), run.seed)
    train_loader = DataLoader(TensorDataset(train_inputs, train_target), sampler=train_rows, batch_size=None)
    # One batch of all rows.
    validation = TensorDataset(tensor(parts.validation_inputs)[None], tensor(parts.validation_target)[None, :, None])

    model = PaperRegressor(in_features=train_inputs.shape[1], seed=run.seed)
    history = History(train_inputs, train_target)
    noisy = NoisyValidation(
        noise_levels=NOISE_LEVELS,
        feature_min=tensor(parts.feature_min),
        feature_max=tensor(parts.feature_max),
        seed=run.seed,
    )
    regularisers = _regularisers(run)
    callbacks: list[Callback] = [*regularisers, noisy, history]
    logger: TensorBoardLogger | bool = False
    if out is not None:
        # At every epoch the pictures would take eight times the training.
        callbacks.append(LipschitzMonitor(figures_every_n_epochs=math.ceil(run.epochs / PICTURES)))
        log = Path(out) / artefacts_of(run)["tensorboard"]
        remove_events(log)
        logger = TensorBoardLogger(log.parent, name="", version=log.name)
    trainer = pl.Trainer(
        max_epochs=run.epochs,
        accelerator="cpu",
        devices=1,
        callbacks=callbacks,
        logger=logger,
        log_every_n_steps=len(train_loader),
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, train_loader, DataLoader(validation, batch_size=None))
    if out is not None:
        with replacing(Path(out) / artefacts_of(run)["checkpoint"]) as beside:
            trainer.save_checkpoint(beside)
    record = _record(run, model, history, regularisers)
    if not all(math.isfinite(series[-1]) for series in record.history.values()):
        raise FloatingPointError(f"The training of {run} ended with an error that is not finite.")
    return record


def _regularisers(run: Run) -> list[Callback]:
    """Return the callbacks of the regime: the loss MSE + lambda prod ||W|| is lambda times the paper's."""
    if run.regime == "none":
        return []
    if run.regime == "maxnorm":
        return [MaxNorm(MAX_NORM)]
    return [
        LipschitzPenalty(
            coefficient=run.coefficient,
            penalty="product" if run.regime == "product" else "layer_sum",
            layers=[f"net.{2 * layer}" for layer in range(run.n_norms)],
            seed=run.seed,
            knee=None,  # the paper's plain product
        )
    ]


def _record(run: Run, model: PaperRegressor, history: History, regularisers: list[Callback]) -> Record:
    weights = [m.weight.detach().double() for m in model.net if isinstance(m, nn.Linear)]
    return Record(
        run=run,
        history=history.series,
        sigmas=tuple(float(torch.linalg.matrix_norm(weight, 2)) for weight in weights),
        largest_unit_norm=max(float(weight.norm(dim=1).max()) for weight in weights),
        n_clipped=sum(r.n_clipped for r in regularisers if isinstance(r, MaxNorm)),
    )
