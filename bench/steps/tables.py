"""The benchmark's files: every number in one JSON document, and the tables as CSV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from lightning_lip.bench.steps.growth import Point
from lightning_lip.bench.steps.measure import Result, Row
from lightning_lip.reporting.documents import machine, versions, write_csv

SCHEMA = 2
PACKAGES = ("lightning-lip", "lightning", "numpy", "numba", "scipy", "deel-torchlip")
PERCENTILES = (20, 50, 80)
SPREAD = ("step_ms", "ratio", "added_ms")
"""What a row has percentiles of."""


def document(
    results: Sequence[Result], points: Sequence[Point], device: torch.device, *, quick: bool
) -> dict[str, Any]:
    """Collect the results.

    The document's keys:

    - `schema`: 2.
    - `versions`: of Python and the packages; null for one that is not installed.
    - `machine`: the processor, its cores, torch's threads, the device and the GPU's name.
    - `options`: whether the run was quick.
    - `models`: one entry for each model, as :class:`~lightning_lip.bench.steps.measure.Result` documents it, its `rows`
      as :class:`~lightning_lip.bench.steps.measure.Row` does.
    - `growth`: one entry for each size, as :class:`~lightning_lip.bench.steps.growth.Point` documents it.

    `bench` adds `seconds` and `figures`.
    """
    return {
        "schema": SCHEMA,
        "versions": versions(*PACKAGES),
        "machine": machine(device),
        "options": {"quick": quick},
        "models": [asdict(result) for result in results],
        "growth": [asdict(point) for point in points],
    }


def result_from_json(fields: dict[str, Any]) -> Result:
    """Return the result whose fields, as `dataclasses.asdict` gives them, went through JSON."""
    rows = tuple(Row(**row | {name: tuple(row[name]) for name in SPREAD}) for row in fields["rows"])
    return Result(**fields | {"rows": rows})


def points_from_json(points: list[dict[str, Any]]) -> list[Point]:
    """Return the points of one size whose fields went through JSON."""
    return [Point(**fields) for fields in points]


def write_csv_files(found: dict[str, Any], folder: Path) -> None:
    """Write steps.csv and growth.csv, below comment lines that say where they were measured."""
    about = {**found["machine"], **found["versions"], "quick": found["options"]["quick"]}
    of_model = [f.name for f in fields(Result) if f.name not in ("rows", "missing")]
    rows = [model | _flat(row) for model in found["models"] for row in model["rows"]]
    of_row = [key for f in fields(Row) for key in (_names(f.name) if f.name in SPREAD else [f.name])]
    _write(folder / "steps.csv", [*of_model, *of_row], rows, about)
    _write(folder / "growth.csv", [f.name for f in fields(Point)], found["growth"], about)


def _write(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> None:
    cells = [[f"{row[key]:.6g}" if isinstance(row[key], float) else row[key] for key in columns] for row in rows]
    write_csv(path, columns, cells, about)


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    flat = dict(row)
    for name in SPREAD:
        flat |= dict(zip(_names(name), flat.pop(name), strict=True))
    return flat


def _names(name: str) -> list[str]:
    return [f"{name}_p{percentile}" for percentile in PERCENTILES]
