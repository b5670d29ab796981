"""Compiled functions, before their first use: compiled, or loaded from Numba's cache on disk."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

_logger = logging.getLogger("lightning_lip")

_loaded: set[str] = set()
_loading = threading.Lock()


def load_compiled(name: str, load: Callable[[], object]) -> None:
    """Compile a function or load it from the cache, before its first use; say so if that took long."""
    with _loading:
        if name in _loaded:
            return
        start = time.perf_counter()
        load()
        seconds = time.perf_counter() - start
        _loaded.add(name)
    if seconds > 1:
        _logger.info("Compiled CPU kernels in %.1f s; cached for the next process.", seconds)
