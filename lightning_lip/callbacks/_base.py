"""The base class of the callbacks, for either Lightning package.

Hooks work by duck typing, but LightningCLI of `pytorch_lightning` asks for subclasses of its own Callback, and 2.5
refuses others in training: where both packages are installed, the base is a subclass of both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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


__all__ = ["BaseCallback"]
