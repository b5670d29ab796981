"""What is written of the zoo: the CSV file, the tables of its page, and one line a model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_lip.bench.zoo.measure import OPTIMIZERS, Row
from lightning_lip.reporting.documents import write_csv, write_text

DOCS = Path(__file__).parents[2] / "docs" / "zoo.md"
BEGIN, END = "<!-- what `make zoo` writes -->", "<!-- end -->"

COLUMNS = [
    "model",
    "holds",
    "loss_at_start",
    *(
        f"{name}_{what}"
        for name in OPTIMIZERS
        for what in ("loss_without", "loss_with", "kept", "log10_product", "nudged_without")
    ),
    "parameters",
    "covered",
    "share",
    "layers",
    "left_out",
    "log10_bound",
    "refused",
    "seconds_without",
    "seconds_with",
    "warnings",
    "stage",
    "error",
]


def write_rows(rows: Sequence[Row], path: Path, about: Mapping[str, Any]) -> None:
    """Write all rows as CSV, below the versions."""
    write_csv(path, COLUMNS, [_cells(row) for row in rows], about)


def _cells(row: Row) -> list[Any]:
    losses: list[str] = []
    for name in OPTIMIZERS:
        without, with_callbacks = (_number(x) for x in _pair(row.losses.get(name, [])))
        products = row.products.get(name, [])
        losses += [without, with_callbacks, _number(row.kept(name)), _number(products[-1]) if products else ""]
        losses.append(" ".join(_number(loss) for loss in row.nudged.get(name, [])))
    seconds = [sum(_pair(row.seconds.get(name, []))[side] or 0.0 for name in OPTIMIZERS) for side in (0, 1)]
    return [
        row.name,
        row.holds,
        _number(row.start),
        *losses,
        row.parameters,
        row.covered,
        f"{row.share:.3f}",
        row.layers,
        row.left_out,
        _number(row.log10_bound),
        "; ".join(f"{n} {reason}" for reason, n in row.refusals.items()),
        *(f"{s:.1f}" for s in seconds),
        "; ".join(row.warnings),
        row.stage,
        row.error,
    ]


def _pair(values: Sequence[float]) -> tuple[float | None, float | None]:
    return (values[0] if values else None, values[1] if len(values) > 1 else None)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def summary(row: Row) -> str:
    """Return a line on a model."""
    parts = []
    for name in OPTIMIZERS:
        without, with_callbacks = _pair(row.losses.get(name, []))
        mark = "" if row.within(name) else "!"
        parts.append(f"{name} {_number(without)} -> {_number(with_callbacks)}{mark}")
    bound = f"bound 1e{row.log10_bound:.1f}" if row.log10_bound is not None else f"refused ({len(row.refusals)})"
    end = f"  {row.stage}: {row.error}" if row.error else ""
    return f"{'ok ' if row.holds else 'BAD'} {row.name:42} {', '.join(parts):48} {row.share:6.1%}  {bound}{end}"


def write_docs(rows: Sequence[Row], path: Path, about: Mapping[str, Any]) -> None:
    """Replace the tables of the page by those of these rows.

    Raises:
        ValueError: If the page has no place for them.
    """
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"Expected {path} to hold {BEGIN!r} and, below it, {END!r}.")
    write_text(f"{before}{BEGIN}\n\n{page(rows, about)}\n{END}{after}", path)


def page(rows: Sequence[Row], about: Mapping[str, Any]) -> str:
    """Return the tables of the page, as Markdown."""
    held = sum(row.holds for row in rows)
    ran = sum(not row.error for row in rows)
    kept = [k for row in rows for name in OPTIMIZERS if (k := row.kept(name)) is not None]
    bounded = sum(row.log10_bound is not None for row in rows)
    named = ", ".join(f"{name} {version}" for name, version in about.items() if version)
    lines = [
        f"Of {len(rows)} models {ran} ran to the end, and {held} ended at a loss of at most twice the loss without, "
        f"plus .1. {bounded} have a traced bound. In {sum(k >= 0.9 for k in kept)} of the {len(kept)} trainings whose "
        f"loss falls by 1% or more without the callbacks, at least 90% of that fall is left with them. With {named}.",
        "",
        "| model | SGD | Adam | parameters | covered | left out | traced bound |",
        "|---|---|---|---:|---:|---|---|",
        *(_line(row) for row in rows),
        "",
        "Why the other models have no traced bound, by the number of models:",
        "",
        "| models | operation: reason |",
        "|---:|---|",
    ]
    reasons = Counter(reason for row in rows for reason in row.refusals)
    lines += [f"| {n} | {_escaped(reason)} |" for reason, n in reasons.most_common()]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    losses = []
    for name in OPTIMIZERS:
        without, with_callbacks = _pair(row.losses.get(name, []))
        bold = "" if row.within(name) else "**"
        mark = "†" if row.unstable(name) else ""
        losses.append(f"{bold}{_number(without)} → {_number(with_callbacks)}{bold}{mark}")
    if row.log10_bound is not None:
        bound = "0" if math.isinf(row.log10_bound) else f"10^{row.log10_bound:.1f}"
    else:
        bound = "none" if row.refusals else _escaped(row.error)
    cells = (row.name, *losses, f"{row.parameters:,}", f"{row.share:.1%}", row.left_out or "nothing", bound)
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
