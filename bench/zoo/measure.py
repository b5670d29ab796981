"""One model of the zoo: trained without the callbacks and with them, then traced."""

from __future__ import annotations

import logging
import math
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_lip import LipschitzMonitor, LipschitzPenalty, LipschitzRegularizer
from lightning_lip.bench.zoo.entry import Batch, Entry

STEPS = 20
NUDGES = 3
ITERATIONS = 20
"""Of the block iteration, before a traced bound is read."""

OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
}

FACTOR, SLACK = 2.0, 0.1
"""A loss with the callbacks may be this many times the loss without, plus this."""


@dataclass
class Row:
    """What is known of a model; what was not reached is empty.

    Attributes:
        name: Of the entry.
        parameters: Their number.
        layers: The covered layers by type, as text.
        covered: The number of parameters in covered layers.
        left_out: The layers that are left out, by type, as text.
        start: The loss before training.
        losses: After 20 steps, by optimiser, without and with the callbacks; NaN where it is not finite.
        nudged: Where the training with the callbacks ended too high, by optimiser: the losses of trainings without them
            from weights changed by a millionth.
        products: The product of the covered norms (log10), by optimiser, at the end without and with.
        seconds: Of the trainings, by optimiser, without and with.
        warnings: What the callbacks warned of.
        log10_bound: Of the traced network with its first weights.
        refusals: Why there is no traced bound: operations with their reason, and how often.
        stage: What was going on, "" at the end.
        error: What ended it before.
    """

    name: str
    parameters: int = 0
    layers: str = ""
    covered: int = 0
    left_out: str = ""
    start: float = 0.0
    losses: dict[str, list[float]] = field(default_factory=dict)
    nudged: dict[str, list[float]] = field(default_factory=dict)
    products: dict[str, list[float]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    log10_bound: float | None = None
    refusals: dict[str, int] = field(default_factory=dict)
    stage: str = ""
    error: str = ""

    @property
    def package(self) -> str:
        """The package that the model is from."""
        return self.name.partition("/")[0]

    @property
    def share(self) -> float:
        """The part of the parameters that covered layers hold."""
        return self.covered / self.parameters if self.parameters else 0.0

    def within(self, optimizer: str) -> bool:
        """Whether both trainings ran, and the one with the callbacks ended near enough."""
        losses = self.losses.get(optimizer, [])
        return len(losses) == 2 and losses[1] <= FACTOR * losses[0] + SLACK

    def unstable(self, optimizer: str) -> bool:
        """Whether a training without the callbacks ends as much too high from weights changed by a millionth."""
        nudged = self.nudged.get(optimizer, [])
        return bool(nudged) and not max(nudged) <= FACTOR * self.losses[optimizer][0] + SLACK

    def kept(self, optimizer: str) -> float | None:
        """How much of the decrease of the loss without the callbacks there is with them; None where it is below 1%."""
        losses = self.losses.get(optimizer, [])
        if len(losses) < 2 or not self.start - losses[0] > 0.01 * self.start:
            return None
        return (self.start - losses[1]) / (self.start - losses[0])

    @property
    def holds(self) -> bool:
        """Whether everything ran, and no loss suffered."""
        return not self.error and all(self.within(optimizer) for optimizer in OPTIMIZERS)


class Repeated(Dataset[Batch]):
    """A batch, 20 times."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, index: int) -> Batch:
        return self._batch


class Module(pl.LightningModule):
    """A model of the zoo as a LightningModule that knows nothing of the callbacks."""

    def __init__(self, entry: Entry, optimizer: str) -> None:
        super().__init__()
        self.entry, self.optimizer = entry, optimizer
        torch.manual_seed(0)
        self.model = entry.build()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of the one batch."""
        return self.entry.loss(self.model, batch)

    def loss(self, batch: Batch) -> float:
        """Return the loss now, with the same random numbers each time.

        In training mode: the running statistics of batch normalisation are not there yet after 20 steps.
        """
        self.train()
        torch.manual_seed(3)
        with torch.no_grad():
            return float(self.entry.loss(self.model, batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimiser by its name."""
        return OPTIMIZERS[self.optimizer](self.parameters())


def measure(entry: Entry) -> Iterator[Row]:
    """Train and trace a model; yield the same row after every stage, so that a crash leaves what was known."""
    row = Row(entry.name, stage="build")
    yield row
    batch = entry.batch()
    module = Module(entry, "sgd")
    row.parameters = sum(p.numel() for p in module.parameters())
    row.start = module.loss(batch)
    for optimizer in OPTIMIZERS:
        for with_callbacks in (False, True):
            row.stage = f"{optimizer} {'with' if with_callbacks else 'without'} the callbacks"
            yield row
            _compare(entry, batch, optimizer, with_callbacks, row)
        if not row.within(optimizer):
            row.stage = f"{optimizer} without the callbacks, nudged"
            yield row
            row.nudged[optimizer] = [_nudged(entry, batch, optimizer, seed) for seed in range(NUDGES)]
    row.stage = "trace"
    yield row
    trace(entry, batch, row)
    row.stage = ""
    yield row


def _compare(entry: Entry, batch: Batch, optimizer: str, with_callbacks: bool, row: Row) -> None:
    """Train, and add what came of it to the row."""
    module = Module(entry, optimizer)
    penalty = LipschitzPenalty()
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _train(module, batch, [penalty, LipschitzMonitor()] if with_callbacks else [])
    row.seconds.setdefault(optimizer, []).append(round(time.perf_counter() - start, 2))
    row.losses.setdefault(optimizer, []).append(module.loss(batch))
    if not with_callbacks:
        return
    coverage = penalty.regularizer.coverage
    row.covered = round(coverage.share * row.parameters)
    row.layers = _counted(coverage.layers.values())
    row.left_out = _counted(layer.kind for layer in coverage.skipped)
    with torch.no_grad():
        log_product = float(penalty.regularizer.log_bound())
    row.products.setdefault(optimizer, []).append(log_product / math.log(10))
    told = {str(w.message).split("\n")[0] for w in caught if "lipschitz" in str(w.message).lower()}
    row.warnings = sorted({*row.warnings, *told})


def _nudged(entry: Entry, batch: Batch, optimizer: str, seed: int) -> float:
    """Return the loss after a training without the callbacks, from weights changed by a millionth."""
    module = Module(entry, optimizer)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1 + 1e-6 * torch.randn(parameter.shape, generator=rng))
    _train(module, batch, [])
    return module.loss(batch)


def _train(module: Module, batch: Batch, callbacks: list[pl.Callback]) -> None:
    """Train for 20 steps."""
    torch.manual_seed(2)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=1,
            log_every_n_steps=STEPS // 2,
            logger=TensorBoardLogger(folder),
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(Repeated(batch), batch_size=None))


def _counted(kinds: Iterable[str]) -> str:
    """Return types with their counts, all of them, the most frequent first."""
    return ", ".join(f"{count} {kind}" for kind, count in Counter(kinds).most_common())


def trace(entry: Entry, batch: Batch, row: Row) -> None:
    """Add the bound of the traced network with its first weights, or why there is none."""
    torch.manual_seed(0)
    model = entry.build()
    try:
        example = entry.example(batch)
        traced = entry.traced(model, batch)
        regularizer = LipschitzRegularizer(traced, 0.0, example_input=example, batch_dim=entry.batch_dim)
    except ValueError as error:  # UnsupportedLayerError is one
        row.refusals = dict(Counter(_reasons(str(error))))
        return
    for _ in range(ITERATIONS):
        regularizer.iterate()
    row.log10_bound = float(regularizer.log_bound().detach()) / math.log(10)


def _reasons(text: str) -> list[str]:
    """Return a refusal's operations with their reasons, without their modules; its first line if there are none."""
    lines = [line[4:] for line in text.split("\n") if line.startswith("  - ")]
    return [line.partition("), ")[2] for line in lines] or [text.split("\n")[0]]


def quiet() -> None:
    """Let Lightning and the packages say nothing on their own."""
    for name in ("lightning.pytorch", "lightning_utilities", "transformers", "timm"):
        logging.getLogger(name).setLevel(logging.ERROR)


def as_row(document: dict[str, Any]) -> Row:
    """Return a row from what JSON gives for it."""
    return Row(**document)
