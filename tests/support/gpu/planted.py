"""Kernels with a planted fault: one piece of their source replaced."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

from lightning_lip.kernels.gpu import kernels, rayleigh_ritz, sweep, update


def kernels_with(folder, old, new):
    """Return all kernels, those of the one file that holds `old` with `new` in its place.

    Args:
        folder: Where to write the changed file: Triton reads a kernel's source from its file.
        old: A piece that occurs once in all sources.
        new: What to put there.
    """
    places = [m for m in (sweep, rayleigh_ritz, update) if old in Path(m.__file__).read_text()]
    if len(places) != 1 or Path(places[0].__file__).read_text().count(old) != 1:
        raise ValueError(f"Expected {old!r} once in the kernels' sources: the planted fault must hit one place.")
    path = Path(folder, "planted_kernels.py")
    path.write_text(Path(places[0].__file__).read_text().replace(old, new))
    spec = importlib.util.spec_from_file_location("planted_kernels", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["planted_kernels"] = module
    spec.loader.exec_module(module)
    names = kernels.__all__
    return SimpleNamespace(**{name: getattr(module, name, getattr(kernels, name)) for name in names})
