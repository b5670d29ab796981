"""One training: by processor time or by epochs, and nothing but the network, its loss and its optimisers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_lip.bench.scoreboard.data import Part

BATCH_SIZE = 128
WARM_UP_STEPS = 3


def nothing() -> None:
    """Do nothing."""


@dataclass
class Training:
    """A network and what trains it.

    Attributes:
        network: Maps inputs to logits.
        loss: Maps logits and classes to a scalar.
        optimizers: Their learning rates follow a cosine from what they are to 0.
        after_backward: Called between the backward pass and the optimisers' step.
        after_step: Called after the optimisers' step.
        on_progress: Called before each step with the share of the training that is over, from 0 to 1.
        at_end: Called at the end.
    """

    network: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizers: Sequence[torch.optim.Optimizer]
    after_backward: Callable[[], object] = nothing
    after_step: Callable[[], object] = nothing
    on_progress: Callable[[float], None] = lambda progress: None
    at_end: Callable[[], object] = nothing

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        """Make one step on a batch."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        torch.autograd.backward(self.loss(self.network(inputs), targets))
        self.after_backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.after_step()


@dataclass(frozen=True)
class Budget:
    """How long a training lasts.

    Attributes:
        amount: So many units.
        unit: ``"seconds"`` of this process's CPU time, in whatever threads, or ``"epochs"``.
    """

    amount: float
    unit: Literal["seconds", "epochs"]

    def __str__(self) -> str:
        return f"{self.amount:g} {'CPU seconds' if self.unit == 'seconds' else 'epochs'} a training"


@dataclass(frozen=True)
class Spent:
    """What a training took: its optimiser steps, and the CPU seconds of this process."""

    steps: int
    seconds: float


def train(training: Training, part: Part, budget: Budget, seed: int) -> Spent:
    """Train on shuffled batches of 128 until the budget is spent.

    CPU time is what the process itself uses, so that a busy machine costs steps only as far as it slows them.
    """
    schedulers = [(group, group["lr"]) for optimizer in training.optimizers for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(seed)
    n_batches = -(-len(part.targets) // BATCH_SIZE)
    n_steps, start = 0, time.process_time()
    batches: list[Tensor] = []
    training.network.train()
    while True:
        spent = time.process_time() - start
        progress = spent / budget.amount if budget.unit == "seconds" else n_steps / (budget.amount * n_batches)
        if progress >= 1:
            break
        for group, rate in schedulers:
            group["lr"] = rate * (1 + math.cos(math.pi * progress)) / 2
        training.on_progress(progress)
        if not batches:
            batches = list(torch.split(torch.randperm(len(part.targets), generator=generator), BATCH_SIZE))
        rows = batches.pop()
        training.step(part.inputs[rows], part.targets[rows])
        n_steps += 1
    training.at_end()
    return Spent(n_steps, time.process_time() - start)


def warm_up(training: Training, part: Part) -> None:
    """Make a few steps, for all that is compiled, loaded or allocated at first."""
    training.network.train()
    for _ in range(WARM_UP_STEPS):
        training.on_progress(0.0)
        training.step(part.inputs[:BATCH_SIZE], part.targets[:BATCH_SIZE])
    training.at_end()
