"""The base class of the callbacks, for either Lightning package.

Hooks work by duck typing, but LightningCLI of `pytorch_lightning` asks for subclasses of its own Callback, and 2.5
refuses others in training: where both packages are installed, the base is a subclass of both.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from lightning.pytorch import Callback as BaseCallback
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


__all__ = ["BaseCallback", "skipping"]

_Class = TypeVar("_Class", bound=type)


def skipping(*hooks: str) -> Callable[[_Class], _Class]:
    """Decorate a callback whose `hooks`, called at every step, would do nothing.

    Lightning goes through every hook of every callback at each step, 2 microseconds each, also those that do nothing;
    but not through what is not callable. Where that is so, they are set to None.
    """

    def decorate(callback: _Class) -> _Class:
        for hook in hooks if _passes_over_none() else ():
            setattr(callback, hook, None)
        return callback

    return decorate


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
