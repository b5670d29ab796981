"""How the penalty's cost grows with depth and width, beside the training step and the floor of memory traffic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lightning_lip.bench.contenders.models import BenchModel, mlp
from lightning_lip.bench.contenders.peers import penalty, task_of
from lightning_lip.bench.contenders.training import fit
from lightning_lip.bench.steps.measure import floor_seconds

BATCH_SIZE = 256
BLOCK_SIZES = (1, 8)
DEPTHS = tuple(2**k for k in range(1, 8))
WIDTHS = tuple(2**k for k in range(4, 14))
WIDTH_OF_DEPTHS = 64
DEPTH_OF_WIDTHS = 2
SAMPLES = 5
BLOCK_SECONDS = 0.1
SLOW_SECONDS = 0.5
"""A step that takes longer is measured once."""


@dataclass(frozen=True)
class Point:
    """One size of a multilayer perceptron with ReLU, trained on batches of 256.

    Attributes:
        depth: Linear layers.
        width: Their inputs and outputs.
        block_size: r.
        step_ms: Median milliseconds of a whole training step without the time in the penalty's hook.
        own_ms: Median milliseconds a step in the penalty's hook, inside that training.
        floor_ms: As in :class:`~lightning_lip.bench.steps.measure.Result`.
    """

    depth: int
    width: int
    block_size: int
    step_ms: float
    own_ms: float
    floor_ms: float


def growth(sizes: Sequence[tuple[int, int]], device: torch.device, on_step: Callable[[str], None]) -> list[Point]:
    """Measure the sizes (depth, width) one after the other, at each block size."""
    points = []
    for depth, width in sizes:
        model = BenchModel(f"{depth} x {width}", lambda d=depth, w=width: mlp(*[w] * (d + 1)), (width,), BATCH_SIZE)  # type: ignore[misc]
        on_step(f"growth: {depth} layers of width {width}")
        floor = floor_seconds(depth * width**2, device)
        task, batch = task_of(model, device)
        for block_size in BLOCK_SIZES:
            contender = penalty(block_size)(task)
            once, own = fit(contender.training, contender.callbacks, batch, 1, 1)
            samples = [(once, own)]
            if once < SLOW_SECONDS:
                n_steps = max(1, round(BLOCK_SECONDS / once))
                samples = [fit(contender.training, contender.callbacks, batch, 1, n_steps) for _ in range(SAMPLES)]
            times = 1e3 * np.array([(step - (own or 0.0), own or 0.0) for step, own in samples])
            step_ms, own_ms = np.median(times, axis=0).tolist()
            points.append(Point(depth, width, block_size, step_ms, own_ms, 1e3 * floor))
    return points
