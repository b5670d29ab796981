"""What the benchmark prints. Everything is made from the run's own results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as Grid

from lightning_lip.bench.growth import Point
from lightning_lip.bench.measure import PLAIN, Result, Row

SECTIONS = {
    "none": None,
    "true": "the true operators",
    "reshaped": "kernels as matrices (c_out, -1)",
}


@contextmanager
def status(console: Console) -> Iterator[Callable[[str], None]]:
    """Show what is being done, on a terminal.

    Yields:
        A function to call with it.
    """
    with console.status("") as shown:
        yield shown.update


def print_result(console: Console, result: Result) -> None:
    """Print the table of one model and what it says about the penalty."""
    grid = Grid(title=f"{result.model_title}; batch {result.batch_size}, {result.n_layers} layers penalised")
    grid.add_column("training", overflow="fold")
    for column in ("ms a step", "x plain (p20 to p80)", "own ms", "MB held", "MB at peak", "error of the norms"):
        grid.add_column(column, justify="right")
    grid.add_column("the norms are", overflow="fold")
    section = "none"
    order = [PLAIN, *(key for key in SECTIONS)]
    rows = sorted(result.rows, key=lambda row: order.index(PLAIN if row.contender == PLAIN else row.operator))
    for row in rows:
        if result.has_convolutions and row.operator != section and SECTIONS[row.operator]:
            grid.add_section()
            grid.add_row(f"[italic]{SECTIONS[row.operator]}")
        section = row.operator
        grid.add_row(*_cells(row))
    console.print(grid)
    for title, module in result.missing.items():
        _line(console, f'  {title}: not installed ({module}): pip install "lightning-lip[bench]"')
    for line in findings(result):
        _line(console, "  " + line)


def findings(result: Result) -> list[str]:
    """Return sentences on the penalty's share of a step, the floor, and its cost beside each peer's."""
    rows = {row.contender: row for row in result.rows}
    plain, penalty = rows[PLAIN].step_ms[1], rows["penalty_r8"]
    own = penalty.own_ms or 0.0
    lines = [
        f"The penalty (r = 8) takes {own:.3g} ms a step, {own / plain:.1%} of a plain step's {plain:.3g} ms. One read "
        f"of its weights with a read and a write of their gradients takes {result.floor_ms:.3g} ms."
    ]
    lines.append(f"It adds {penalty.added_ms:.3g} ms to a whole step. Beside it, on whole steps:")
    words: dict[str, list[str]] = {"more": [], "as much, within the spread of the blocks": [], "less": []}
    for row in result.rows:
        if row.own_ms is None and row.contender != PLAIN:
            words[_compared(row, penalty)].append(f"{row.contender} {row.added_ms:.3g} ms")
    lines += [f"  {', '.join(found)} add{'s' * (len(found) == 1)} {word}." for word, found in words.items() if found]
    return lines


def _compared(row: Row, penalty: Row) -> str:
    if row.ratio[2] < penalty.ratio[0]:
        return "less"
    return "more" if row.ratio[0] > penalty.ratio[2] else "as much, within the spread of the blocks"


def print_growth(console: Console, points: Sequence[Point]) -> None:
    """Print the penalty's cost by depth and width."""
    grid = Grid(title="the penalty in networks of growing size, batch 256")
    for column in ("depth", "width", "r", "ms a step, without it", "own ms", "share", "over the floor"):
        grid.add_column(column, justify="right")
    for p in points:
        cells = (f"{p.step_ms:.3g}", f"{p.own_ms:.3g}", f"{p.own_ms / p.step_ms:.1%}", f"{p.own_ms / p.floor_ms:.1f}")
        grid.add_row(str(p.depth), str(p.width), str(p.block_size), *cells)
    console.print(grid)


def print_end(console: Console, found: dict[str, Any], folder: Path) -> None:
    """Say where everything is, and what the numbers depend on."""
    machine = found["machine"]
    device = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"
    if found["options"]["quick"]:
        _line(console, "A quick run: too few steps for numbers that mean something.")
    _line(console, f"Measured on {device}, torch {found['versions']['torch']}, in {found['seconds']:.0f} s.")
    _line(console, f"Tables, plots and bench.json are in {folder}.")


def _cells(row: Row) -> list[str]:
    p20, p50, p80 = row.ratio
    return [
        row.title,
        f"{row.step_ms[1]:.4g}",
        "1" if row.contender == PLAIN else f"{p50:.3f} ({p20:.3f} to {p80:.3f})" if row.n_blocks > 1 else f"{p50:.3g}",
        "" if row.own_ms is None else f"{row.own_ms:.3g}",
        "" if row.contender == PLAIN else f"{row.held_bytes / 1e6:+.3f}",
        "" if row.contender == PLAIN else f"{row.peak_bytes / 1e6:+.3f}",
        "" if row.error_max is None else f"{row.error_max:.1e}",
        "" if row.contender == PLAIN else row.guarantee,
    ]


def _line(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
