"""Runs GpuIteration on host memory: every launch goes through the PTX executor instead of a GPU."""

from __future__ import annotations

import torch

from lightning_lip.kernels.gpu import iteration as gpu
from lightning_lip.kernels.gpu import kernels as gpu_kernels

from . import aot, planted, ptx

PROGRAMS = {}
NAMES = ("sweep", "reduce", "solve", "form", "orthonormalise", "coefficients", "rank_one")


class Stop(Exception):  # noqa: N818
    """The launch after which a test wants to stop is done."""


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
        self.memory = ptx.Memory()
        self.target, self.backwards, self.edit, self.stop_after = target, backwards, edit, stop_after
        self.hints, self.planted = hints or {}, source is not None
        module = gpu_kernels if source is None else planted.kernels_with(*source)
        for name in NAMES:
            setattr(self, name, _Launcher(self, getattr(module, name)))

    def launch(self, kernel, grid, arguments, constants):
        name = kernel.fn.__name__
        constants = dict(constants) | self.hints.get(name, {})
        constants.pop("num_warps")
        program = self._program(kernel, name, constants)
        passed = []
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                self.memory.add(f"{name}:{kernel.arg_names[len(passed)]}", argument)
                argument = argument.data_ptr()
            passed.append(argument)
        # Triton appends pointers to two scratch areas that these kernels do not use.
        order = range(grid)[::-1] if self.backwards else range(grid)
        program.launch(self.memory, [*passed, 0, 0], order)
        if name == self.stop_after:
            raise Stop

    def _program(self, kernel, name, constants):
        key = (name, self.target, repr(sorted(constants.items())))
        if self.planted or key not in PROGRAMS:
            compiled = aot.compile_kernel(kernel, constants, self.target)
            text, shared = compiled.asm["ptx"], compiled.metadata.shared
            if self.planted:
                return ptx.Program(text, shared)
            PROGRAMS[key] = (text, shared, ptx.Program(text, shared))
        text, shared, program = PROGRAMS[key]
        return program if self.edit is None else ptx.Program(self.edit(name, text), shared)


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
