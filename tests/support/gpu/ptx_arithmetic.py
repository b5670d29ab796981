"""What single PTX instructions compute, for all threads of a program at once, in NumPy; nothing here touches memory."""

from __future__ import annotations

from functools import partialmethod

import numpy as np

from . import ptx_grammar

U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
F16, F32, F64 = np.float16, np.float32, np.float64
UNSIGNED = {16: U16, 32: U32, 64: U64}
SIGNED = {16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {16: F16, 32: F32, 64: F64}
KINDS = {"f": FLOAT, "s": SIGNED, "u": UNSIGNED, "b": UNSIGNED}
COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


class Arithmetic:
    """The registers of one program and the instructions that read and write nothing else.

    Args:
        n: Threads.
        number: The program's number.
        constants: {(number, bits): array}, which the programs of a kernel share.

    The methods ``op_...`` take the instruction and the threads in which it is active. `all_active` says whether these
    are all.
    """

    def __init__(self, n, number, constants):
        self.n, self.constants, self.all_active = n, constants, True
        self.registers = {name: np.zeros(n, U32) for name in ptx_grammar.SPECIAL}
        self.registers["%tid.x"] = np.arange(n, dtype=U32)
        self.registers["%ctaid.x"] = np.full(n, number, U32)

    # Operands -------------------------------------------------------------------------------------------------

    def value(self, operand, bits):
        """Return an operand as unsigned bits."""
        if isinstance(operand, str):
            return self.registers[operand]
        known = self.constants
        if (operand, bits) not in known:
            known[operand, bits] = np.full(self.n, operand & ((1 << bits) - 1), UNSIGNED[bits])
            known[operand, bits].flags.writeable = False
        return known[operand, bits]

    def predicate(self, operand):
        return self.registers[operand] if isinstance(operand, str) else np.full(self.n, operand != 0)

    def typed(self, operand, dtype):
        """Return an operand as numbers of a PTX type; of a wider register, the low bits."""
        bits = int(dtype[1:])
        value = self.value(operand, bits)
        if value.dtype.itemsize * 8 > bits:
            value = value.astype(UNSIGNED[bits])
        return value.view(KINDS[dtype[0]][bits])

    def floats(self, i, operands):
        """Return operands of the instruction's floating type, subnormal numbers as zero where it says so."""
        values = [self.value(operand, i.bits).view(FLOAT[i.bits]) for operand in operands]
        return [_flushed(value) for value in values] if "ftz" in i.words else values

    def put(self, register, value, active):
        """Write a register where `active`; values come as unsigned bits or booleans."""
        if register == "_":
            return
        if not self.all_active:
            old = self.registers.get(register)
            value = np.where(active, value, np.zeros_like(value) if old is None else old)
        self.registers[register] = value

    def put_float(self, i, value, active):
        value = value.astype(FLOAT[i.bits])
        self.put(i.operands[0], (_flushed(value) if "ftz" in i.words else value).view(UNSIGNED[i.bits]), active)

    # Copies and conversions -----------------------------------------------------------------------------------

    def op_createpolicy(self, i, active):
        self.put(i.operands[0], np.zeros(self.n, U64), active)

    def op_mov(self, i, active):
        to, source = i.operands
        if isinstance(to, tuple):
            whole, half = self.value(source, i.bits), i.bits // 2
            for number, register in enumerate(to):
                self.put(register, (whole >> UNSIGNED[i.bits](half * number)).astype(UNSIGNED[half]), active)
        elif isinstance(source, tuple):
            low, high = (self.value(part, i.bits // 2).astype(UNSIGNED[i.bits]) for part in source)
            self.put(to, low | (high << UNSIGNED[i.bits](i.bits // 2)), active)
        else:
            self.put(to, self.predicate(source) if i.bits is None else self.value(source, i.bits), active)

    def op_cvt(self, i, active):
        target, source = i.types
        to, *sources = i.operands
        if target in ("bf16x2", "f16x2"):
            high, low = (self._half(operand, target[:-2]).astype(U32) for operand in sources)
            self.put(to, (high << U32(16)) | low, active)
        elif target in ("bf16", "f16"):
            self.put(to, self._half(sources[0], target), active)
        elif source == "bf16":
            self.put(to, self.value(sources[0], 16).astype(U32) << U32(16), active)
        else:
            bits = int(target[1:])
            value = self.typed(sources[0], source).astype(KINDS[target[0]][bits])
            self.put(to, value.view(UNSIGNED[bits]), active)

    def _half(self, operand, dtype):
        bits = self.value(operand, 32)
        if dtype == "f16":
            return bits.view(F32).astype(F16).view(U16)
        rounded = (bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16)
        return np.where(np.isnan(bits.view(F32)), U32(0x7FFF), rounded).astype(U16)

    # Arithmetic -----------------------------------------------------------------------------------------------

    def _binary(self, i, active, floats, integers):
        dtype = i.types[0]
        if dtype == "pred":
            self.put(i.operands[0], integers(*map(self.predicate, i.operands[1:])), active)
        elif dtype[0] == "f":
            self.put_float(i, floats(*self.floats(i, i.operands[1:])), active)
        else:
            x, y = (self.typed(operand, dtype) for operand in i.operands[1:])
            self.put(i.operands[0], integers(x, y).view(UNSIGNED[i.bits]), active)

    op_add = partialmethod(_binary, floats=np.add, integers=np.add)
    op_sub = partialmethod(_binary, floats=np.subtract, integers=np.subtract)
    op_and = partialmethod(_binary, floats=None, integers=np.bitwise_and)
    op_or = partialmethod(_binary, floats=None, integers=np.bitwise_or)
    op_xor = partialmethod(_binary, floats=None, integers=np.bitwise_xor)
    op_div = partialmethod(_binary, floats=np.divide, integers=None)

    def op_min(self, i, active):
        self._binary(i, active, np.minimum if "NaN" in i.words else np.fmin, np.minimum)

    def op_max(self, i, active):
        self._binary(i, active, np.maximum if "NaN" in i.words else np.fmax, np.maximum)

    def op_mul(self, i, active):
        if i.words & {"wide", "hi"}:
            self.put(i.operands[0], self._wide_product(i), active)
        else:
            self._binary(i, active, np.multiply, np.multiply)

    def _wide_product(self, i):
        double = KINDS[i.types[0][0]][2 * i.bits]
        x, y = (self.typed(operand, i.types[0]).astype(double) for operand in i.operands[1:3])
        if "hi" in i.words:
            return ((x * y) >> double(i.bits)).astype(UNSIGNED[i.bits])
        return (x * y).view(UNSIGNED[2 * i.bits])

    def op_mad(self, i, active):
        if "wide" in i.words:
            result = self._wide_product(i) + self.value(i.operands[3], 2 * i.bits)
        else:
            x, y, z = (self.value(operand, i.bits) for operand in i.operands[1:])
            result = x * y + z
        self.put(i.operands[0], result, active)

    def op_fma(self, i, active):
        x, y, z = self.floats(i, i.operands[1:])
        # The product of two fp32 is exact in fp64; that of two fp64 keeps 64 bits in NumPy's long double.
        self.put_float(i, x.astype(F64 if i.bits == 32 else np.longdouble) * y + z, active)

    def _unary(self, i, active, operation):
        if i.types[0][0] == "f":
            self.put_float(i, operation(*self.floats(i, i.operands[1:])), active)
        else:
            value = operation(self.typed(i.operands[1], i.types[0]))
            self.put(i.operands[0], value.view(UNSIGNED[i.bits]), active)

    op_neg = partialmethod(_unary, operation=np.negative)
    op_abs = partialmethod(_unary, operation=np.abs)
    op_sqrt = partialmethod(_unary, operation=np.sqrt)
    op_ex2 = partialmethod(_unary, operation=np.exp2)

    def op_rcp(self, i, active):
        self._unary(i, active, _rough_reciprocal if {"approx", "ftz"} <= i.words and i.bits == 64 else np.reciprocal)

    def op_not(self, i, active):
        value = self.predicate(i.operands[1]) if i.bits is None else self.value(i.operands[1], i.bits)
        self.put(i.operands[0], ~value, active)

    def op_shl(self, i, active):
        kind = UNSIGNED[i.bits]
        amount = self.value(i.operands[2], 32).astype(kind)
        shifted = self.value(i.operands[1], i.bits) << np.minimum(amount, kind(i.bits - 1))
        self.put(i.operands[0], np.where(amount >= i.bits, kind(0), shifted), active)

    def op_shr(self, i, active):
        amount = self.value(i.operands[2], 32)
        value = self.typed(i.operands[1], i.types[0])
        shifted = value >> np.minimum(amount, i.bits - 1).astype(value.dtype)
        if i.types[0][0] != "s":
            shifted = np.where(amount >= i.bits, value.dtype.type(0), shifted)
        self.put(i.operands[0], shifted.view(UNSIGNED[i.bits]), active)

    def op_shf(self, i, active):
        low, high, amount = (self.value(operand, 32).astype(U64) for operand in i.operands[1:])
        both = (high << U64(32)) | low
        self.put(i.operands[0], ((both << (amount & U64(31))) >> U64(32)).astype(U32), active)

    def op_bfe(self, i, active):
        position, length = i.operands[2:]
        value = self.typed(i.operands[1], i.types[0])
        value = value << value.dtype.type(i.bits - position - length)
        self.put(i.operands[0], (value >> value.dtype.type(i.bits - length)).view(UNSIGNED[i.bits]), active)

    def op_prmt(self, i, active):
        low, high, selector = (self.value(operand, 32) for operand in i.operands[1:])
        places = (selector[:, None] >> (4 * np.arange(4, dtype=U32))) & U32(15)
        parts = np.stack([low, high], axis=1).view(U8)
        chosen = np.take_along_axis(parts, (places & U32(7)).astype(np.int64), axis=1)
        # The selector's highest bit asks for copies of the byte's sign instead of the byte.
        result = np.where(places & U32(8), (chosen.view(np.int8) >> 7).view(U8), chosen)
        self.put(i.operands[0], np.ascontiguousarray(result).view(U32)[:, 0], active)

    def op_selp(self, i, active):
        to, x, y, condition = i.operands
        self.put(to, np.where(self.predicate(condition), self.value(x, i.bits), self.value(y, i.bits)), active)

    def op_setp(self, i, active):
        (comparison,) = i.words - {"ftz"}
        if i.types[0][0] != "f":
            x, y = (self.typed(operand, i.types[0]) for operand in i.operands[1:])
            self.put(i.operands[0], COMPARISONS[comparison](x, y), active)
            return
        x, y = self.floats(i, i.operands[1:])
        unordered = np.isnan(x) | np.isnan(y)
        if comparison in ("num", "nan"):
            result = unordered ^ (comparison == "num")
        elif comparison in ptx_grammar.UNORDERED:
            result = COMPARISONS[comparison[:-1]](x, y) | unordered
        else:
            result = COMPARISONS[comparison](x, y) & ~unordered
        self.put(i.operands[0], result, active)


def _flushed(value):
    return np.where(np.abs(value) < np.finfo(value.dtype).tiny, np.copysign(value.dtype.type(0), value), value)


def _rough_reciprocal(value):
    return (np.reciprocal(value).view(U64) & U64(0xFFFFFFFF00000000)).view(F64)
