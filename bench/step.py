"""What the callbacks add to a Trainer's step, on the paper's network.

``python -m bench.step [--quick] [--output FOLDER]`` trains the MLP 13-20-20-20-1 at batch 50 with Adam on one thread in
seven configurations, interleaved step by step: each is a Trainer in a thread of its own, of which one runs at a time.
It writes ``step.csv``: medians with the 20th and 80th percentiles of the time from one step to the next, in
microseconds of this process's CPU, and the median over rounds of the ratio to the configuration without the callback.
"""

from __future__ import annotations

import argparse
import csv
import logging
import tempfile
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from bench.kernels import machine
from lightning_lip import LipschitzMonitor, LipschitzPenalty

# configuration -> the one that it is compared with
BASES = {
    "Trainer": "Trainer",
    "Trainer, empty callback": "Trainer",
    "Trainer, penalty": "Trainer",
    "TensorBoard": "TensorBoard",
    "TensorBoard, penalty": "TensorBoard",
    "TensorBoard, penalty, monitor": "TensorBoard, penalty",
    "TensorBoard, monitor": "TensorBoard",
}
BLOCK = 50  # steps in a turn, one logging interval, so that every turn of a configuration holds one logging step


class Regressor(pl.LightningModule):
    """The paper's network."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = [(13, 20), (20, 20), (20, 20)]
        hidden = [layer for m, n in sizes for layer in (nn.Linear(m, n), nn.ReLU())]
        self.net = nn.Sequential(*hidden, nn.Linear(20, 1))

    @override
    def training_step(self, batch: Any) -> torch.Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-3)


class Turns(pl.Callback):
    """Lets one Trainer at a time run for a block of steps, and times the block."""

    def __init__(self, mine: threading.Semaphore, finished: threading.Semaphore) -> None:
        self.mine, self.finished = mine, finished
        self.times: list[float] = []
        self.start = 0.0

    @override
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % BLOCK == 0:
            if trainer.global_step:
                self.times.append((time.thread_time() - self.start) / BLOCK * 1e6)
            self.finished.release()
            self.mine.acquire()
            self.start = time.thread_time()


def trainer_for(name: str, turns: Turns, folder: str, n_steps: int) -> pl.Trainer:
    """Return a Trainer of one configuration that stops after `n_steps`."""
    callbacks: list[pl.Callback] = [turns]
    if "empty callback" in name:  # what Lightning itself takes to call the hooks of any callback
        callbacks.append(pl.Callback())
    if "penalty" in name:
        callbacks.append(LipschitzPenalty(1e-3))
    if "monitor" in name:
        callbacks.append(LipschitzMonitor())
    return pl.Trainer(
        accelerator="cpu",
        max_steps=n_steps,
        max_epochs=-1,
        logger=TensorBoardLogger(folder, name=name) if "TensorBoard" in name else False,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def measure(rounds: int) -> dict[str, np.ndarray]:
    """Return the microseconds a step of each configuration, by round."""
    # One epoch of 1000 batches: the default logging interval of 50 steps, a heat map each epoch.
    x = torch.randn(50_000, 13, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(x, x.sin().sum(1, keepdim=True))
    finished = threading.Semaphore(0)
    turns = {name: Turns(threading.Semaphore(0), finished) for name in BASES}
    with tempfile.TemporaryDirectory() as folder:
        threads = []
        for name, turn in turns.items():
            # The first block starts kernels and loggers; the last one is cut off by the end of training.
            trainer = trainer_for(name, turn, folder, (rounds + 2) * BLOCK)
            loader = DataLoader(data, batch_size=50)
            threads.append(threading.Thread(target=trainer.fit, args=(Regressor(), loader), daemon=True))
            threads[-1].start()
            finished.acquire()
        for _ in range(rounds + 1):
            for turn in turns.values():
                turn.mine.release()
                finished.acquire()
        for turn, thread in zip(turns.values(), threads, strict=True):
            turn.mine.release()
            thread.join()
    return {name: np.array(turn.times[1 : rounds + 1]) for name, turn in turns.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20 rounds instead of 200")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    times = measure(20 if options.quick else 200)
    options.output.mkdir(parents=True, exist_ok=True)
    with (options.output / "step.csv").open("w", newline="") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in machine().items())
        writer = csv.writer(file)
        writer.writerow(["configuration", "p20_us", "median_us", "p80_us", "compared_with", "median_ratio"])
        for name, base in BASES.items():
            p20, median, p80 = np.percentile(times[name], [20, 50, 80])
            ratio = np.median(times[name] / times[base])
            writer.writerow([name, f"{p20:.1f}", f"{median:.1f}", f"{p80:.1f}", base, f"{ratio:.3f}"])
            print(f"{name:32} {p20:8.1f} {median:8.1f} {p80:8.1f}   {ratio:.3f} of {base}")


if __name__ == "__main__":
    main()
