"""The paper's experiment, as `lightning-lip reproduce` runs it.

Importing this package imports neither torch nor Lightning; `PaperRegressor`, which needs both, is found on
first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_lip.paper.command import reproduce

if TYPE_CHECKING:
    from lightning_lip.paper.model import PaperRegressor

__all__ = ["PaperRegressor", "reproduce"]


def __getattr__(name: str) -> Any:
    if name == "PaperRegressor":
        from lightning_lip.paper.model import PaperRegressor

        return PaperRegressor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
