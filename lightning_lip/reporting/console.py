"""The console of a command, its tables and its lines."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


def make_console(width: int = 120) -> Console:
    """Return a console on standard output, `width` columns wide where that is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=width)


def print_line(console: Console, text: str) -> None:
    """Print a line as it is: programs read reports too, so that none is broken or styled."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def make_table(title: str, texts: Sequence[str], numbers: Sequence[str]) -> Table:
    """Return a table without rows: columns of text, folded where they are too wide, then columns of numbers."""
    grid = Table(title=title)
    for column in texts:
        grid.add_column(column, overflow="fold")
    for column in numbers:
        grid.add_column(column, justify="right")
    return grid
