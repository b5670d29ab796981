"""Runs Triton's PTX in NumPy, on host memory, and counts what it asks of the memory.

One program (CTA) at a time, all its threads side by side in arrays; threads that diverge are run lowest program
counter first. What the executor refuses:

* loads and stores that are misaligned or outside every registered tensor;
* a shared or global location that one warp writes and another touches without a barrier in between;
* a global location that two programs of one launch write, or that one reads after another wrote it;
* a barrier that not all threads reach; different values stored to one address by one instruction.

It executes the instructions that Triton 3.x emits for these kernels, no more: the grammar (`ptx_grammar.py`) names all
others when the program is read, before anything runs. The memory's books are in `ptx_memory.py`.
"""

from __future__ import annotations

import numpy as np

from . import ptx_grammar
from .ptx_arithmetic import F32, SIGNED, U8, U32, UNSIGNED, Arithmetic
from .ptx_memory import ExecutionError, Hazards

CONTROL = ("bra", "ret", "bar", "barrier")
"""The opcodes that :meth:`_Execution.run` executes itself; each other one has a method of :class:`_Execution`."""


def handler_of(instruction):
    """Return the name of the method that executes an instruction."""
    memory = f"_{instruction.space}" if instruction.opcode in ("ld", "st") else ""
    return f"op_{instruction.opcode}{memory}"


class Program:
    """A kernel's PTX, ready to run.

    Args:
        ptx: The text.
        shared: Bytes of shared memory.

    Raises:
        UnknownInstructionsError: The text has instructions that cannot be executed; all are named.
    """

    def __init__(self, ptx, shared):
        self.shared_size = max(shared, 16)
        self.n_threads, instructions, self.labels = ptx_grammar.parse(ptx)
        self.constants = {}
        self.code = [
            (instruction, None if instruction.opcode in CONTROL else getattr(_Execution, handler_of(instruction)))
            for instruction in instructions
        ]

    def launch(self, memory, parameters, order):
        """Run the programs with the numbers in `order` one after another; returns the number of instructions."""
        memory.begin_launch()
        with np.errstate(all="ignore"):
            return sum(_Execution(self, memory, parameters, number).run() for number in order)


class _Execution(Arithmetic):
    """The state of one program while it runs."""

    def __init__(self, program, memory, parameters, number):
        self.program, self.memory, self.parameters = program, memory, parameters
        n = program.n_threads
        super().__init__(n, number, program.constants)
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
            i, handler = code[counter]
            executed += 1
            active = mask if i.guard is None else mask & (self.registers[i.guard] ^ i.negated)
            if handler is not None:
                self.all_active = active.all()
                if self.all_active or active.any():
                    try:
                        handler(self, i, active)
                    except ExecutionError as error:
                        raise ExecutionError(f"{error} [{i.text}]") from None
            elif i.opcode == "bra":
                target = labels[i.operands[0]]
                if uniform and active.all():
                    counter = target
                elif uniform and not active.any():
                    counter += 1
                else:
                    counters[mask] = counter + 1
                    counters[active] = target
                    uniform = False
                continue
            elif i.opcode == "ret":
                if uniform and active.all():
                    break
                counters[mask] = counter + 1
                alive &= ~active
                uniform = False
                continue
            elif "warp" not in i.words:
                # A warp's own accesses are in order already; a barrier of the program separates those of its warps.
                if not active.all():
                    raise ExecutionError("a barrier that not all threads reach")
                self.memory.epoch += 1
            counter += 1
            if not uniform:
                counters[mask] = counter
        return executed

    # Memory ---------------------------------------------------------------------------------------------------

    def address(self, address, bits):
        return self.value(address.base, bits) + np.array(address.offset, SIGNED[bits]).astype(UNSIGNED[bits])

    def op_ld_param(self, i, active):
        number = self.parameters[i.operands[1].number]
        if isinstance(number, float):
            number = int(np.array(number, F32).view(U32))
        self.put(i.operands[0], np.full(self.n, number & ((1 << i.bits) - 1), UNSIGNED[i.bits]), active)

    def _scatter(self, registers, data, bits, active):
        for column, register in enumerate(registers):
            full = np.zeros(self.n, UNSIGNED[bits])
            full[active] = data[:, column]
            self.put(register, full, active)

    def _gather(self, operand, bits, active):
        data = np.stack([self.value(register, bits)[active] for register in _as_tuple(operand)], axis=1)
        return np.ascontiguousarray(data).view(U8)

    def op_ld_global(self, i, active):
        address = self.address(i.operands[1], 64)[active]
        data = self.memory.load(address, i.bits // 8 * i.vector, self.warps[active])
        self._scatter(_as_tuple(i.operands[0]), data.view(UNSIGNED[i.bits]), i.bits, active)

    def op_st_global(self, i, active):
        data = self._gather(i.operands[1], i.bits, active)
        self.memory.store(self.address(i.operands[0], 64)[active], data, self.warps[active])

    def _shared(self, start, size, active, is_write):
        start = start[active].astype(np.int64)
        if (start % size).any() or (start + size > self.program.shared_size).any() or (start < 0).any():
            raise ExecutionError("shared memory: misaligned or out of bounds")
        index = start[:, None] + np.arange(size)
        self.hazards.note(index, self.warps[active], self.memory.epoch, is_write, "shared memory")
        return index

    def op_ld_shared(self, i, active):
        index = self._shared(self.address(i.operands[1], 32), i.bits // 8 * i.vector, active, False)
        data = np.ascontiguousarray(self.shared[index]).view(UNSIGNED[i.bits])
        self._scatter(_as_tuple(i.operands[0]), data, i.bits, active)

    def op_st_shared(self, i, active):
        data = self._gather(i.operands[1], i.bits, active)
        self.shared[self._shared(self.address(i.operands[0], 32), i.bits // 8 * i.vector, active, True)] = data

    def _matrix_parts(self, i, address, matrix):
        """Return (bytes, addresses) of a thread's parts of an 8 x 8 matrix of 16-bit numbers.

        Eight lanes give the addresses of its rows. A thread holds two neighbours of one row, 4 bytes at once, or
        (transposed) two neighbours of one column, 2 bytes each.
        """
        lane = self.threads % 32
        rows = self.address(address, 32)
        first = self.lane_base + matrix * 8
        if "trans" not in i.words:
            return 4, [rows[first + lane // 4] + (4 * (lane % 4)).astype(U32)]
        column = (2 * (lane // 4)).astype(U32)
        return 2, [rows[first + 2 * (lane % 4) + half] + column for half in (0, 1)]

    def op_ldmatrix(self, i, active):
        for matrix, register in enumerate(i.operands[0]):
            size, parts = self._matrix_parts(i, i.operands[1], matrix)
            data = [self.shared[self._shared(part, size, active, False)] for part in parts]
            data = np.ascontiguousarray(np.concatenate(data, axis=1)).view(U32)
            self._scatter([register], data, 32, active)

    def op_stmatrix(self, i, active):
        for matrix, register in enumerate(i.operands[1]):
            size, parts = self._matrix_parts(i, i.operands[0], matrix)
            data = self._gather(register, 32, active)
            for number, part in enumerate(parts):
                self.shared[self._shared(part, size, active, True)] = data[:, size * number : size * (number + 1)]

    # Warps ----------------------------------------------------------------------------------------------------

    def op_shfl(self, i, active):
        lanes = self.value(i.operands[2], 32).astype(np.int64)
        source = self.threads ^ lanes if "bfly" in i.words else self.lane_base + lanes % 32
        if not active[source[active]].all():
            raise ExecutionError("a shuffle from a thread that does not take part")
        self.put(i.operands[0], self.value(i.operands[1], 32)[source], active)

    def op_redux(self, i, active):
        if (active.reshape(-1, 32).any(axis=1) & ~active.reshape(-1, 32).all(axis=1)).any():
            raise ExecutionError("a reduction over a warp in which not all threads take part")
        combine = {"max": np.maximum, "min": np.minimum, "add": np.add, "or": np.bitwise_or, "and": np.bitwise_and}
        (kind,) = i.words - {"sync"}
        result = combine[kind].reduce(self.typed(i.operands[1], i.types[0]).reshape(-1, 32), axis=1)
        self.put(i.operands[0], np.repeat(result, 32).view(U32), active)


def _as_tuple(operand):
    return operand if isinstance(operand, tuple) else (operand,)
