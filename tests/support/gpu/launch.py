"""Runs GpuIteration on host memory: every launch goes through the PTX executor instead of a GPU."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lightning_lip.kernels.gpu import iteration as gpu
from lightning_lip.kernels.gpu import kernels as gpu_kernels

from . import aot, planted, ptx, ptx_grammar, ptx_memory

PROGRAMS = {}
"""{key: (PTX, bytes of shared memory, program, or the error)} of every kernel that was decoded."""
NAMES = ("sweep", "reduce", "solve", "form", "orthonormalise", "coefficients", "rank_one")


class Stop(Exception):  # noqa: N818
    """The launch after which a test wants to stop is done."""


class Request(NamedTuple):
    """A kernel as a launch asks for it: its name, its constants as sorted pairs, the GPU."""

    name: str
    constants: tuple
    target: str


def compiled(kernel, request):
    """Return a kernel's PTX and its bytes of shared memory."""
    result = aot.compile_kernel(kernel, dict(request.constants), request.target)
    return result.asm["ptx"], result.metadata.shared


def decoded(request):
    """Return ``(PTX, bytes of shared memory, program)`` of a kernel of the package, decoded once in a process.

    Raises:
        UnknownInstructionsError: The PTX has instructions that the executor does not know.
    """
    key = repr(request)
    if key not in PROGRAMS:
        text, shared = compiled(getattr(gpu_kernels, request.name), request)
        try:
            PROGRAMS[key] = (text, shared, ptx.Program(text, shared))
        except ptx_grammar.UnknownInstructionsError as error:
            PROGRAMS[key] = (text, shared, error)
    if isinstance(PROGRAMS[key][2], ptx_grammar.UnknownInstructionsError):
        raise PROGRAMS[key][2]
    return PROGRAMS[key]


class _Launcher:
    """Stands in for one Triton kernel: compiles it with the arguments' constants and executes its PTX."""

    def __init__(self, machine, kernel):
        self.machine, self.kernel = machine, kernel

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.machine.launch(self.kernel, grid[0], arguments, constants)


class Machine:
    """Host memory, and the kernels as the executor runs them.

    Args:
        target: The GPU whose PTX is run.
        backwards: Whether the programs of a launch run last to first.
        edit: ``(kernel name, ptx) -> ptx``, to plant a fault.
        hints: Constants that override a kernel's, to plant a false alignment hint.
        source: (folder, old, new): a piece of the kernels' source to replace, to plant a fault.
        stop_after: The kernel after whose first launch :class:`Stop` is raised.
    """

    def __init__(self, target="sm_90", backwards=False, edit=None, hints=None, source=None, stop_after=None):
        self.memory = ptx_memory.Memory()
        self.target, self.backwards, self.edit, self.stop_after = target, backwards, edit, stop_after
        self.hints = hints or {}
        module = gpu_kernels if source is None else planted.kernels_with(*source)
        for name in NAMES:
            setattr(self, name, _Launcher(self, getattr(module, name)))

    def launch(self, kernel, grid, arguments, constants):
        name = kernel.fn.__name__
        constants = dict(constants) | self.hints.get(name, {})
        constants.pop("num_warps")
        self._run(kernel, Request(name, tuple(sorted(constants.items())), self.target), grid, arguments)
        if name == self.stop_after:
            raise Stop

    def _run(self, kernel, request, grid, arguments):
        program = self._program(kernel, request)
        passed = []
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                self.memory.add(f"{request.name}:{kernel.arg_names[len(passed)]}", argument)
                argument = argument.data_ptr()
            passed.append(argument)
        # Triton appends pointers to two scratch areas that these kernels do not use.
        order = range(grid)[::-1] if self.backwards else range(grid)
        program.launch(self.memory, [*passed, 0, 0], order)

    def _decoded(self, request):
        return decoded(request)

    def _program(self, kernel, request):
        # The kernel itself comes first, whatever is planted: an instruction that it has is not the planted fault's.
        text, shared, program = self._decoded(request)
        if kernel is not getattr(gpu_kernels, request.name):
            return ptx.Program(*compiled(kernel, request))
        return program if self.edit is None else ptx.Program(self.edit(request.name, text), shared)


class HostIteration(gpu.GpuIteration):
    """A GpuIteration whose weights lie on the CPU and whose kernels the executor runs."""

    def __init__(self, weights, vectors, machine):
        self.machine = machine
        for index, weight in enumerate(weights):
            machine.memory.add(f"weight{index}", weight, track_rereads=True)
        super().__init__(weights, vectors)

    @staticmethod
    def why_not(weight, block_size):
        return None

    def _kernels(self):
        return self.machine
