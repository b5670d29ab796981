"""What the callbacks add to a Trainer's step, on the paper's network.

``python -m lightning_lip.bench.studies.callbacks [--quick] [--output FOLDER]`` trains the MLP 13-20-20-20-1 at batch 50
with Adam on one thread. Trainings that are set up apart differ by several percent for no visible reason (where their
memory lies, among others), which is as much as the callbacks take. So each comparison is *one* training, whose Trainer
has the callback in its list for a block of steps and not for the next: model, data, optimiser, loggers and everything
else are the same objects. It is repeated in fresh processes. An interrupted run goes on where it was.

It writes ``callbacks.csv``. A row holds the microseconds of CPU time a step, without and with the callback, and the
ratio of neighbouring blocks: of each the median, the 20th and the 80th percentile over all blocks of all processes; and
the lowest and highest of the processes' median ratios. CPU time is summed over all threads of the process, and other
work on the machine hardly changes it.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_lip import LipschitzMonitor, LipschitzPenalty
from lightning_lip.bench.contenders.models import mlp
from lightning_lip.bench.studies.options import run_process, study_parser
from lightning_lip.reporting.documents import machine, versions, write_csv
from lightning_lip.reporting.failures import told_in_one_line
from lightning_lip.reporting.finished import Finished

BLOCK = 50  # steps, one default logging interval: every block with a logger holds one logging step


@dataclass(frozen=True)
class Comparison:
    """A Trainer, and the callback whose cost is asked for.

    Attributes:
        trainer: What is trained, in words.
        callback: Makes the callback that comes and goes.
        always: Makes the callbacks that are there in every block.
        tensorboard: Whether there is a TensorBoard logger; ``logger=False`` otherwise.
        bare: Whether Trainer's progress bar, checkpoints and summary are off, which leaves the fastest step there is.
    """

    trainer: str
    callback: Callable[[], pl.Callback]
    always: Callable[[], list[pl.Callback]] = list
    tensorboard: bool = False
    bare: bool = True


def _penalty() -> LipschitzPenalty:
    return LipschitzPenalty(1e-3)


COMPARISONS = {
    "penalty": Comparison("logger=False", _penalty, bare=False),
    "penalty, bare Trainer": Comparison("logger=False, no progress bar, no checkpoints", _penalty),
    "empty callback, bare Trainer": Comparison("logger=False, no progress bar, no checkpoints", pl.Callback),
    "monitor": Comparison(
        "TensorBoard, penalty, no progress bar, no checkpoints", LipschitzMonitor, lambda: [_penalty()], True
    ),
}


class Regressor(pl.LightningModule):
    """The paper's network."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = mlp(13, 20, 20, 20, 1)

    @override
    def training_step(self, batch: Any) -> torch.Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-3)


class ComesAndGoes(pl.Callback):
    """Takes a callback out of the Trainer's list for some blocks of steps, puts it back for others, and times both."""

    def __init__(self, callback: pl.Callback) -> None:
        self.callback = callback
        self.times: dict[bool, list[float]] = {False: [], True: []}
        self.start = 0.0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start = time.process_time()

    @override
    def on_train_batch_end(
        self, trainer: Any, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Last in the list of callbacks: only Lightning's own end of this step is still to come.
        if trainer.fit_loop.epoch_loop._batches_that_stepped % BLOCK != BLOCK - 1:
            return
        is_there = self.callback in trainer.callbacks
        self.times[is_there].append((time.process_time() - self.start) / BLOCK * 1e6)
        # A new list, since Lightning is going through the old one. The order is with, without, without, with.
        comes = sum(map(len, self.times.values())) % 4 in (0, 3)
        others = [c for c in trainer.callbacks if c is not self.callback]
        trainer.callbacks = [*others[:-1], self.callback, others[-1]] if comes else others
        self.start = time.process_time()


def measure(comparison: Comparison, blocks: int) -> dict[bool, list[float]]:
    """Return the microseconds a step in blocks without (False) and with the callback, `blocks` of each, in pairs."""
    # An odd number of blocks an epoch, so that an epoch ends in a block of either kind equally often.
    x = torch.randn(BLOCK * 50 * 21, 13, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(x, x.sin().sum(1, keepdim=True)), batch_size=50)
    switch = ComesAndGoes(comparison.callback())
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            # The first four blocks start kernels and loggers.
            max_steps=BLOCK * (2 * blocks + 4),
            max_epochs=-1,
            default_root_dir=folder,
            logger=TensorBoardLogger(folder) if comparison.tensorboard else False,
            # The callback is there when training starts, and selects its layers.
            callbacks=[*comparison.always(), switch.callback, switch],
            enable_model_summary=False,
            enable_progress_bar=not comparison.bare,
            enable_checkpointing=not comparison.bare,
        )
        trainer.fit(Regressor(), loader)
    return {is_there: times[2:] for is_there, times in switch.times.items()}


def _in_a_process(name: str, blocks: int) -> list[list[float]]:
    """Return what :func:`measure` returns in a fresh process, without and with the callback."""
    command = [sys.executable, "-m", "lightning_lip.bench.studies.callbacks", "--worker", name, "--blocks", str(blocks)]
    times: list[list[float]] = json.loads(run_process(command).splitlines()[-1])
    return times


def _work(name: str, blocks: int) -> None:
    torch.set_num_threads(1)
    for logger in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    times = measure(COMPARISONS[name], blocks)
    print("\n" + json.dumps([times[False], times[True]]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, write the CSV."""
    parser = study_parser(__doc__, quick="2 processes of 10 blocks instead of 8 of 40")
    parser.add_argument("--blocks", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=COMPARISONS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        _work(options.worker, options.blocks)
        return
    n_processes, blocks = (2, 10) if options.quick else (8, 40)
    versions_used = versions("numba", "numpy")
    finished = Finished(options.output / "callbacks.partial.jsonl", (options.quick, versions_used), list)
    runs: dict[str, list[np.ndarray]] = {name: [] for name in COMPARISONS}
    for index in range(n_processes):  # in turn, so that a busy spell falls on all
        for name, done in runs.items():
            done.append(np.array(finished.once((index, name), partial(_in_a_process, name, blocks))))
    spread = [f"{what}_{p}" for what in ("without_us", "with_us", "ratio") for p in ("p20", "p50", "p80")]
    columns = ["callback", "trainer", "processes", "blocks", *spread, "lowest_median_ratio", "highest_median_ratio"]
    rows = []
    for name, done in runs.items():
        without, with_it = np.concatenate(done, axis=1)
        us = [*np.percentile(without, [20, 50, 80]), *np.percentile(with_it, [20, 50, 80])]
        medians = [np.median(times[1] / times[0]) for times in done]
        ratios = [*np.percentile(with_it / without, [20, 50, 80]), min(medians), max(medians)]
        figures = [*(f"{x:.1f}" for x in us), *(f"{x:.4f}" for x in ratios)]
        rows.append([name, COMPARISONS[name].trainer, len(done), len(without), *figures])
        p20, p50, p80, least, most = figures[6:]
        print(f"{name:30} {us[1]:6.0f} us + {us[4] - us[1]:4.0f}  ratio {p50} ({p20} to {p80}; {least} to {most})")
    write_csv(options.output / "callbacks.csv", columns, rows, machine() | versions_used)
    finished.remove()


if __name__ == "__main__":
    with told_in_one_line("callbacks"):
        main()
