"""How many steps the optimisers of this process made."""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook


class _OptimizerSteps:
    """Counts the steps of all optimisers of the process."""

    def __init__(self) -> None:
        self.count = 0
        register_optimizer_step_post_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.count += 1


_optimizer_steps = _OptimizerSteps()


def optimizer_steps() -> int:
    """Return how many steps the optimisers of this process made; steps that a gradient scaler skips do not count."""
    return _optimizer_steps.count
