"""The files that commands leave, each written whole or not at all, and what they say about versions and the machine."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lightning_lip.errors import UsageError


def out_folder(out: str) -> Path:
    """Return the folder of `--out`, which need not exist yet.

    Raises:
        UsageError: If it is a file, or no name.
    """
    if not out or "\0" in out:
        raise UsageError(f"Expected --out to be the name of a folder, got {out!r}.")
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"Expected --out to be a folder, {out} is a file.")
    return folder


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Let a file be written whole or not at all; its folder is made if it is missing.

    Yields:
        A path beside it, with the same suffix, to write to. What is there at the end takes the file's place, once it is
        on the disk: a power cut leaves the old file or the new one. An error, such as a full disk, or an interrupt
        leaves the file as it was.

    Raises:
        OSError: If the file cannot be written.
    """
    # A link stays a link: what it points to is replaced.
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield beside
        with beside.open("r+b") as file:  # Windows flushes only what may be written to
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(text: str, path: Path) -> None:
    """Write a file whole or not at all; its folder is made if it is missing.

    Raises:
        OSError: If the file cannot be written.
    """
    if path.exists() and not path.is_file():
        # A pipe or a device is written to, not replaced.
        path.write_text(text, encoding="utf-8", newline="")
        return
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8", newline="")


def write_json(document: Mapping[str, Any], path: Path, indent: int | None = None) -> None:
    """Write a JSON document.

    Raises:
        ValueError: If a number is not finite: JSON has none. No file is written then.
        OSError: If the file cannot be written.
    """
    write_text(json.dumps(document, allow_nan=False, indent=indent) + "\n", path)


def write_csv(
    path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]], about: Mapping[str, Any] | None = None
) -> None:
    """Write a table, below a comment line ``# key: value`` for each entry of `about`.

    Raises:
        OSError: If the file cannot be written.
    """
    text = io.StringIO()
    text.writelines(f"# {key}: {value}\n" for key, value in (about or {}).items())
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    write_text(text.getvalue(), path)


def remove_events(folder: Path) -> None:
    """Remove TensorBoard's files of an earlier run, whose events it would draw into the same curves."""
    for file in folder.glob("events.out.tfevents.*"):
        file.unlink()


def versions(*packages: str) -> dict[str, str | None]:
    """Return the versions of Python, torch (with its build) and packages, by name; None for one not installed."""
    own = {"python": platform.python_version(), "torch": str(torch.__version__)}
    return own | {name: _version(name) for name in packages}


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """Return what measured times depend on.

    Args:
        device: Where was measured; by default the current GPU, or the CPU where there is none.

    Returns:
        The processor (`cpu`), its `cores`, torch's `threads`, the `device` and the name of the `gpu`, or None.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": torch.multiprocessing.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
