"""How many steps the optimisers of this process made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook


class _OptimizerSteps:
    """Counts the steps of all optimisers of the process."""

    def __init__(self) -> None:
        self.count = 0
        self.last_of: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
        register_optimizer_step_post_hook(self._count)

    def _count(self, optimizer: Optimizer, *_: Any) -> None:
        self.count += 1
        self.last_of[optimizer] = self.count


_optimizer_steps = _OptimizerSteps()


def optimizer_steps() -> int:
    """Return how many steps the optimisers of this process made; steps that a gradient scaler skips do not count."""
    return _optimizer_steps.count


def last_step(optimizers: Iterable[object]) -> int:
    """Return what :func:`optimizer_steps` was right after the last step of one of these optimisers; 0 before any.

    What only acts as an optimiser, around one of torch's, is not seen to step: with one of these every step counts.
    """
    steps = [_optimizer_steps.last_of.get(o, 0) if isinstance(o, Optimizer) else optimizer_steps() for o in optimizers]
    return max(steps, default=0)
