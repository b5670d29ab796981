"""Ahead-of-time compilation of the Triton kernels for GPUs that are not there, and what the machine code says."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_lip.kernels.gpu import iteration as gpu
from lightning_lip.kernels.gpu import kernels as gpu_kernels
from lightning_lip.kernels.gpu import tables as gpu_tables

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
WARPS = {"sm_80": 8, "sm_90": 8, "sm_100": 8, "gfx942": 4}
TYPES = {
    "addresses": "*i64", "layers": "*i64", "strips": "*i32", "tasks": "*i32", "tables": "*i64", "tiles": "*i32",
    "grams": "*fp64", "rotations": "*fp64", "scalars": "*fp64", "multiplicities": "*fp64", "n_layers": "i32",
    "level_high": "fp32", "level_low": "fp32", "scale_high": "fp32", "scale_low": "fp32",
}  # fmt: skip


def compile_kernel(kernel, constants, target="sm_90"):
    """Compile a kernel; every pointer is taken as 16-byte aligned, as the launcher finds PyTorch's buffers."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else TYPES.get(name, "*fp32") for name in names}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(names)
            # Slices of the table of strips, tasks and tiles begin at any row of 16 bytes; all others at a tensor.
            if signature[name].startswith("*")
        },
    )
    return triton.compile(
        source, target=TARGETS[target], options={"num_warps": WARPS[target], "enable_fp_fusion": True}
    )


@cache
def compile_sweep(dtype, block, tiles, aligned, only_t=False, target="sm_90"):
    return compile_kernel(gpu_kernels.sweep, gpu.sweep_constants(dtype, block, tiles, aligned, only_t), target)


@cache
def compile_small(name, block, only_t=False, code=0, target="sm_90"):
    """Compile one of the kernels that follow the sweep."""
    columns = gpu.columns_at_a_time(block)
    sizes = {"R": block, "BC": columns, "SHORT": gpu_tables.SHORT_TASK}
    constants = {
        "reduce": sizes | {"LONG": gpu_tables.LONG_TASK},
        "solve": {"R": block, "ONLY_T": only_t},
        "form": sizes | {"LONG": gpu_tables.LONG_TASK, "ONLY_T": only_t},
        "orthonormalise": sizes,
        "coefficients": {"CODE": code, "BL": 128},
    }[name]
    return compile_kernel(getattr(gpu_kernels, name), constants, target)


@cache
def compile_rank_one(dtype, aligned, target="sm_90"):
    height, width = gpu_tables.RANK_ONE_TILE
    constants = {
        "DTYPE": gpu.triton_dtype(dtype), "VEC": 16 // dtype.itemsize, "BM": height, "BN": width, "ALIGNED": aligned,
    }  # fmt: skip
    return compile_kernel(gpu_kernels.rank_one, constants, target)


@dataclass
class Report:
    """What the machine code of one kernel uses.

    Attributes:
        registers: Registers a thread (vector registers on AMD).
        stack: Bytes of stack and local memory a thread.
        spills: Loads and stores of spilled registers (AMD: spilled registers).
        shared: Bytes of shared memory.
        streams: Counts of the accesses of weights and gradients by their width in bits (evict-first on NVIDIA; on AMD
            every global load and store).
        atomics: Atomic instructions.
    """

    registers: int
    stack: int
    spills: int
    shared: int
    streams: Counter
    atomics: list

    def widths(self, kind):
        """Return the widths of the loads, or stores, that are there."""
        return {bits for of, bits in self.streams if of == kind}


def inspect(compiled):
    """Return the :class:`Report` of a compiled kernel."""
    if "cubin" in compiled.asm:
        return _inspect_cubin(compiled.asm["cubin"], compiled.metadata.shared)
    return _inspect_amdgcn(compiled.asm["amdgcn"], compiled.metadata.shared)


def _inspect_cubin(cubin, shared):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        sass = subprocess.run([TOOLS / "nvdisasm", "-c", path], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage.stdout)
    registers, stack, local = map(int, found.groups())
    operations = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.a-z]+)", sass, re.M)
    streams = Counter()
    for operation in operations:
        # The weights and gradients are loaded evict-first.
        is_load = operation.startswith("LDG") and ".EF" in operation
        if is_load or operation.startswith("STG"):
            width = re.search(r"\.(?:[US](8|16)|(64|128))$", operation)
            streams["load" if is_load else "store", int(width[1] or width[2]) if width else 32] += 1
    spills = sum(operation.startswith(("LDL", "STL")) for operation in operations)
    atomics = [operation for operation in operations if operation.startswith(("ATOM", "RED."))]
    return Report(registers, stack + local, spills, shared, streams, atomics)


def _inspect_amdgcn(text, shared):
    def number(name):
        return int(re.search(rf"\.{name}:\s*(\d+)", text)[1])

    streams = Counter()
    for kind, suffix in re.findall(r"\b(?:global|buffer)_(load|store)_(\w+)", text):
        bits = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32}.get(suffix, 16)
        streams[kind, bits] += 1
    atomics = re.findall(r"\b(?:global|buffer|flat|ds)_atomic_\w+", text)
    # Scalar registers spill into lanes of vector registers (counted as these), not into memory.
    spills = number("vgpr_spill_count")
    return Report(number("vgpr_count"), number("private_segment_fixed_size"), spills, shared, streams, atomics)


def all_tiles(block, itemsize, orientation, widths=(32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)):
    """Return the distinct tiles that a block size and an orientation may meet."""
    return list(dict.fromkeys(gpu_tables.choose_tile(p, block, itemsize, orientation) for p in widths))
