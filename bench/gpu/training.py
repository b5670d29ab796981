"""Whole training steps under Lightning's Trainer, and its strategies on a GPU."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_lip import LipschitzMonitor, LipschitzPenalty
from lightning_lip.bench.contenders.models import MODELS, BenchModel, gpt2_blocks, mlp
from lightning_lip.bench.contenders.peers import penalty, plain, task_of
from lightning_lip.bench.contenders.training import Training, fit
from lightning_lip.bench.gpu.kernels import BLOCK_SIZES
from lightning_lip.bench.gpu.measuring import DEVICE, DRY, record
from lightning_lip.bench.steps.measure import N_BEFORE, PLAIN, in_turn, percentiles

WHOLE = MODELS | {
    "gpt2-12": BenchModel("GPT-2 small", lambda: gpt2_blocks(12), (512, 768), 8, pattern="*.mlp.*"),
}


def steps(name: str, precision: str) -> None:
    """Time whole steps without and with the penalty, in turn, and the penalty's own time on the device."""
    task, batch = task_of(WHOLE[name], DEVICE)
    contenders = {PLAIN: plain(task)} | {f"r={r}": penalty(r)(task) for r in BLOCK_SIZES}
    first = {}
    for key, contender in contenders.items():
        first[key] = fit(contender.training, contender.callbacks, batch, N_BEFORE, 1, precision)
    times = in_turn(contenders, first, batch, 0.0 if DRY else 12.0, precision)
    record(
        model=name,
        precision=precision,
        ms={key: [round(1e3 * s, 4) for s in percentiles(found.steps)] for key, found in times.items()},
        own_ms={key: round(1e3 * percentiles(found.own)[1], 4) for key, found in times.items() if found.own},
    )


def strategy(name: str, precision: Any) -> None:
    """Train with the penalty and the monitor in one process under a strategy: under DDP over NCCL, gloo on a CPU."""
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (torch.randn(64, n, generator=generator) for n in (13, 1))
    callback = LipschitzPenalty(1e-3)
    trainer = pl.Trainer(
        accelerator="cpu" if DRY else "gpu",
        devices=1,
        strategy=name,
        precision=precision,
        max_epochs=1 if DRY else 10,
        log_every_n_steps=1,
        logger=False,
        callbacks=[callback, LipschitzMonitor()],
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(Training(mlp(13, 64, 64, 1), classes=False), DataLoader(TensorDataset(inputs, targets), batch_size=32))
    found = {key: float(value) for key, value in trainer.callback_metrics.items()}
    record(strategy=name, precision=precision, product=float(callback.regularizer.bound()), metrics=found)
