"""The threads of torch's own OpenMP runtime, for the compiled CPU kernels."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import torch

from lightning_lip.kernels.cpu.loading import load_compiled

n_forks = 0
"""How many forks lie between this process and the one that imported this module."""


def _note_fork() -> None:
    global n_forks
    n_forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def pool_address() -> int:
    """Return the address of ``GOMP_parallel`` in the OpenMP runtime that torch has loaded; 0 if it cannot serve.

    It runs a function in a team of threads. Those of torch's own runtime have just worked for the backward pass and
    wait actively for more, where other threads would first have to take their cores from them. GCC's runtime has this
    function, and LLVM's and Intel's for compatibility. In a forked process the threads are gone, and there is no pool.
    """
    return 0 if n_forks else _find()


@functools.cache
def _find() -> int:
    for path in sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*")):
        try:
            # Loaded already, or not the one that torch runs on.
            library = ctypes.CDLL(str(path), mode=getattr(os, "RTLD_NOLOAD", 0) | ctypes.RTLD_LOCAL)
            function = library.GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0


def team(n_threads: int, name: str, function: Callable[[int], None]) -> tuple[int, int, int]:
    """Return what compiled code needs to run a function in a team of threads.

    Args:
        n_threads: The threads wanted.
        name: The function's name among those that are compiled or loaded once.
        function: What each thread runs with the address of a header.

    Returns:
        The address of ``GOMP_parallel``, that of the function, and the number of threads; (0, 0, 1) without a pool.
    """
    pool = pool_address() if n_threads > 1 else 0
    if not pool:
        return 0, 0, 1
    load_compiled(name, lambda: _address_of(function))
    return pool, _address_of(function), n_threads


@functools.cache
def _address_of(function: Callable[[int], None]) -> int:
    compiled: Any = numba.cfunc("void(int64)", cache=True, error_model="numpy")
    address: int = compiled(function).address
    return address
