"""The memory that PTX runs on, with its books: who touched what, how often, and since which barrier."""

from __future__ import annotations

import ctypes

import numpy as np

U8, U64 = np.uint8, np.uint64
UNIT = 2
"""Bytes of one location in the books: the smallest access."""


class ExecutionError(RuntimeError):
    """The program did what a GPU would not forgive, or would forgive silently."""


class Region:
    """One tensor's storage with its books."""

    def __init__(self, name, tensor, track_rereads):
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

    def _touched(self, address, index, size, warps, is_write):
        """Note an access; yields each region with the threads that touch it and the places there, (threads, size)."""
        for number in np.unique(index):
            region = self.regions[number]
            chosen = index == number
            offsets = (address[chosen] - U64(region.begin)).astype(np.int64)
            self._books(region, offsets, size, warps[chosen], is_write)
            yield region, chosen, offsets[:, None] + np.arange(size)

    def load(self, address, size, warps):
        index = self._locate(address, size, "load")
        out = np.empty((len(address), size), U8)
        for region, chosen, places in self._touched(address, index, size, warps, False):
            out[chosen] = region.bytes[places]
            region.read += places.size
        return out

    def store(self, address, data, warps):
        size = data.shape[1]
        index = self._locate(address, size, "store")
        unique, first, inverse = np.unique(address, return_index=True, return_inverse=True)
        if len(unique) != len(address) and (data[first][inverse] != data).any():
            raise ExecutionError("different values stored to one address by one instruction")
        # Threads that hold the same value may all store it; the lowest one stands for them.
        address, data, index, warps = address[first], data[first], index[first], warps[first]
        for region, chosen, places in self._touched(address, index, size, warps, True):
            region.bytes[places] = data[chosen]
            region.written += places.size
