"""Beside Lightning's own messages: information for the user, as Lightning gives it; and runs without its advice."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning_utilities.core import rank_zero


def tell(text: str) -> None:
    """Log a text for information, on the first rank only, with the logger of Lightning's own messages."""
    # Outside of Lightning the number of the rank may be known to torch only.
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    rank_zero.rank_zero_info(text)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Lightning's advice on hardware and workers: it does not apply to runs of seconds."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
