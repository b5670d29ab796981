"""What the command lines of the studies share."""

from __future__ import annotations

import argparse
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
