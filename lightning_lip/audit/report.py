"""The audit on a terminal and as a file. Everything is made from the audit's document."""

from __future__ import annotations

import json
import sys
from decimal import ROUND_CEILING, ROUND_FLOOR, Context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_lip.errors import AuditError
from lightning_lip.reporting.console import make_table, print_line
from lightning_lip.reporting.documents import write_text


def print_report(console: Console, document: dict[str, Any]) -> None:
    """Print the tables of layers and constants, the interval, and what was refused.

    Args:
        console: Where to.
        document: As :func:`lightning_lip.audit.document` returns it.
    """
    shapes = ", ".join("x".join(map(str, shape)) or "scalar" for shape in document["input_shapes"])
    print_line(console, f"{document['target']}: {document['module']}, inputs {shapes}")
    console.print(_layers(document["layers"]))
    constants = [node for node in document["operations"] if node["operator"] is None and node["constant"] != 1]
    if constants:
        console.print(_constants(constants))
    for line in interval(document):
        print_line(console, line)
    for method in document["skipped"]:
        print_line(console, f"  left out: {method}")
    if document["refused"]:
        print_line(console, "Refused:")
        for reason in document["refused"]:
            print_line(console, f"  - {reason}")


def interval(document: dict[str, Any]) -> list[str]:
    """Return the lines on the interval: measured, estimated, certified, and how far apart they can be."""
    measured = f"the largest slope at {document['n_inputs']} inputs" if document["n_inputs"] else "give --data"
    if not document["certified"]:
        certified = "none: see what was refused"
    elif document["upper"] is None:
        certified = f"(too large for a float, its logarithm is at most {_number(document['log_upper'], ROUND_CEILING)})"
    else:
        certified = f"(by the method {document['method']})"
    lines = [
        "Lipschitz constant:",
        f"  measured lower bound   {_number(document['lower'], ROUND_FLOOR):>12}  ({measured})",
        f"  estimate of the bound  {_number(document['estimate']):>12}  (the rules' bound at the estimated norms)",
        f"  certified upper bound  {_number(document['upper'], ROUND_CEILING):>12}  {certified}",
    ]
    if document["upper"] is not None and len(document["bounds"]) > 1:
        bounds = (f"{method} {_number(bound, ROUND_CEILING)}" for method, bound in document["bounds"].items())
        lines.append(f"  certified upper bounds by method: {', '.join(bounds)}")
    if document["tightness"] is not None:
        lines.append(f"  The certified bound is at most {document['tightness']:.4g} times the constant.")
    if document["passed"] is not None:
        outcome = "is kept" if document["passed"] else "is not kept"
        lines.append(f"  --max-bound {document['max_bound']} {outcome}.")
    return lines


def write_json(document: dict[str, Any], path: str) -> None:
    """Write the document to a file, or to standard output for ``"-"``.

    Raises:
        AuditError: If the file cannot be written.
    """
    text = json.dumps(document, allow_nan=False, indent=2) + "\n"
    if path == "-":
        sys.stdout.write(text)
        return
    try:
        write_text(text, Path(path))
    except OSError as error:
        raise AuditError(f"--json {path} cannot be written: {error}.") from error


def _layers(layers: list[dict[str, Any]]) -> Table:
    grid = make_table(
        "layers", ("layer", "operator"), ("sigma (estimate)", "sigma (certified)", "constant", "share of log-bound")
    )
    for layer in layers:
        name = f"{layer['name'] or '(the model)'} ({layer['kind']})"
        times = f" x{layer['multiplicity']}" if layer["multiplicity"] > 1 else ""
        share = "-" if layer["share"] is None else f"{layer['share']:.1%}"
        cells = (
            name + times,
            layer["operator"].removesuffix("Operator"),
            _number(layer["sigma"], ROUND_FLOOR),
            _number(layer["certified"], ROUND_CEILING),
            _number(layer["constant"], ROUND_CEILING),
            share,
        )
        # Names may hold brackets, which rich would read as styles.
        grid.add_row(*map(Text, cells))
    return grid


def _constants(nodes: list[dict[str, Any]]) -> Table:
    grid = make_table("other constants than 1", ("module", "operation", "rule"), ("constant",))
    for node in nodes:
        cells = (
            node["path"] or "(the model)",
            node["operation"],
            node["rule"],
            _number(node["constant"], ROUND_CEILING),
        )
        grid.add_row(*map(Text, cells))
    return grid


def rounded_up(value: float) -> str:
    """Return an upper bound in 6 digits that is one as printed."""
    return _rounded(value, ROUND_CEILING)


def _rounded(value: float, rounding: str) -> str:
    return f"{float(Context(prec=6, rounding=rounding).create_decimal_from_float(value)):.6g}"


def _number(value: float | None, rounding: str | None = None) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if rounding is None else _rounded(value, rounding)
