"""What is written of the scoreboard: the CSV file, the tables of the console and of the docs' page, and the figure.

``python -m lightning_lip.bench.scoreboard.report`` puts the tables of bench/results/scoreboard.json into
docs/scoreboard.md, and draws the figure anew.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console

from lightning_lip.reporting.console import make_table, print_line
from lightning_lip.reporting.documents import replacing, write_csv, write_text
from lightning_lip.reporting.extras import extra

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- what `make scoreboard` writes -->", "<!-- end -->"

COLUMNS = [
    "data",
    "network",
    "budget",
    "unit",
    "radius",
    "method",
    "group",
    "setting",
    "seeds",
    "step_ms",
    "steps",
    "validation",
    "accuracy",
    "accuracy_std",
    "certified",
    "certified_std",
    "by_numpy",
    "attacked",
]
"""Of the CSV file: shares are means over the seeds, on the test images, but for `validation`."""

STYLES = {
    "plain": ("#999999",),
    "ours": ("#56B4E9", "#CC79A7", "#0072B2", "#009E73", "#999933", "#332288", "#000000"),
    "peer": ("#D55E00", "#E69F00", "#882255"),
}
"""Colours by group, after Okabe and Ito, and Tol."""

LINES = {"ours": "-", "peer": "--", "plain": ":"}
FIGURE: dict[str, Any] = {"dpi": 100, "layout": "constrained"}
SPAN = 1.25
"""How far a panel reaches beyond the radius that its settings are chosen at."""


def row(values: Mapping[str, Any], outcomes: Sequence[Any], eps: Sequence[float], radii: Sequence[float]) -> Any:
    """Return a row of the document: what became of the seeds of one setting, chosen at a radius.

    Args:
        values: What is known of it beside: `radius` among it.
        outcomes: One for each seed.
        eps: Where `certified` and `by_numpy` of the outcomes are evaluated.
        radii: Where `attacked` is.
    """
    at, attacked_at = eps.index(values["radius"]), radii.index(values["radius"])
    certified = [outcome.certified[at] for outcome in outcomes]
    accuracy = [outcome.certified[0] for outcome in outcomes]
    return {
        **values,
        "seeds": len(outcomes),
        "accuracy": mean(accuracy),
        "accuracy_std": _std(accuracy),
        "certified": mean(certified),
        "certified_std": _std(certified),
        "by_numpy": mean(outcome.by_numpy[at] for outcome in outcomes),
        "attacked": mean(outcome.attacked[attacked_at] for outcome in outcomes),
        "curve": [mean(values) for values in zip(*(outcome.certified for outcome in outcomes), strict=True)],
    }


def _std(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def write_rows(found: Mapping[str, Any], path: Path) -> None:
    """Write all rows of a document as CSV, below what they depend on."""
    about = {**found["versions"], **found["machine"], **found["checks"]}
    write_csv(path, COLUMNS, [[_cell(r[c]) for c in COLUMNS] for b in found["boards"] for r in b["rows"]], about)


def _cell(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def print_tables(console: Console, found: Mapping[str, Any]) -> None:
    """Print a table a board, and what was checked."""
    for board in found["boards"]:
        title = f"{board['title']}: certified accuracy at eps (accuracy), {found['n_seeds']} seeds"
        grid = make_table(title, ["method"], ["ms a step", *(f"{radius:g}" for radius in board["radii"])])
        for cells in _lines(board):
            grid.add_row(*cells)
        console.print(grid)
    for line in checks(found):
        print_line(console, line)


def _lines(board: Mapping[str, Any]) -> list[list[str]]:
    """Return the cells of a board's table, a line a method."""
    lines = []
    for method in dict.fromkeys(r["method"] for r in board["rows"]):
        rows = [r for r in board["rows"] if r["method"] == method]
        shares = (f"{r['certified']:.3f} ± {r['certified_std']:.3f} ({r['accuracy']:.3f})" for r in rows)
        lines.append([rows[0]["title"], f"{rows[0]['step_ms']:.1f}", *shares])
    return lines


def checks(found: Mapping[str, Any]) -> list[str]:
    """Return what was checked of the certificates, in sentences."""
    known = found["checks"]
    lines = [
        f"The attack breaks {known['n_broken']} of {known['n_certified']} certified samples.",
        f"The certified norms exceed those by NumPy in float64 by {known['least_excess']:.1e} to "
        f"{known['largest_excess']:.1e}, relative; the certified accuracies differ by at most "
        f"{known['largest_difference']:.4f}.",
    ]
    if found["failed"]:
        lines.append(f"{len(found['failed'])} trainings failed and count as 0; scoreboard.json names them.")
    if found["missing"]:
        lines.append(f"Left out, not installed: {', '.join(f'{k} ({v})' for k, v in found['missing'].items())}.")
    return lines


def page(found: Mapping[str, Any]) -> str:
    """Return the figure and the tables as Markdown: the largest of each column in bold."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    lines = [
        "![Certified accuracy against eps](pictures/scoreboard.png)",
        "",
        f"Mean and standard deviation over {found['n_seeds']} seeds on the test images; in brackets the accuracy and "
        "what the attack leaves.",
        "",
    ]
    for board in found["boards"]:
        best = [max(r["certified"] for r in board["rows"] if r["radius"] == radius) for radius in board["radii"]]
        radii = " | ".join(f"certified at {radius:g} (accuracy; attacked)" for radius in board["radii"])
        lines += [f"### {board['title']}", "", f"| method | ms a step | steps | {radii} |"]
        lines.append(f"|---|---:|---:|{'---|' * len(best)}")
        for method in dict.fromkeys(r["method"] for r in board["rows"]):
            rows = [r for r in board["rows"] if r["method"] == method]
            cells = []
            for r, top in zip(rows, best, strict=True):
                bold = "**" if math.isclose(r["certified"], top) else ""
                spread = f"{bold}{r['certified']:.3f}{bold} ± {r['certified_std']:.3f}"
                cells.append(f"{spread} ({r['accuracy']:.3f}; {r['attacked']:.3f})")
            step_ms, steps = rows[0]["step_ms"], rows[0]["steps"]
            lines.append(f"| {rows[0]['title']} | {step_ms:.1f} | {steps} | {' | '.join(cells)} |")
        lines += ["", "Chosen settings:", "", f"| method | {' | '.join(f'at {x:g}' for x in board['radii'])} |"]
        lines.append(f"|---|{'---|' * len(best)}")
        for method in dict.fromkeys(r["method"] for r in board["rows"]):
            rows = [r for r in board["rows"] if r["method"] == method]
            lines.append(f"| {rows[0]['title']} | {' | '.join(r['setting'] for r in rows)} |")
        lines.append("")
    lines += [f"{' '.join(checks(found))} With {versions}, on {found['machine']['cpu']}."]
    return "\n".join(lines) + "\n"


def write_docs(found: Mapping[str, Any], path: Path) -> None:
    """Replace the tables of a page by those of a document.

    Raises:
        ValueError: If the page has no place for them.
    """
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"Expected {path} to hold {BEGIN!r} and, below it, {END!r}.")
    write_text(f"{before}{BEGIN}\n\n{page(found)}\n{END}{after}", path)


def figure(boards: Sequence[Mapping[str, Any]]) -> Any:
    """Draw the boards of a document; the legend of each has the CPU time of a step.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    n_panels = max(len(board["radii"]) for board in boards)
    size = (3.5 * n_panels + 3.2, 4.0 * len(boards))
    drawn = extra("matplotlib.figure", "scoreboard").Figure(size, **FIGURE)
    panels = drawn.subplots(len(boards), n_panels, squeeze=False)
    for board, line in zip(boards, panels, strict=True):
        for axes, radius in zip(line, board["radii"], strict=False):
            _panel(axes, board, radius)
        line[0].set_ylabel("certified accuracy on the test images", fontsize=9)
        for axes in line[len(board["radii"]) :]:
            axes.set_axis_off()
        last = line[len(board["radii"]) - 1]
        last.legend(
            *_legend(last, board),
            loc="center left",
            bbox_to_anchor=(1.02, 0.5),
            fontsize=8,
            frameon=False,
            title=board["title"],
            title_fontsize=8,
        )
    return drawn


def _panel(axes: Any, board: Mapping[str, Any], radius: float) -> None:
    rows = [row for row in board["rows"] if row["radius"] == radius]
    colours = {group: cycle(colours) for group, colours in STYLES.items()}
    for row in rows:
        group = row["group"]
        axes.plot(board["eps"], row["curve"], LINES[group], color=next(colours[group]), label=row["title"])
    at = board["eps"].index(radius)
    values = [row["curve"][at] for row in rows]
    axes.axvline(radius, color="#999999", linewidth=0.8)
    axes.set_xlim(0, SPAN * radius)
    # What a panel is for lies around its radius: a classifier without a certificate may leave it below.
    axes.set_ylim(max(0.0, sorted(values)[len(values) // 3] - 0.12), 1.0)
    axes.set_xlabel("eps", fontsize=9)
    axes.set_title(f"settings chosen at eps = {radius:g}", fontsize=9, loc="left")
    axes.grid(alpha=0.25)
    axes.tick_params(labelsize=8)


def _legend(axes: Any, board: Mapping[str, Any]) -> tuple[list[Any], list[str]]:
    handles, labels = axes.get_legend_handles_labels()
    times = {row["title"]: row["step_ms"] for row in board["rows"]}
    return handles, [f"{label}, {times[label]:.1f} ms a step" for label in labels]


def main() -> None:
    """Put the tables and the figure of bench/results/scoreboard.json into the docs."""
    found = json.loads((ROOT / "bench/results/scoreboard.json").read_text("utf-8"))
    write_docs(found, ROOT / "docs/scoreboard.md")
    drawn = figure(found["boards"])
    for path in (ROOT / "bench/results/scoreboard.png", ROOT / "docs/pictures/scoreboard.png"):
        with replacing(path) as beside:
            drawn.savefig(beside)


if __name__ == "__main__":
    main()
