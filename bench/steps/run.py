"""The benchmark from its options to the files that it leaves."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lightning_lip.bench.contenders.models import MODELS
from lightning_lip.bench.steps import report
from lightning_lip.bench.steps.figures import write_figures
from lightning_lip.bench.steps.growth import DEPTH_OF_WIDTHS, DEPTHS, WIDTH_OF_DEPTHS, WIDTHS, growth
from lightning_lip.bench.steps.measure import measure
from lightning_lip.bench.steps.tables import PACKAGES, document, points_from_json, result_from_json, write_csv_files
from lightning_lip.errors import UsageError
from lightning_lip.reporting.console import make_console, print_line
from lightning_lip.reporting.documents import versions, write_json
from lightning_lip.reporting.finished import Finished
from lightning_lip.reporting.progress import timed_progress

PLAIN_WIDTH = 160
"""Columns of the tables where there is no terminal."""

SECONDS = {"paper": 15.0, "mnist": 30.0, "resnet18": 60.0, "vit": 30.0, "gpt2": 55.0}
"""Time for the rounds of each model, about, up to twice that; starts, memory and errors come on top."""

SECONDS_A_SIZE = 3.0
"""The same for each size of the growth."""

QUICK_SECONDS = 1.0
QUICK_SIZES = [(2, 16), (2, 32), (2, 64), (4, 64)]


def run(
    names: Sequence[str], folder: Path, *, quick: bool, device: torch.device, threads: int | None
) -> dict[str, Any]:
    """Measure the models `names` and the growth, print the report and write the files.

    What is finished stays in files *.partial.jsonl until bench.json is written: the same options go on from there.

    Args:
        names: Names of :data:`~lightning_lip.bench.contenders.models.MODELS`.
        folder: Where the files go; made if missing.
        quick: Few steps and small sizes.
        device: Where to train.
        threads: torch's threads; None leaves them. They are put back at the end.

    Returns:
        The contents of bench.json.

    Raises:
        OSError: If a file cannot be written.
    """
    console = make_console(PLAIN_WIDTH)
    threads_before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    start = time.monotonic()
    depths = [(depth, WIDTH_OF_DEPTHS) for depth in DEPTHS]
    widths = [(DEPTH_OF_WIDTHS, width) for width in WIDTHS]
    sizes = QUICK_SIZES if quick else sorted({*depths, *widths})
    try:
        settings = (quick, str(device), versions(*PACKAGES))
        models = Finished(folder / "models.partial.jsonl", settings, result_from_json)
        grown = Finished(folder / "growth.partial.jsonl", settings, points_from_json)
        n_done = sum(repr(task) in {**models.results, **grown.results} for task in (*names, *sizes))
        if n_done:
            print_line(console, f"continuing: {n_done} of {len(names) + len(sizes)} models and sizes are done")
        seconds = {name: QUICK_SECONDS if quick else SECONDS[name] for name in names}
        expected = {repr(name): part for name, part in seconds.items()}
        expected |= {repr(size): SECONDS_A_SIZE for size in sizes}
        left = {task: part for task, part in expected.items() if task not in {**models.results, **grown.results}}
        with timed_progress(console, sum(left.values())) as (on_step, on_done):
            results = []
            for name in names:
                compute = partial(measure, name, MODELS[name], device, seconds[name], on_step)
                results.append(models.once(name, compute))
                on_done(left.get(repr(name), 0.0))
                report.print_result(console, results[-1])
            points = []
            for size in sizes:
                points += grown.once(size, partial(growth, [size], device, on_step))
                on_done(left.get(repr(size), 0.0))
        found = document(results, points, device, quick=quick)
    finally:
        torch.set_num_threads(threads_before)
    report.print_growth(console, points)
    write_csv_files(found, folder)
    found["figures"] = write_figures(found, folder)
    found["seconds"] = round(time.monotonic() - start, 1)
    write_json(found, folder / "bench.json", indent=1)
    models.remove()
    grown.remove()
    report.print_end(console, found, folder)
    return found


def chosen_device(name: str) -> torch.device:
    """Return the device of `--device`.

    Raises:
        UsageError: If it is neither the CPU nor a CUDA device that is there.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise UsageError(f"Expected --device cpu, cuda or cuda:<number>, got {name!r}.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"Expected --device {name} to be there, found {torch.cuda.device_count()} CUDA devices.")
    return device
