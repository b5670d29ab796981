"""What a command has finished, kept on disk until all of it is, so that an interrupted command goes on from there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, TypeVar

from lightning_lip.reporting.documents import machine, write_text

Result = TypeVar("Result")


class Finished(Generic[Result]):
    """The results of finished tasks, in a file of one JSON line each, below a line of what they depend on.

    The results in a file are used if its settings, the package's sources and the machine are the same; otherwise the
    file is replaced. A line that was cut, by a kill, a full disk or a power cut, is left out, and its task done again.
    The file is written at once, so that a folder that cannot be written to is found before any work.

    Args:
        path: The file; its folder is made if it is missing.
        settings: What all results depend on beside their tasks; its `repr` is compared.
        decode: Makes a result from what JSON gives for it. Results are dataclasses, or of JSON's types.

    Attributes:
        results: By the task's `repr`.

    Raises:
        OSError: If the file cannot be written.
    """

    def __init__(self, path: Path, settings: object, decode: Callable[[Any], Result]) -> None:
        self._path = path
        about = json.dumps([repr(settings), _sources(), machine(), os.environ.get("LIGHTNING_LIP_BACKEND")])
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        kept = [line for line in lines[1:] if _is_json(line)] if lines[:1] == [about] else []
        self.results: dict[str, Result] = {task: decode(result) for task, result in map(json.loads, kept)}
        write_text("".join(f"{line}\n" for line in (about, *kept)), path)

    def add(self, task: object, result: Result) -> None:
        """Keep the result of a task.

        Raises:
            OSError: If it cannot be written.
        """
        self.results[repr(task)] = result
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([repr(task), result], default=asdict) + "\n")

    def once(self, task: object, compute: Callable[[], Result]) -> Result:
        """Return the result of a task, computed unless it is there."""
        if repr(task) not in self.results:
            self.add(task, compute())
        return self.results[repr(task)]

    def remove(self) -> None:
        """Remove the file: everything is done."""
        self._path.unlink()


def _is_json(line: str) -> bool:
    """Whether a line was written whole: no beginning of a JSON list is JSON."""
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _sources() -> str:
    """Return a checksum of the package's source files: other code may give other results under the same version."""
    digest = sha256()
    for package in ("lightning_lip", "lightning_lip.kernels", "lightning_lip.bench"):
        spec = find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            for file in sorted(Path(folder).rglob("*.py")):
                digest.update(file.read_bytes())
    return digest.hexdigest()
