"""Popular models with the callbacks at their defaults: which train as they do without, and what is known of them.

``python -m lightning_lip.bench.zoo.run [--workers N] [--limit SECONDS] [--output FOLDER] [MODEL ...]`` (``make zoo``)
trains each model of :data:`ENTRIES` on the CPU, with random weights and one fixed random batch
of 8, for 20 steps of SGD (learning rate .01, momentum .9) and of Adam (1e-3), without callbacks and with
``LipschitzPenalty()`` and ``LipschitzMonitor()``, from the same weights and random numbers. A model holds if all of it
ran and neither loss ends above twice the loss without, plus .1. Then its graph is traced: the bound of the whole
network with its first weights (spectral norms are estimates from below), or every reason why there is none.

It writes ``zoo.csv``, and the table of ``docs/zoo.md`` from it. Each model has a process of its own, with a limit of
time and of memory, so that a crash is a row and not the end. An interrupted run goes on where it was. With names of
models only these are run and printed, and nothing is written.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import tempfile
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lightning_lip.bench.studies.options import study_parser
from lightning_lip.bench.zoo import graphs, language, plain, vision
from lightning_lip.bench.zoo.measure import OPTIMIZERS, Row, as_row, measure, quiet
from lightning_lip.bench.zoo.table import DOCS, summary, write_docs, write_rows
from lightning_lip.reporting.console import make_console, print_line
from lightning_lip.reporting.documents import versions
from lightning_lip.reporting.finished import Finished
from lightning_lip.reporting.progress import map_with_progress

# Only a model that is built imports its package.
ENTRIES = {entry.name: entry for room in (plain, vision, language, graphs) for entry in room.ENTRIES}

LIMIT = 900.0
MEMORY = 8 << 30
PACKAGES = ("lightning", "torchvision", "timm", "transformers", "torch_geometric")


@dataclass(frozen=True)
class Job:
    """A model to run, and the seconds that it may take."""

    name: str
    limit: float

    def __str__(self) -> str:
        return self.name


def run(job: Job) -> Row:
    """Run a model in a process of its own; return what is known of it when that ends, for whatever reason."""
    # A server that has imported everything forks the processes: the imports take longer than most models.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning_lip.bench.zoo.measure", *PACKAGES])
    with tempfile.TemporaryDirectory() as folder:
        path, output = Path(folder) / "row.json", Path(folder) / "output.txt"
        process = context.Process(target=_child, args=(job.name, path, output))
        process.start()
        process.join(job.limit)
        error = ""
        if process.is_alive():
            process.kill()
            process.join()
            error = f"took more than {job.limit:g} seconds"
        elif process.exitcode and process.exitcode < 0:
            error = f"ended by signal {-process.exitcode}"
        elif process.exitcode:
            error = raised(output.read_text(errors="replace")) if output.exists() else f"ended with {process.exitcode}"
        row = as_row(json.loads(path.read_text())) if path.exists() else Row(job.name, stage="start")
        row.error = error
        return row


def raised(output: str) -> str:
    """Return the exception of the last traceback in what a process printed, its first line."""
    lines = output.strip().split("\n")
    start = max([i for i, line in enumerate(lines) if line.startswith("Traceback ")], default=len(lines) - 1)
    return next((line for line in lines[start + 1 :] if line and not line.startswith(" ")), lines[-1])[:500]


def _child(name: str, path: Path, output: Path) -> None:
    """Run a model in this process, and keep what is known of it in a file; what is printed goes to another."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    threading.Thread(target=end_with_parent, daemon=True).start()
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    quiet()
    for row in measure(ENTRIES[name]):
        beside = path.with_suffix(".new")
        beside.write_text(json.dumps(asdict(row)))
        beside.replace(path)


def end_with_parent() -> None:
    """End this process when the one that asked for it ends: the server of forks lives as long as its processes."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def main() -> None:
    """Run the zoo, or some of its models."""
    parser = study_parser(__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="only these, e.g. timm/deit")
    parser.add_argument("--workers", type=int, default=1, help="processes at a time, of one thread each")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for one model")
    parser.add_argument("--docs", type=Path, default=DOCS, help="the page whose table is replaced")
    arguments = parser.parse_args()
    console = make_console()
    if arguments.models:
        for name in arguments.models:
            print_line(console, summary(run(Job(name, arguments.limit))))
        return
    about = versions(*PACKAGES)
    finished = Finished(arguments.output / "zoo.partial.jsonl", (about, list(OPTIMIZERS)), as_row)
    jobs = [Job(name, arguments.limit) for name in ENTRIES]
    rows = map_with_progress(console, "models", run, jobs, arguments.workers, finished)
    write_rows(rows, arguments.output / "zoo.csv", about)
    write_docs(rows, arguments.docs, about)
    finished.remove()
    for row in rows:
        print_line(console, summary(row))


if __name__ == "__main__":
    main()
