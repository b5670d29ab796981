"""Training steps under Lightning's Trainer, and how long they take."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_lip.callbacks import LipschitzPenalty
from lightning_lip.reporting.messages import quiet

Batch = tuple[Tensor, Tensor]
Term = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""What a peer adds to the loss: of the network, the inputs and the outputs, shape ()."""

N_BATCHES = 10**9
"""More batches than any measurement takes: no epoch ends inside one."""


class Training(pl.LightningModule):
    """A network with its loss and Adam, as a user would train it.

    Args:
        network: The network.
        classes: Whether the targets are classes; else the loss is the mean squared error.
        term: Is added to the loss.
        inputs_need_grad: Whether `term` differentiates with respect to the inputs.
    """

    def __init__(
        self, network: nn.Module, classes: bool, term: Term | None = None, inputs_need_grad: bool = False
    ) -> None:
        super().__init__()
        self.network = network
        self._loss = F.cross_entropy if classes else F.mse_loss
        self._term = term
        self._inputs_need_grad = inputs_need_grad
        self._optimizer: Optimizer | None = None

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs)  # type: ignore[no-any-return]

    @override
    def training_step(self, batch: Batch) -> Tensor:
        inputs, targets = batch
        if self._inputs_need_grad:
            inputs = inputs.detach().requires_grad_()
        outputs = self(inputs)
        loss = self._loss(outputs, targets)
        return loss if self._term is None else loss + self._term(self.network, inputs, outputs)

    @override
    def configure_optimizers(self) -> Optimizer:
        # The same optimiser for every fit: each goes on where the last one ended.
        if self._optimizer is None:
            self._optimizer = torch.optim.Adam(self.parameters(), lr=1e-4)
        return self._optimizer


class TimedPenalty(LipschitzPenalty):
    """The penalty, with a clock: it sums the time spent in its hook before the optimiser's step.

    On a CUDA device that is the time of its work there, between two events: the host does not wait.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.start()

    def start(self) -> None:
        """Forget the steps so far."""
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def own_seconds(self) -> float:
        """Return the time in the hook since the start; a CUDA device must have been waited for."""
        on_device: float = sum(before.elapsed_time(after) for before, after in self._events) / 1e3
        return self._seconds + on_device

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if pl_module.device.type == "cuda":
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            before.record()
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
            after.record()
            self._events.append((before, after))
            return
        start = time.perf_counter()
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        self._seconds += time.perf_counter() - start


class _Clock(Callback):
    """Times whole steps, from the end of step `n_before` to the end of the fit.

    It must be the last of the callbacks, so that the time of the others is included.
    """

    def __init__(self, n_before: int, n_steps: int, on_start: Callable[[], None]) -> None:
        self._n_before, self._last = n_before, n_before + n_steps
        self._on_start = on_start
        self._n_done = 0
        self._start = 0.0
        self.seconds = 0.0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start_if_due(pl_module.device)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._n_done += 1
        self._start_if_due(pl_module.device)
        if self._n_done == self._last:
            synchronise(pl_module.device)
            self.seconds = time.perf_counter() - self._start

    def _start_if_due(self, device: torch.device) -> None:
        if self._n_done == self._n_before:
            self._on_start()
            synchronise(device)
            self._start = time.perf_counter()


class _Repeated(Dataset[Batch]):
    """One batch, over and over: loading is not measured."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def __len__(self) -> int:
        return N_BATCHES

    def __getitem__(self, index: int) -> Batch:
        return self._batch


def fit(
    training: Training,
    callbacks: Sequence[Callback],
    batch: Batch,
    n_before: int,
    n_steps: int,
    precision: Any = "32-true",
    strategy: str = "auto",
) -> tuple[float, float | None]:
    """Train for `n_before + n_steps` steps with a Trainer of its own.

    Weights, optimiser and callbacks go on from where the last fit left them. The first step of a fit still pays for
    its start (tables of addresses, say), and the very first one for the optimiser's state: `n_before` of at least 1
    leaves that out.

    Args:
        training: The module, on the device where it stays.
        callbacks: The Trainer's callbacks.
        batch: The batch of every step, on that device.
        n_before: Steps before the clock starts.
        n_steps: Steps that are timed.
        precision: The Trainer's.
        strategy: The Trainer's, for one process.

    Returns:
        Seconds a step, and of these the seconds in `TimedPenalty`'s hook, None without one.
    """
    penalties = [callback for callback in callbacks if isinstance(callback, TimedPenalty)]

    def reset() -> None:
        for penalty in penalties:
            penalty.start()

    clock = _Clock(n_before, n_steps, reset)
    device = batch[0].device
    loader = DataLoader(_Repeated(batch), batch_size=None, shuffle=False)
    with quiet():
        trainer = pl.Trainer(
            accelerator=device.type,
            devices=1 if device.index is None else [device.index],
            precision=precision,
            strategy=strategy,
            use_distributed_sampler=False,  # it would list the indices of all batches
            max_steps=n_before + n_steps,
            callbacks=[*callbacks, clock],
            logger=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        trainer.fit(training, loader)
    own = sum(penalty.own_seconds() for penalty in penalties) / n_steps if penalties else None
    return clock.seconds / n_steps, own


def synchronise(device: torch.device) -> None:
    """Wait for a CUDA device; on the CPU nothing is pending."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
