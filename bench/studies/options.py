"""What the command lines of the studies share, and the processes that they start."""

from __future__ import annotations

import argparse
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"


def study_parser(description: str | None, quick: str | None = None) -> argparse.ArgumentParser:
    """Return a parser with `--output`, by default this checkout's bench/results, and `--quick` if it is explained.

    Args:
        description: The study's docstring.
        quick: What `--quick` changes; None for a study without it.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="the folder of the files")
    if quick is not None:
        parser.add_argument("--quick", action="store_true", help=quick)
    return parser


def run_process(command: Sequence[str], timeout: float | None = None) -> str:
    """Run a command with one thread and return what it prints; raise RuntimeError with that if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return done.stdout
