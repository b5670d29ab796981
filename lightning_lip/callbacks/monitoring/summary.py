"""The page that a monitor tells at the end of training."""

from __future__ import annotations

import math

from lightning_lip.callbacks.monitoring.source import HEALTH, Source

MAX_ROWS = 40
"""Layers in the table; of more those with the largest parts of the logarithm are shown, in the model's order."""

COLUMNS = ("spectral_norm", *HEALTH)


def summary_of(source: Source, n_steps: int) -> str:
    """Return a table with the first and last measured values of each layer, and of the product or bound.

    Args:
        source: The layers, measured at least once.
        n_steps: Batches of training that stepped.
    """
    names = source.names
    columns = [kind for kind in COLUMNS if any(f"{source.tag}/{kind}/{name}" in source.last for name in names)]
    shown = _shown(source)
    rows = [["layer", *(kind.replace("_", " ") for kind in columns)]]
    rows += [[name, *(_change(source, f"{source.tag}/{kind}/{name}") for kind in columns)] for name in shown]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if len(shown) < len(names):
        lines.append(f"and {len(names) - len(shown)} layers with smaller parts of the logarithm")
    totals = (source.bound_tag, f"{source.bound_tag}_upper", f"{source.tag}/penalty")
    lines += [f"{tag}  {_change(source, tag)}" for tag in totals if tag in source.last]
    return f"LipschitzMonitor after {n_steps} steps, first -> last measured (spectral norms estimated):\n" + "\n".join(
        f"  {line}" for line in lines
    )


def _shown(source: Source) -> list[str]:
    """Return the names of the layers in the table."""
    names = source.names
    if len(names) <= MAX_ROWS:
        return names
    shares = [abs(source.last.get(f"{source.tag}/log_share/{name}", math.nan)) for name in names]
    order = sorted(range(len(names)), key=lambda i: shares[i] if math.isfinite(shares[i]) else math.inf, reverse=True)
    return [names[i] for i in sorted(order[:MAX_ROWS])]


def _change(source: Source, tag: str) -> str:
    """Return a metric's first and last value as text; a dash where a layer was found after the last measurement."""
    if tag not in source.last:
        return "-"
    return f"{source.first[tag]:.3g} -> {source.last[tag]:.3g}"
