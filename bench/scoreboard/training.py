"""One training, nothing but the network, its loss and its optimisers, and the time that its steps take."""

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
N_ROUNDS, ROUND_STEPS = 10, 10


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
    """How long each training lasts.

    Attributes:
        amount: So many units.
        unit: ``"seconds"`` of CPU time, or ``"epochs"``.
    """

    amount: float
    unit: Literal["seconds", "epochs"]

    def __str__(self) -> str:
        return f"{self.amount:g} {'CPU seconds' if self.unit == 'seconds' else 'epochs'} a training"

    def steps(self, step_ms: float, n_samples: int) -> int:
        """Return the optimiser steps of a training.

        Args:
            step_ms: CPU milliseconds a step.
            n_samples: Samples an epoch.
        """
        n_batches = -(-n_samples // BATCH_SIZE)
        steps = 1e3 * self.amount / step_ms if self.unit == "seconds" else self.amount * n_batches
        return max(1, round(steps))


def train(training: Training, part: Part, n_steps: int, seed: int) -> None:
    """Train on shuffled batches of 128."""
    schedulers = [(group, group["lr"]) for optimizer in training.optimizers for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(seed)
    batches: list[Tensor] = []
    training.network.train()
    for step in range(n_steps):
        progress = step / n_steps
        for group, rate in schedulers:
            group["lr"] = rate * (1 + math.cos(math.pi * progress)) / 2
        training.on_progress(progress)
        if not batches:
            batches = list(torch.split(torch.randperm(len(part.targets), generator=generator), BATCH_SIZE))
        rows = batches.pop()
        training.step(part.inputs[rows], part.targets[rows])
    training.at_end()


def step_times(trainings: Sequence[Training], part: Part) -> list[float]:
    """Return the CPU milliseconds of this process that a step of each takes, measured in turn.

    It is the fastest of ten rounds of some steps each, behind a first round in which things are compiled or allocated:
    what else the machine does can only make a round slower.
    """
    inputs, targets = part.inputs[:BATCH_SIZE], part.targets[:BATCH_SIZE]
    best = [math.inf] * len(trainings)
    for round_number in range(N_ROUNDS + 1):
        for index, training in enumerate(trainings):
            training.network.train()
            start = time.process_time()
            for _ in range(ROUND_STEPS):
                training.on_progress(0.5)
                training.step(inputs, targets)
            if round_number:
                best[index] = min(best[index], 1e3 * (time.process_time() - start) / ROUND_STEPS)
    return best
