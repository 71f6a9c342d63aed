"""Loads and stores: global memory by address or through a buffer descriptor, the LDS of a workgroup, and the scratch of
a lane, which its registers are spilled to."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from attn_wave.emulator.faults import EmulationError, MemoryFaultError
from attn_wave.emulator.instructions import Instruction, Operand
from attn_wave.emulator.memory import read_bytes, write_bytes
from attn_wave.emulator.operands import bits32, bits64, scalar32, scalar64, set_lanes
from attn_wave.emulator.wave import I32, I64, LOW64, U32, U64, Action, Lanes, Wave

_BYTES: Final = {
    "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "ushort": 2, "sshort": 2, "short": 2, "ubyte": 1,
    "sbyte": 1, "byte": 1,
}  # fmt: skip
_LDS_BYTES: Final = {"b32": 4, "b64": 8, "b96": 12, "b128": 16, "u16": 2, "i16": 2, "b16": 2, "u8": 1, "i8": 1, "b8": 1}
_GLOBAL: Final = re.compile(r"(?:global|flat)_(load|store)_([a-z]+(?:x\d)?)(_d16(?:_hi)?)?")
_BUFFER: Final = re.compile(r"buffer_(load|store)_([a-z]+(?:x\d)?)(_d16(?:_hi)?)?")
_SCRATCH: Final = re.compile(r"scratch_(load|store)_dword(?:x([234]))?")
_LDS: Final = re.compile(r"ds_(read|write)(2)?(st64)?_([bui]\d+)(_d16(?:_hi)?)?")

#: addresses uint64 [64] of a wave, and the lanes that access them
Addresses = Callable[[Wave], tuple[Lanes, NDArray[np.bool_]]]
#: takes uint8 [64, bytes]
Deliver = Callable[[Wave, NDArray[np.uint8]], None]


def memory_access(instruction: Instruction) -> Action | None:
    """The action of a load or store; None for an instruction that is neither, or a form that is not modelled."""
    for pattern, build in ((_GLOBAL, _global), (_BUFFER, _buffer), (_LDS, _lds), (_SCRATCH, _scratch)):
        match = pattern.fullmatch(instruction.name)
        if match is not None:
            return build(instruction, match)
    return None


# -- global memory


def _global(instruction: Instruction, match: re.Match[str]) -> Action:
    load = match[1] == "load"
    operands = instruction.operands
    data, address = (operands[0], operands[1]) if load else (operands[1], operands[0])
    base = operands[2] if len(operands) > 2 else Operand("off", 0)
    offset = instruction.integer("offset")
    if base.kind == "off":
        wide, plus = bits64(address), U64(offset & LOW64)
        return _moves(instruction, match, data, lambda w: (w.spread(wide(w) + plus), w.active))
    start, narrow = scalar64(base), bits32(address)

    def first(w: Wave) -> int:
        return start(w) + offset & LOW64

    return _moves(
        instruction, match, data,
        lambda w: (w.spread(narrow(w)).astype(U64) + w.scalar_lanes64(first), w.active),
    )  # fmt: skip


def _buffer(instruction: Instruction, match: re.Match[str]) -> Action:
    """Raw buffers: what lies beyond the descriptor's size reads as 0 and is not written, as on the chip."""
    if {"idxen", "lds"} & set(instruction.modifiers):
        raise EmulationError(f"{instruction.text}: indexed buffers and loads into LDS are not modelled")
    data, lane_offset, resource, extra = instruction.operands
    size, first, offset = _BYTES[match[2]], resource.index, U64(instruction.integer("offset"))
    more, lanes = scalar32(extra), bits32(lane_offset) if "offen" in instruction.modifiers else None

    def start(w: Wave) -> int:
        return (w.scalar[first] | (w.scalar[first + 1] & 0xFFFF) << 32) + more(w)

    def addresses(w: Wave) -> tuple[Lanes, NDArray[np.bool_]]:
        within = (w.spread(lanes(w)).astype(U64) if lanes else np.zeros(w.lanes, U64)) + offset
        records = w.scalar_lanes(first + 2).astype(U64)
        return w.scalar_lanes64(start) + within, w.active & (within + U64(size) <= records)

    return _moves(instruction, match, data, addresses)


def _moves(instruction: Instruction, match: re.Match[str], data: Operand, addresses: Addresses) -> Action:
    size, half, what = _BYTES[match[2]], match[3] or "", f"{instruction.text} at {instruction.address:#x}"
    if match[1] == "store":
        gather = _gathered(data, size, half)

        def store(w: Wave) -> None:
            where, lanes = addresses(w)
            w.memory.store(where, gather(w), lanes, what)

        return store
    deliver = _delivered(data, size, half, signed=match[2].startswith("s") and match[2] != "short")

    def load(w: Wave) -> None:
        where, lanes = addresses(w)
        deliver(w, w.memory.load(where, size, lanes, what))

    return load


def _gathered(data: Operand, size: int, half: str) -> Callable[[Wave], NDArray[np.uint8]]:
    """Reads ``size`` bytes of each lane from registers; ``_hi`` takes the upper half."""
    words = [bits32(data.part(i)) for i in range((size + 3) // 4)]
    shift = U32(16 if half.endswith("hi") else 0)

    def read(w: Wave) -> NDArray[np.uint8]:
        rows = np.empty((w.lanes, len(words)), U32)
        for i, word in enumerate(words):
            rows[:, i] = word(w)
        return (rows >> shift if shift else rows).view(np.uint8)[:, :size]

    return read


def _delivered(data: Operand, size: int, half: str, *, signed: bool) -> Deliver:
    """Writes bytes [64, size] of each lane into registers: whole, extended, or into one half of a register."""
    writes = [set_lanes(data.part(i)) for i in range((size + 3) // 4)]
    if half:
        high, write, index = half.endswith("hi"), writes[0], data.index

        def deliver_half(w: Wave, data: NDArray[np.uint8]) -> None:
            value = _narrow(data, signed) & U32(0xFFFF)
            before = w.vector[index]
            write(w, before & U32(0xFFFF) | value << U32(16) if high else before & U32(0xFFFF0000) | value)

        return deliver_half
    if size < 4:
        return lambda w, data: writes[0](w, _narrow(data, signed))

    def deliver(w: Wave, data: NDArray[np.uint8]) -> None:
        rows = data.view(U32)
        for i, write in enumerate(writes):
            write(w, rows[:, i])

    return deliver


def _narrow(data: NDArray[np.uint8], signed: bool) -> Lanes:
    size = data.shape[1]
    wide = np.zeros((len(data), 4), np.uint8)
    wide[:, :size] = data
    value: Lanes = wide.view(U32)[:, 0]
    if signed:
        shift = 32 - 8 * size
        value = ((value << U32(shift)).view(I32) >> I32(shift)).view(U32)
    return value


# -- LDS


def _lds(instruction: Instruction, match: re.Match[str]) -> Action:
    size, half = _LDS_BYTES[match[4]], match[5] or ""
    two = match[2] is not None
    unit = size * (64 if match[3] else 1)
    names = ("offset0", "offset1") if two else ("offset",)
    offsets = [instruction.integer(name) * (unit if two else 1) for name in names]
    if match[1] == "read":
        return _lds_read(instruction, size, half, offsets, signed=match[4].startswith("i"))
    address, *sources = instruction.operands
    where = bits32(address)
    gathers = [(offset, _gathered(source, size, half)) for offset, source in zip(offsets, sources, strict=True)]

    def write(w: Wave) -> None:
        start = w.spread(where(w))
        for offset, gather in gathers:
            data = gather(w)
            write_bytes(w.lds, _lds_place(w, start, offset, size, instruction), data if w.full else data[w.active])

    return write


def _lds_read(instruction: Instruction, size: int, half: str, offsets: list[int], *, signed: bool) -> Action:
    into, address = instruction.operands
    where, words = bits32(address), (size + 3) // 4
    delivers = [
        _delivered(Operand(into.kind, into.index + i * words, words), size, half, signed=signed)
        for i in range(len(offsets))
    ]

    def read(w: Wave) -> None:
        start = w.spread(where(w)).copy()  # the result may take the address's register
        for offset, deliver in zip(offsets, delivers, strict=True):
            found = read_bytes(w.lds, _lds_place(w, start, offset, size, instruction), size)
            if w.full:
                deliver(w, found)
            else:
                data = np.zeros((w.lanes, size), np.uint8)
                data[w.active] = found
                deliver(w, data)

    return read


def _lds_place(w: Wave, start: Lanes, offset: int, size: int, instruction: Instruction) -> Lanes:
    """Where the active lanes begin in the LDS, bytes. Raises MemoryFaultError for any outside."""
    first = (start if w.full else start[w.active]).astype(I64) + offset
    if first.size and (int(first.min()) < 0 or int(first.max()) + size > w.lds_size):
        raise MemoryFaultError(
            f"{instruction.text} at {instruction.address:#x}: LDS bytes {first.min()} to {first.max() + size}",
            accepted=f"0 to {w.lds_size}, which the code object asks for",
        )
    base = w.lds_first
    found: Lanes = first + (base if w.full or isinstance(base, int) else base[w.active])
    return found


# -- scratch


def _scratch(instruction: Instruction, match: re.Match[str]) -> Action:
    """Words of each lane's own at a fixed place, as compilers spill registers; LLVM's AMDGPU guide, "Private"."""
    load, words, offset = match[1] == "load", int(match[2] or 1), instruction.integer("offset")
    data, *address = instruction.operands if load else [instruction.operands[i] for i in (1, 0, 2)]
    if any(part.kind != "off" for part in address) or offset % 4:
        raise EmulationError(f"{instruction.text}: scratch by an address in registers is not modelled")
    rows, reads = range(offset // 4, offset // 4 + words), [bits32(data.part(i)) for i in range(words)]
    writes = [set_lanes(data.part(i)) for i in range(words)]

    def check(w: Wave) -> None:
        if offset < 0 or rows.stop > len(w.scratch):
            raise MemoryFaultError(
                f"{instruction.text} at {instruction.address:#x}: scratch bytes {offset} to {offset + 4 * words}",
                accepted=f"0 to {4 * len(w.scratch)}, which the code object asks for",
            )

    def store(w: Wave) -> None:
        check(w)
        for row, read in zip(rows, reads, strict=True):
            np.copyto(w.scratch[row], read(w), where=w.active)

    def fetch(w: Wave) -> None:
        check(w)
        for row, write in zip(rows, writes, strict=True):
            write(w, w.scratch[row].copy())

    return fetch if load else store
