"""What the benchmark prints. Everything is made from the run's own results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_lip.bench.steps.growth import Point
from lightning_lip.bench.steps.measure import PLAIN, Result, Row
from lightning_lip.reporting.console import make_table, print_line
from lightning_lip.reporting.extras import install_command

SECTIONS = {
    "none": None,
    "symbol": "symbols of convolutions",
    "true": "the true operators",
    "reshaped": "kernels as matrices (c_out, -1)",
}


def print_result(console: Console, result: Result) -> None:
    """Print the table of one model and what it says about the penalty."""
    numbers = ("ms a step", "x plain (p20 to p80)", "own ms", "MB held", "MB at peak", "error of the norms")
    title = f"{result.model_title}; batch {result.batch_size}, {result.n_layers} layers penalised"
    grid = make_table(title, ["training"], numbers)
    grid.add_column("the norms are", overflow="fold")
    section = "none"
    order = [PLAIN, *SECTIONS]
    rows = sorted(result.rows, key=lambda row: order.index(PLAIN if row.contender == PLAIN else row.operator))
    for row in rows:
        if result.has_convolutions and row.operator != section and SECTIONS[row.operator]:
            grid.add_section()
            grid.add_row(f"[italic]{SECTIONS[row.operator]}")
        section = row.operator
        grid.add_row(*_cells(row))
    console.print(grid)
    for title, module in result.missing.items():
        print_line(console, f"  {title}: not installed ({module}): {install_command('bench')}")
    for line in findings(result):
        print_line(console, "  " + line)


def findings(result: Result) -> list[str]:
    """Return sentences on the penalty's share of a step, its memory, and what each peer adds over what it adds."""
    rows = {row.contender: row for row in result.rows}
    plain = rows[PLAIN]
    lines = []
    for row in result.rows:
        if row.allowed_bytes is not None:
            lines += [_time(row, plain), _memory(row)]
    lines.append(
        f"One read of the penalised weights with a read and a write of their gradients takes {result.floor_ms:.3g} ms."
    )
    peers = [row for row in result.rows if row.own_ms is None and row.contender != PLAIN]
    lines += _ratios(rows["penalty_r8"], peers)
    if "penalty_r1" in rows:
        lines += _ratios(rows["penalty_r1"], [row for row in peers if row.vectors == 1])
    return lines


def _time(row: Row, plain: Row) -> str:
    own, of_plain = row.own_ms or 0.0, plain.step_ms[1]
    line = (
        f"The penalty (r = {row.vectors}) takes {own:.3g} ms a step, {own / of_plain:.1%} of a plain {of_plain:.3g} ms"
    )
    if row.share is None:
        return line + "."
    return line + f": its budget of {row.share:.1%} is {'kept' if own <= row.share * of_plain else 'exceeded'}."


def _memory(row: Row) -> str:
    held, peak, allowed = (n_bytes / 1e6 for n_bytes in (row.held_bytes, row.peak_bytes, row.allowed_bytes or 0))
    return (
        f"  It adds {held:.4g} MB, at the peak {peak:.4g} MB: 1% of the parameters and r vectors a layer, "
        f"{allowed:.4g} MB, is {'kept' if max(held, peak) <= allowed else 'exceeded'}."
    )


def _ratios(penalty: Row, peers: Sequence[Row]) -> list[str]:
    """Return what peers add to a step over what the penalty does, one line for each kind of operator."""
    if not peers:
        return []
    low, middle, high = penalty.added_ms
    line = f"With r = {penalty.vectors} it adds {middle:.3g} ms ({low:.3g} to {high:.3g}) to a whole step"
    if low <= 0:
        return [f"{line}: no more than the steps vary, so that no peer's time can be stated in it."]
    lines = [f"{line}. In that time, peers add:"]
    for operator, title in SECTIONS.items():
        found = [_ratio(row, penalty) for row in peers if row.operator == operator]
        if found:
            lines.append(f"  {title or 'without norms'}: {', '.join(found)}.")
    return lines


def _ratio(row: Row, penalty: Row) -> str:
    vectors = "" if row.vectors is None else f" (r = {row.vectors})"
    # The widest that the percentiles of both allow.
    spread = [added / of for added in row.added_ms for of in penalty.added_ms]
    spread_text = f"({min(spread):.3g} to {max(spread):.3g})" if row.n_blocks > 1 else "(once)"
    return f"{row.contender}{vectors} {row.added_ms[1] / penalty.added_ms[1]:.3g} x {spread_text}"


def print_growth(console: Console, points: Sequence[Point]) -> None:
    """Print the penalty's cost by depth and width."""
    numbers = ("depth", "width", "r", "ms a step, without it", "own ms", "share", "over the floor")
    grid = make_table("the penalty in networks of growing size, batch 256", [], numbers)
    for p in points:
        cells = (f"{p.step_ms:.3g}", f"{p.own_ms:.3g}", f"{p.own_ms / p.step_ms:.1%}", f"{p.own_ms / p.floor_ms:.1f}")
        grid.add_row(str(p.depth), str(p.width), str(p.block_size), *cells)
    console.print(grid)


def print_end(console: Console, found: dict[str, Any], folder: Path) -> None:
    """Say where everything is, and what the numbers depend on."""
    machine = found["machine"]
    device = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"
    if found["options"]["quick"]:
        print_line(console, "A quick run: too few steps for numbers that mean something.")
    print_line(console, f"Measured on {device}, torch {found['versions']['torch']}, in {found['seconds']:.0f} s.")
    print_line(console, f"Tables, plots and bench.json are in {folder}.")
    if found["options"]["quick"]:
        print_line(console, "Next, for numbers to read: lightning-lip bench (about eight minutes)")
    else:
        print_line(console, "Next, for the kernels alone: python -m lightning_lip.bench.studies.kernels")


def _cells(row: Row) -> list[str]:
    step = f"{row.step_ms[1]:.4g}"
    if row.contender == PLAIN:
        return [row.title, step, "1"]
    p20, p50, p80 = row.ratio
    ratio = f"{p50:.3f} ({p20:.3f} to {p80:.3f})" if row.n_blocks > 1 else f"{p50:.3g}"
    own = "" if row.own_ms is None else f"{row.own_ms:.3g}"
    error = "" if row.error_max is None else f"{row.error_max:.1e}"
    memory = [f"{n_bytes / 1e6:+.3f}" for n_bytes in (row.held_bytes, row.peak_bytes)]
    return [row.title, step, ratio, own, *memory, error, row.guarantee]
