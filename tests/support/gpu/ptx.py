"""Runs Triton's PTX in NumPy, on host memory, and counts what it asks of the memory.

One program (CTA) at a time, all its threads side by side in arrays; threads that diverge are run lowest program
counter first. What the executor refuses:

* loads and stores that are misaligned or outside every registered tensor;
* a shared or global location that one warp writes and another touches without a barrier in between;
* a global location that two programs of one launch write, or that one reads after another wrote it;
* a barrier that not all threads reach; different values stored to one address by one instruction.

It executes the instructions that Triton 3.x emits for these kernels, no more: an unknown one raises.
"""

from __future__ import annotations

import re

import numpy as np

U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
F16, F32, F64 = np.float16, np.float32, np.float64
UNSIGNED = {16: U16, 32: U32, 64: U64}
SIGNED = {16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {16: F16, 32: F32, 64: F64}
UNIT = 2
"""Bytes of one location in the books: the smallest access."""


class ExecutionError(RuntimeError):
    """The program did what a GPU would not forgive, or would forgive silently."""


class Region:
    """One tensor's storage with its books."""

    def __init__(self, name, tensor, track_rereads):
        import ctypes

        storage = tensor.untyped_storage()
        self.name, self.begin, self.size = name, storage.data_ptr(), storage.nbytes()
        self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * self.size).from_address(self.begin))
        units = self.size // UNIT + 1
        self.hazards = Hazards(units)
        self.writer = np.full(units, -1, np.int64)
        self.last_read = np.full(units, -1, np.int64) if track_rereads else None
        self.read = self.written = 0
        self.furthest_reread = 0


class Hazards:
    """Who touched which location since which barrier."""

    def __init__(self, size):
        self.write_epoch = np.full(size, -1, np.int64)
        self.write_warp = np.full(size, -1, np.int32)
        self.read_epoch = np.full(size, -1, np.int64)
        self.read_warp = np.full(size, -1, np.int32)

    def note(self, index, warps, epoch, is_write, what):
        """Record an access of locations (threads, n) and raise on a conflict between warps within one epoch."""
        flat = index.ravel()
        warp = np.repeat(warps, index.shape[1])
        foreign = (self.write_epoch[flat] == epoch) & (self.write_warp[flat] != warp)
        if foreign.any():
            kind = "write" if is_write else "read"
            raise ExecutionError(f"{what}: {kind} after a write by another warp without a barrier")
        if is_write:
            if ((self.read_epoch[flat] == epoch) & (self.read_warp[flat] != warp)).any():
                raise ExecutionError(f"{what}: write after a read by another warp without a barrier")
            self.write_epoch[flat] = epoch
            self.write_warp[flat] = warp
        else:
            several = (self.read_epoch[flat] == epoch) & (self.read_warp[flat] != warp)
            order = np.argsort(flat, kind="stable")
            same = (flat[order][1:] == flat[order][:-1]) & (warp[order][1:] != warp[order][:-1])
            self.read_warp[flat] = np.where(several, -2, warp)
            self.read_warp[flat[order][1:][same]] = -2
            self.read_epoch[flat] = epoch


class Memory:
    """The tensors that a program may touch, with the bytes requested of each."""

    def __init__(self):
        self.regions = []
        self.epoch = 0
        self.program = -1
        self.stream = 0

    def add(self, name, tensor, track_rereads=False):
        """Register a tensor's storage; two views of one storage are one region under the first name."""
        begin = tensor.untyped_storage().data_ptr()
        if any(region.begin == begin for region in self.regions):
            return
        self.regions.append(Region(name, tensor, track_rereads))
        self.regions.sort(key=lambda region: region.begin)

    def total(self, prefix):
        """Return the bytes (read, written) of the regions whose name begins with `prefix`."""
        chosen = [region for region in self.regions if region.name.startswith(prefix)]
        return sum(r.read for r in chosen), sum(r.written for r in chosen)

    def begin_program(self):
        self.program += 1
        self.epoch += 1
        self.stream = 0
        for region in self.regions:
            if region.last_read is not None:
                region.last_read[:] = -1

    def begin_launch(self):
        for region in self.regions:
            region.writer[:] = -1

    def _locate(self, address, size, what):
        if (address % U64(size)).any():
            raise ExecutionError(
                f"misaligned {size}-byte {what}: address % {size} = {int((address % U64(size)).max())}"
            )
        begins = np.array([r.begin for r in self.regions], dtype=U64)
        ends = np.array([r.begin + r.size for r in self.regions], dtype=U64)
        index = np.searchsorted(begins, address, side="right").astype(np.int64) - 1
        if (index < 0).any() or (address + U64(size) > ends[np.maximum(index, 0)]).any():
            raise ExecutionError(f"out-of-bounds {size}-byte {what}")
        return index

    def _books(self, region, offsets, size, warps, is_write):
        units = (offsets // UNIT)[:, None] + np.arange(max(1, size // UNIT))
        region.hazards.note(units, warps, self.epoch, is_write, region.name)
        writer = region.writer[units]
        if ((writer != -1) & (writer != self.program)).any():
            raise ExecutionError(f"{region.name}: touched by one program of a launch and written by another")
        if is_write:
            region.writer[units] = self.program
        elif region.last_read is not None:
            past = region.last_read[units]
            again = past >= 0
            if again.any():
                region.furthest_reread = max(region.furthest_reread, int((self.stream - past[again]).max()))
            region.last_read[units] = self.stream
            self.stream += len(offsets) * size

    def load(self, address, size, warps):
        index = self._locate(address, size, "load")
        out = np.empty((len(address), size), U8)
        for number in np.unique(index):
            region = self.regions[number]
            chosen = index == number
            offsets = (address[chosen] - U64(region.begin)).astype(np.int64)
            self._books(region, offsets, size, warps[chosen], False)
            out[chosen] = region.bytes[offsets[:, None] + np.arange(size)]
            region.read += len(offsets) * size
        return out

    def store(self, address, data, warps):
        size = data.shape[1]
        index = self._locate(address, size, "store")
        unique, first, inverse = np.unique(address, return_index=True, return_inverse=True)
        if len(unique) != len(address) and (data[first][inverse] != data).any():
            raise ExecutionError("different values stored to one address by one instruction")
        # Threads that hold the same value may all store it; the lowest one stands for them.
        address, data, index, warps = address[first], data[first], index[first], warps[first]
        for number in np.unique(index):
            region = self.regions[number]
            chosen = index == number
            offsets = (address[chosen] - U64(region.begin)).astype(np.int64)
            self._books(region, offsets, size, warps[chosen], True)
            region.bytes[offsets[:, None] + np.arange(size)] = data[chosen]
            region.written += len(offsets) * size


COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def _bits_of(operation):
    return int(re.search(r"(16|32|64)$", operation)[1])


class Program:
    """A kernel's PTX, ready to run.

    Args:
        ptx: The text.
        shared: Bytes of shared memory.
    """

    def __init__(self, ptx, shared):
        self.shared_size = max(shared, 16)
        self.n_threads = int(re.search(r"\.reqntid (\d+)", ptx)[1])
        self.code, self.labels = [], {}
        body = ptx[ptx.index(".entry") :]
        body = body[body.index("\n{") + 2 : body.index("\n}")]
        for line in body.splitlines():
            text = line.split("//")[0].strip()
            if text.endswith(":"):
                self.labels[text[:-1]] = len(self.code)
                continue
            for statement in text.split(";"):
                self._decode(statement.strip())

    def _decode(self, text):
        text = text.removeprefix("{ .reg").strip() if text.startswith("{ .reg") else text
        if not text or text in "{}" or text.startswith("."):
            return
        found = re.match(r"(?:@(!?)(%p\d+)\s+)?([\w.:]+)\s*(.*)$", text)
        if found is None:
            raise NotImplementedError(f"PTX statement {text!r}")
        negated, guard, operation, rest = found.groups()
        arguments = [
            [part.strip() for part in token[1:-1].split(",")] if token[0] == "{" else token
            for token in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
        ]
        base = operation.split(".")[0]
        if operation.startswith(("ld.param", "ld.shared", "st.shared")):
            base = operation[:2] + "_" + operation.split(".")[1]
        elif operation.startswith(("ld.", "st.")):
            base = operation[:2] + "_global"
        handler = getattr(_Execution, "op_" + base, None)
        if handler is None and base not in ("bra", "ret", "bar"):
            raise NotImplementedError(f"PTX instruction {text!r}")
        self.code.append((guard, bool(negated), operation, arguments, handler, text))

    def launch(self, memory, parameters, order):
        """Run the programs with the numbers in `order` one after another; returns the number of instructions."""
        memory.begin_launch()
        with np.errstate(all="ignore"):
            return sum(_Execution(self, memory, parameters, number).run() for number in order)


class _Execution:
    """The state of one program while it runs."""

    def __init__(self, program, memory, parameters, number):
        self.program, self.memory, self.parameters, self.number = program, memory, parameters, number
        n = self.n = program.n_threads
        self.registers = {}
        self.threads = np.arange(n)
        self.warps = self.threads // 32
        self.lane_base = self.warps * 32
        self.shared = np.zeros(program.shared_size, U8)
        self.hazards = Hazards(program.shared_size)
        self.everyone = np.ones(n, bool)

    def run(self):
        self.memory.begin_program()
        counters = np.zeros(self.n, np.int64)
        alive = self.everyone.copy()
        mask, counter, uniform, executed = self.everyone, 0, True, 0
        code, labels, end = self.program.code, self.program.labels, len(self.program.code)
        while True:
            if not uniform:
                if not alive.any():
                    break
                counter = int(counters[alive].min())
                mask = alive & (counters == counter)
                uniform = bool(mask.all())
            if counter >= end:
                break
            guard, negated, operation, arguments, handler, text = code[counter]
            executed += 1
            active = mask if guard is None else mask & (self.registers[guard] ^ negated)
            if operation.startswith("bra"):
                target = labels[arguments[0]]
                if uniform and active.all():
                    counter = target
                elif uniform and not active.any():
                    counter += 1
                else:
                    counters[mask] = counter + 1
                    counters[active] = target
                    uniform = False
                continue
            if operation == "ret":
                if uniform and active.all():
                    break
                counters[mask] = counter + 1
                alive &= ~active
                uniform = False
                continue
            if operation.startswith("bar."):
                if operation.startswith("bar.sync") and not (mask.all() and active.all()):
                    raise ExecutionError("a barrier that not all threads reach")
                if operation.startswith("bar.sync"):
                    self.memory.epoch += 1
            elif active.any():
                try:
                    handler(self, operation, arguments, active)
                except ExecutionError as error:
                    raise ExecutionError(f"{error} [{text}]") from None
            counter += 1
            if not uniform:
                counters[mask] = counter
        return executed

    # Operands -------------------------------------------------------------------------------------------------

    def value(self, token, bits):
        """Return an operand as unsigned bits."""
        if token[0] == "%":
            if token == "%tid.x":
                return self.threads.astype(U32)
            if token == "%ctaid.x":
                return np.full(self.n, self.number, U32)
            if token in ("%tid.y", "%tid.z", "%ctaid.y", "%ctaid.z"):
                return np.zeros(self.n, U32)
            return self.registers[token]
        if token.startswith("global_smem"):
            return np.full(self.n, int(token.partition("+")[2] or 0), UNSIGNED[bits])
        if token.startswith(("0f", "0d")):
            return np.full(self.n, int(token[2:], 16), UNSIGNED[bits])
        if token in self.registers:
            # A register that inline assembly declares in braces.
            return self.registers[token]
        number = int(token.rstrip("U"), 0)
        return np.full(self.n, number & ((1 << bits) - 1), UNSIGNED[bits])

    def predicate(self, token):
        return self.registers[token] if token[0] == "%" else np.full(self.n, int(token) != 0)

    def signed(self, token, bits):
        return self.value(token, bits).view(SIGNED[bits])

    def floating(self, token, bits):
        return self.value(token, bits).view(FLOAT[bits])

    def put(self, register, value, active):
        """Write a register where `active`; values come as unsigned bits or booleans."""
        if register == "_":
            return
        if not active.all():
            old = self.registers.get(register)
            value = np.where(active, value, np.zeros_like(value) if old is None else old)
        self.registers[register] = value

    def put_float(self, register, value, bits, active):
        self.put(register, value.astype(FLOAT[bits]).view(UNSIGNED[bits]), active)

    def address(self, token, bits):
        base, offset = re.match(r"\[\s*([%\w.$]+)\s*(?:\+\s*(-?\d+))?\s*\]", token).groups()
        start = self.value(base, bits)
        return start + np.array(int(offset or 0), SIGNED[bits]).astype(UNSIGNED[bits])

    # Memory ---------------------------------------------------------------------------------------------------

    def op_ld_param(self, operation, a, active):
        number = self.parameters[int(re.search(r"_param_(\d+)", a[1])[1])]
        bits = _bits_of(operation)
        if isinstance(number, float):
            number = int(np.array(number, F32).view(U32))
        self.put(a[0], np.full(self.n, number & ((1 << bits) - 1), UNSIGNED[bits]), active)

    def op_ld_global(self, operation, a, active):
        registers = a[0] if isinstance(a[0], list) else [a[0]]
        bits = _bits_of(operation)
        address = self.address(a[1], 64)[active]
        data = self.memory.load(address, bits // 8 * len(registers), self.warps[active]).view(UNSIGNED[bits])
        self._scatter(registers, data, bits, active)

    def _scatter(self, registers, data, bits, active):
        for column, register in enumerate(registers):
            full = np.zeros(self.n, UNSIGNED[bits])
            full[active] = data[:, column]
            self.put(register, full, active)

    def op_st_global(self, operation, a, active):
        registers = a[1] if isinstance(a[1], list) else [a[1]]
        bits = _bits_of(operation)
        data = np.stack([self.value(register, bits)[active] for register in registers], axis=1)
        self.memory.store(self.address(a[0], 64)[active], np.ascontiguousarray(data).view(U8), self.warps[active])

    def _shared(self, start, size, active, is_write):
        start = start[active].astype(np.int64)
        if (start % size).any() or (start + size > self.program.shared_size).any() or (start < 0).any():
            raise ExecutionError("shared memory: misaligned or out of bounds")
        index = start[:, None] + np.arange(size)
        self.hazards.note(index, self.warps[active], self.memory.epoch, is_write, "shared memory")
        return index

    def op_ld_shared(self, operation, a, active):
        registers = a[0] if isinstance(a[0], list) else [a[0]]
        bits = _bits_of(operation)
        index = self._shared(self.address(a[1], 32), bits // 8 * len(registers), active, False)
        self._scatter(registers, np.ascontiguousarray(self.shared[index]).view(UNSIGNED[bits]), bits, active)

    def op_st_shared(self, operation, a, active):
        registers = a[1] if isinstance(a[1], list) else [a[1]]
        bits = _bits_of(operation)
        data = np.stack([self.value(register, bits)[active] for register in registers], axis=1)
        index = self._shared(self.address(a[0], 32), bits // 8 * len(registers), active, True)
        self.shared[index] = np.ascontiguousarray(data).view(U8)

    def _matrix_parts(self, operation, token, matrix):
        """Return (bytes, addresses) of a thread's parts of an 8 x 8 matrix of 16-bit numbers.

        Eight lanes give the addresses of its rows. A thread holds two neighbours of one row, 4 bytes at once, or
        (transposed) two neighbours of one column, 2 bytes each.
        """
        lane = self.threads % 32
        rows = self.address(token, 32)
        first = self.lane_base + matrix * 8
        if ".trans" not in operation:
            return 4, [rows[first + lane // 4] + (4 * (lane % 4)).astype(U32)]
        column = (2 * (lane // 4)).astype(U32)
        return 2, [rows[first + 2 * (lane % 4) + half] + column for half in (0, 1)]

    def op_ldmatrix(self, operation, a, active):
        for matrix, register in enumerate(a[0]):
            size, parts = self._matrix_parts(operation, a[1], matrix)
            data = [self.shared[self._shared(part, size, active, False)] for part in parts]
            data = np.ascontiguousarray(np.concatenate(data, axis=1)).view(U32)
            self._scatter([register], data, 32, active)

    def op_stmatrix(self, operation, a, active):
        for matrix, register in enumerate(a[1]):
            size, parts = self._matrix_parts(operation, a[0], matrix)
            data = np.ascontiguousarray(self.value(register, 32)[active][:, None]).view(U8)
            for number, part in enumerate(parts):
                self.shared[self._shared(part, size, active, True)] = data[:, size * number : size * (number + 1)]

    # Warps ----------------------------------------------------------------------------------------------------

    def op_shfl(self, operation, a, active):
        lanes = self.value(a[2], 32).astype(np.int64)
        source = self.threads ^ lanes if ".bfly" in operation else self.lane_base + lanes % 32
        if not active[source[active]].all():
            raise ExecutionError("a shuffle from a thread that does not take part")
        self.put(a[0].split("|")[0], self.value(a[1], 32)[source], active)

    def op_redux(self, operation, a, active):
        kind, dtype = operation.split(".")[2:4]
        value = self.signed(a[1], 32) if dtype == "s32" else self.value(a[1], 32)
        combine = {"max": np.maximum, "min": np.minimum, "add": np.add, "or": np.bitwise_or, "and": np.bitwise_and}
        result = combine[kind].reduce(value.reshape(-1, 32), axis=1)
        self.put(a[0], np.repeat(result, 32).view(U32), active)

    # Arithmetic -----------------------------------------------------------------------------------------------

    def op_createpolicy(self, operation, a, active):
        self.put(a[0], np.zeros(self.n, U64), active)

    def op_mov(self, operation, a, active):
        if isinstance(a[0], list):
            half = _bits_of(operation) // 2
            whole = self.value(a[1], 2 * half)
            for number, register in enumerate(a[0]):
                self.put(register, (whole >> UNSIGNED[2 * half](half * number)).astype(UNSIGNED[half]), active)
        elif isinstance(a[1], list):
            bits = _bits_of(operation)
            low, high = (self.value(token, bits // 2).astype(UNSIGNED[bits]) for token in a[1])
            self.put(a[0], low | (high << UNSIGNED[bits](bits // 2)), active)
        elif operation.endswith("pred"):
            self.put(a[0], self.predicate(a[1]), active)
        else:
            self.put(a[0], self.value(a[1], _bits_of(operation)), active)

    def op_cvt(self, operation, a, active):
        target, source = operation.split(".")[-2:]
        if target in ("bf16x2", "f16x2"):
            high, low = (self._half(token, target[:-2]).astype(U32) for token in a[1:])
            self.put(a[0], (high << U32(16)) | low, active)
        elif target in ("bf16", "f16"):
            self.put(a[0], self._half(a[1], target), active)
        elif source == "bf16":
            self.put(a[0], self.value(a[1], 16).astype(U32) << U32(16), active)
        else:
            value = self._typed(a[1], source)
            bits = int(target[1:])
            kind = {"f": FLOAT, "s": SIGNED, "u": UNSIGNED}[target[0]][bits]
            self.put(a[0], value.astype(kind).view(UNSIGNED[bits]), active)

    def _typed(self, token, dtype):
        bits = int(dtype[1:])
        value = self.value(token, bits)
        if value.dtype.itemsize * 8 > bits:
            value = value.astype(UNSIGNED[bits])
        return value.view({"f": FLOAT, "s": SIGNED, "u": UNSIGNED, "b": UNSIGNED}[dtype[0]][bits])

    def _half(self, token, dtype):
        if dtype == "f16":
            return self.floating(token, 32).astype(F16).view(U16)
        bits = self.value(token, 32)
        rounded = (bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16)
        return np.where(np.isnan(bits.view(F32)), U32(0x7FFF), rounded).astype(U16)

    def _binary(self, operation, a, active, floats, integers):
        dtype = operation.split(".")[-1]
        if dtype == "pred":
            self.put(a[0], integers(self.predicate(a[1]), self.predicate(a[2])), active)
        elif dtype[0] == "f":
            bits = int(dtype[1:])
            self.put_float(a[0], floats(self.floating(a[1], bits), self.floating(a[2], bits)), bits, active)
        else:
            bits = int(dtype[1:])
            x, y = (self._typed(token, dtype) for token in a[1:3])
            self.put(a[0], integers(x, y).view(UNSIGNED[bits]), active)

    def op_add(self, operation, a, active):
        self._binary(operation, a, active, np.add, np.add)

    def op_sub(self, operation, a, active):
        self._binary(operation, a, active, np.subtract, np.subtract)

    def op_and(self, operation, a, active):
        self._binary(operation, a, active, None, np.bitwise_and)

    def op_or(self, operation, a, active):
        self._binary(operation, a, active, None, np.bitwise_or)

    def op_xor(self, operation, a, active):
        self._binary(operation, a, active, None, np.bitwise_xor)

    def op_min(self, operation, a, active):
        self._binary(operation, a, active, np.fmin, np.minimum)

    def op_max(self, operation, a, active):
        self._binary(operation, a, active, np.fmax, np.maximum)

    def op_div(self, operation, a, active):
        self._binary(operation, a, active, np.divide, None)

    def op_mul(self, operation, a, active):
        if ".wide." in operation or ".hi." in operation:
            self.put(a[0], self._wide_product(operation, a), active)
        else:
            self._binary(operation, a, active, np.multiply, np.multiply)

    def _wide_product(self, operation, a):
        dtype = operation.split(".")[-1]
        bits = int(dtype[1:])
        double = {"s": SIGNED, "u": UNSIGNED}[dtype[0]][2 * bits]
        product = self._typed(a[1], dtype).astype(double) * self._typed(a[2], dtype).astype(double)
        if ".hi." in operation:
            return (product >> double(bits)).astype(UNSIGNED[bits])
        return product.view(UNSIGNED[2 * bits])

    def op_mad(self, operation, a, active):
        if ".wide." in operation:
            bits = 2 * _bits_of(operation)
            self.put(a[0], self._wide_product(operation, a) + self.value(a[3], bits), active)
        else:
            bits = _bits_of(operation)
            self.put(a[0], self.value(a[1], bits) * self.value(a[2], bits) + self.value(a[3], bits), active)

    def op_fma(self, operation, a, active):
        bits = _bits_of(operation)
        x, y, z = (self.floating(token, bits) for token in a[1:])
        # The product of two fp32 is exact in fp64; that of two fp64 keeps 64 bits in NumPy's long double.
        wide = F64 if bits == 32 else np.longdouble
        self.put_float(a[0], x.astype(wide) * y + z, bits, active)

    def op_neg(self, operation, a, active):
        dtype = operation.split(".")[-1]
        value = self._typed(a[1], dtype)
        self.put(a[0], (-value).view(UNSIGNED[int(dtype[1:])]), active)

    def op_not(self, operation, a, active):
        if operation.endswith("pred"):
            self.put(a[0], ~self.predicate(a[1]), active)
        else:
            self.put(a[0], ~self.value(a[1], _bits_of(operation)), active)

    def op_abs(self, operation, a, active):
        dtype = operation.split(".")[-1]
        self.put(a[0], np.abs(self._typed(a[1], dtype)).view(UNSIGNED[int(dtype[1:])]), active)

    def op_sqrt(self, operation, a, active):
        bits = _bits_of(operation)
        self.put_float(a[0], np.sqrt(self.floating(a[1], bits)), bits, active)

    def op_rcp(self, operation, a, active):
        bits = _bits_of(operation)
        result = 1 / self.floating(a[1], bits)
        if ".approx.ftz.f64" in operation:
            result = (result.view(U64) & U64(0xFFFFFFFF00000000)).view(F64)
        self.put_float(a[0], result, bits, active)

    def op_ex2(self, operation, a, active):
        self.put_float(a[0], np.exp2(self.floating(a[1], 32)), 32, active)

    def op_shl(self, operation, a, active):
        bits = _bits_of(operation)
        amount = self.value(a[2], 32).astype(UNSIGNED[bits])
        shifted = self.value(a[1], bits) << np.minimum(amount, UNSIGNED[bits](bits - 1))
        self.put(a[0], np.where(amount >= bits, UNSIGNED[bits](0), shifted), active)

    def op_shr(self, operation, a, active):
        dtype = operation.split(".")[-1]
        bits = int(dtype[1:])
        amount = self.value(a[2], 32)
        value = self._typed(a[1], dtype)
        shifted = value >> np.minimum(amount, bits - 1).astype(value.dtype)
        if dtype[0] != "s":
            shifted = np.where(amount >= bits, value.dtype.type(0), shifted)
        self.put(a[0], shifted.view(UNSIGNED[bits]), active)

    def op_shf(self, operation, a, active):
        if ".l.wrap" not in operation:
            raise NotImplementedError(operation)
        both = (self.value(a[2], 32).astype(U64) << U64(32)) | self.value(a[1], 32).astype(U64)
        amount = (self.value(a[3], 32) & U32(31)).astype(U64)
        self.put(a[0], ((both << amount) >> U64(32)).astype(U32), active)

    def op_bfe(self, operation, a, active):
        dtype = operation.split(".")[-1]
        bits = int(dtype[1:])
        position, length = (int(self.value(token, 32)[0]) for token in a[2:4])
        left = SIGNED[bits](bits - position - length)
        value = self._typed(a[1], dtype) << left.astype(self._typed(a[1], dtype).dtype)
        self.put(a[0], (value >> value.dtype.type(bits - length)).view(UNSIGNED[bits]), active)

    def op_prmt(self, operation, a, active):
        parts = np.stack([self.value(a[1], 32), self.value(a[2], 32)], axis=1).view(U8)
        selector = self.value(a[3], 32)
        if (selector & U32(0x8888)).any():
            raise NotImplementedError("prmt with sign replication")
        chosen = (selector[:, None] >> (4 * np.arange(4, dtype=U32))) & U32(7)
        result = np.take_along_axis(parts, chosen.astype(np.int64), axis=1)
        self.put(a[0], np.ascontiguousarray(result).view(U32)[:, 0], active)

    def op_selp(self, operation, a, active):
        bits = _bits_of(operation)
        self.put(a[0], np.where(self.predicate(a[3]), self.value(a[1], bits), self.value(a[2], bits)), active)

    def op_setp(self, operation, a, active):
        parts = operation.split(".")
        comparison, dtype = parts[1], parts[-1]
        x, y = (self._typed(token, dtype) for token in a[-2:])
        if comparison in ("num", "nan"):
            result = (np.isnan(x) | np.isnan(y)) ^ (comparison == "num")
        elif dtype[0] == "f" and comparison.endswith("u"):
            result = COMPARISONS[comparison[:-1]](x, y) | np.isnan(x) | np.isnan(y)
        elif dtype[0] == "f" and comparison == "ne":
            # Ordered: false where a NaN takes part.
            result = np.not_equal(x, y) & ~np.isnan(x) & ~np.isnan(y)
        else:
            result = COMPARISONS[comparison](x, y)
        self.put(a[0], result, active)
