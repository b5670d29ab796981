"""The ground that compiled CPU code stands on: how it is compiled, numbers at an address, and LLVM instructions.

Everything that is compiled by Numba imports this module.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

_F = TypeVar("_F", bound=Callable[..., Any])
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


def sources_checksum() -> int:
    """Return a checksum of the sources of everything that is compiled: a part of the keys of Numba's cache."""
    here = Path(__file__).parent
    names = ("penalties", "symbol", "scalars", "frequencies")
    constants = [here.parent / "layout.py", *(here.parents[1] / f"{name}.py" for name in names)]
    return zlib.crc32(b"".join(path.read_bytes() for path in [*constants, *sorted(here.rglob("*.py"))]))


def compiled(function: _F) -> _F:
    """Compile a function that compiled code calls; only what Python calls is cached, with all that it calls."""
    # No `nnan` and `ninf`: a NaN in a weight must arrive as NaN in sigma.
    flags = {"reassoc", "contract", "nsz", "arcp"}
    return cast(_F, numba.njit(fastmath=flags, nogil=True, error_model="numpy")(function))


def _view_of(element: Any) -> Any:
    """Return a compiled function ``(address, size)``: the numbers there, as an array that shares their memory."""

    def cast_address(context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(address), generate

    pointer = intrinsic(cast_address)

    @compiled
    def view(address: int, size: int) -> Any:
        return numba.carray(pointer(address), (size,))

    return view


f32: Callable[[int, int], F32] = _view_of(types.float32)
f64: Callable[[int, int], F64] = _view_of(types.float64)
i64: Callable[[int, int], I64] = _view_of(types.int64)
u16: Callable[[int, int], NDArray[np.uint16]] = _view_of(types.uint16)
u32: Callable[[int, int], NDArray[np.uint32]] = _view_of(types.uint32)


LANES = 8
INT, FLOAT, DOUBLE = ir.IntType(64), ir.FloatType(), ir.DoubleType()
VECTOR, WIDE = ir.VectorType(FLOAT, LANES), ir.VectorType(DOUBLE, LANES)
FAST = ("reassoc", "contract", "nsz", "arcp")


class Emitter:
    """Writes LLVM instructions on fp32 (or fp64) memory at computed addresses."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def at(self, base: Any, *offsets: Any, size: int = 4) -> Any:
        """Return ``base + size * sum(offsets)``."""
        for offset in offsets:
            base = self.builder.add(base, self.builder.mul(offset, INT(size)))
        return base

    def load(self, address: Any, kind: Any) -> Any:
        """Return the number or vector at an address."""
        value = self.builder.load(self.builder.inttoptr(address, kind.as_pointer()))
        value.align = 8 if kind in (WIDE, DOUBLE) else 4
        return value

    def store(self, value: Any, address: Any) -> None:
        """Write a number or vector to an address."""
        instruction = self.builder.store(value, self.builder.inttoptr(address, value.type.as_pointer()))
        instruction.align = 8 if value.type == WIDE else 4

    def prefetch(self, address: Any) -> None:
        """Ask for the cache line of an address, to be read soon."""
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        function = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.prefetch.p0i8")
        # To read, into the second-level cache, data.
        self.builder.call(function, [self.builder.inttoptr(address, pointer), number(0), number(2), number(1)])

    def splat(self, scalar: Any, kind: Any) -> Any:
        """Return a vector whose eight numbers are all `scalar`."""
        one = self.builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.IntType(32)(0))
        mask = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        return self.builder.shuffle_vector(one, one, mask)

    def add(self, a: Any, b: Any) -> Any:
        """Return ``a + b``, which LLVM may reassociate."""
        return self.builder.fadd(a, b, flags=FAST)

    def mul(self, a: Any, b: Any) -> Any:
        """Return ``a * b``."""
        return self.builder.fmul(a, b, flags=FAST)

    def variables(self, kind: Any, count: int) -> list[Any]:
        """Return stack slots set to zero, which LLVM turns into registers."""
        slots = [cgutils.alloca_once(self.builder, kind) for _ in range(count)]
        for slot in slots:
            self.builder.store(ir.Constant(kind, None), slot)
        return slots

    def add_to(self, slot: Any, value: Any) -> None:
        """Add a value to a stack slot."""
        self.builder.store(self.add(self.builder.load(slot), value), slot)

    def sum_of(self, vector: Any) -> Any:
        """Return the sum of a vector's eight numbers."""
        kind = ir.FunctionType(FLOAT, [FLOAT, VECTOR])
        function = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.vector.reduce.fadd.v8f32")
        return self.builder.call(function, [FLOAT(0.0), vector], fastmath=FAST)

    def for_range(self, count: Any) -> Any:
        """Return the context of a loop of `count` rounds; its ``index`` counts them."""
        return cgutils.for_range(self.builder, count, intp=INT)


def emitted(emit: Callable[..., Any], result: Any = types.void) -> Any:
    """Return a function for compiled code, whose instructions `emit` writes; all its arguments are int64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = emit(Emitter(builder), *arguments)
        return context.get_dummy_value() if value is None else value

    _, *names = inspect.signature(emit).parameters
    signature = result(*[types.int64] * len(names))
    # `intrinsic` looks at the number of parameters.
    typed = eval(f"lambda context, {', '.join(names)}: found", {"found": (signature, generate)})
    typed.__name__, typed.__doc__ = emit.__name__, emit.__doc__
    return intrinsic(typed)
