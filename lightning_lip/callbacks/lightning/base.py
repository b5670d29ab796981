"""The base class of the callbacks, for either Lightning package.

Hooks work by duck typing, but LightningCLI of `pytorch_lightning` asks for subclasses of its own Callback, and 2.5
refuses others in training: where both packages are installed, the base is a subclass of both.
"""

from __future__ import annotations

import functools
import importlib
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from torch import nn
from typing_extensions import override

from lightning_lip.callbacks.lightning.trainer import refuse_strategy

if TYPE_CHECKING:
    from lightning.pytorch import Callback as BaseCallback
    from lightning.pytorch import LightningModule, Trainer
else:
    from lightning.pytorch import Callback
    from lightning_utilities.core import rank_zero

    # Each package sends the messages of both to a logger of its own when it is imported: it must not change hands here.
    log = rank_zero.log
    try:
        from pytorch_lightning import Callback as OtherCallback
    except ImportError:
        BaseCallback = Callback
    else:
        rank_zero.log = log

        class BaseCallback(Callback, OtherCallback):
            """A callback of both Lightning packages."""


__all__ = ["BaseCallback", "SelectingCallback", "skip_hooks"]


class SelectingCallback(BaseCallback):
    """A callback that selects layers when training starts; a state that is loaded before waits until then."""

    _loaded: dict[str, Any] | None = None
    _loaded_for: nn.Module | None = None
    _fitting: nn.Module | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        refuse_strategy(trainer, self)
        if self._loaded_for is not None and self._loaded_for is not pl_module:
            self._loaded = None  # of a fit that never came to training
        self._fitting = pl_module

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.end_fit()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.end_fit()

    def end_fit(self) -> None:
        """Let go of the module that was in training."""
        self._fitting = None

    def keep_until_training(self, loaded: dict[str, Any] | None) -> None:
        """Keep a state that is loaded, for the module in training if there is one."""
        self._loaded, self._loaded_for = loaded, self._fitting


def skip_hooks(callback: BaseCallback, base: type, *hooks: str) -> None:
    """Have Lightning pass over hooks that `base` leaves as they are, where no subclass of it overrides them.

    Lightning goes through every hook of every callback at each step, 2 microseconds each, also those that do nothing;
    but not through what is not callable. Where that is so, they are None in the instance.
    """
    for hook in hooks if _passes_over_none() else ():
        if getattr(type(callback), hook) is getattr(base, hook):
            setattr(callback, hook, None)


@functools.cache
def _passes_over_none() -> bool:
    """Whether the Lightning packages that are installed pass over a hook that is None: asked, not assumed."""
    trainer = SimpleNamespace(
        lightning_module=None, callbacks=[SimpleNamespace(hook=None, state_key="")], profiler=None
    )
    for package in ("lightning.pytorch", "pytorch_lightning"):
        try:
            call = importlib.import_module(f"{package}.trainer.call")
        except ImportError:
            continue
        try:
            call._call_callback_hooks(trainer, "hook")
        except (AttributeError, TypeError):
            return False
    return True
