"""A progress bar with the time left on a terminal, and a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINES = 10
"""How many lines a run of the command prints where there is no terminal."""


@contextmanager
def progress(console: Console, total: int, what: str) -> Iterator[Callable[[object], None]]:
    """Show how many of `total` tasks are done.

    Yields:
        A function to call after each task; its argument is ignored.
    """
    if console.is_terminal:
        columns = (
            TextColumn(what),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(what, total=total)
            yield lambda _: bar.advance(task)
    else:
        yield _Lines(console, total, what)


class _Lines:
    def __init__(self, console: Console, total: int, what: str) -> None:
        self._console = console
        self._total = total
        self._what = what
        self._done = 0
        self._start = time.monotonic()

    def __call__(self, _: object) -> None:
        self._done += 1
        if self._done * LINES // self._total > (self._done - 1) * LINES // self._total:
            elapsed = time.monotonic() - self._start
            left = elapsed / self._done * (self._total - self._done)
            self._console.print(f"{self._what}: {self._done}/{self._total}, {elapsed:.0f} s, about {left:.0f} s left")
