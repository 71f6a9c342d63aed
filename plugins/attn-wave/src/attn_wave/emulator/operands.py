"""Readers and writers of operands: what turns an Operand into a function of a wave."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from attn_wave.emulator.faults import EmulationError
from attn_wave.emulator.instructions import Operand
from attn_wave.emulator.wave import EXEC, F16, F32, I32, LOW32, LOW64, U32, U64, Lanes, Wave, spread

ReadLanes = Callable[[Wave], Any]
ReadScalar = Callable[[Wave], int]
WriteLanes = Callable[[Wave, Any], None]
WriteScalar = Callable[[Wave, int], None]

_SIGN: Final = U32(0x80000000)
_MAGNITUDE: Final = U32(0x7FFFFFFF)


def _unreadable(op: Operand) -> EmulationError:
    return EmulationError(f"operand {op.text!r} cannot be read here", given=op.text)


# -- scalars, as Python integers


def scalar32(op: Operand) -> ReadScalar:
    """32 bits of a scalar register or constant."""
    index = op.index
    if op.kind == "s":
        return lambda w: w.scalar[index]
    if op.kind in ("constant", "float"):
        constant = index & LOW32
        return lambda w: constant
    if op.kind == "scc":
        return lambda w: w.scc
    raise _unreadable(op)


def scalar64(op: Operand) -> ReadScalar:
    """64 bits of two scalar registers, or of a constant."""
    index = op.index
    if op.kind == "s":
        return lambda w: w.scalar[index] | w.scalar[index + 1] << 32
    if op.kind == "constant":
        constant = index & LOW64
        return lambda w: constant
    if op.kind == "float":
        constant = struct.unpack("<Q", struct.pack("<d", op.number))[0]
        return lambda w: constant
    raise _unreadable(op)


def set_scalar32(op: Operand) -> WriteScalar:
    """Writes 32 bits; a half of exec changes which lanes are active."""
    index = op.index
    if op.kind != "s":
        raise _unreadable(op)
    if index in (EXEC, EXEC + 1):
        shift = 32 * (index - EXEC)

        def write_exec(w: Wave, value: int) -> None:
            w.set_exec(w.exec_mask & ~(LOW32 << shift) | (value & LOW32) << shift)

        return write_exec

    def write(w: Wave, value: int) -> None:
        w.scalar[index] = value & LOW32

    return write


def set_scalar64(op: Operand) -> WriteScalar:
    """Writes 64 bits into two registers."""
    index = op.index
    if op.kind != "s":
        raise _unreadable(op)
    if index == EXEC:
        return lambda w, value: w.set_exec(value & LOW64)

    def write(w: Wave, value: int) -> None:
        w.scalar[index], w.scalar[index + 1] = value & LOW32, value >> 32 & LOW32

    return write


def set_mask(op: Operand) -> WriteLanes:
    """Writes a bool of each lane into two scalar registers; inactive lanes are 0."""
    write = set_scalar64(op)
    return lambda w, lanes: w.set_masks(write, lanes & w.active)


# -- lanes, as numpy arrays or, where all lanes have the same, of one or none dimension


def bits32(op: Operand) -> ReadLanes:
    """uint32 of each lane, or one for all."""
    index = op.index
    if op.kind == "v":
        return lambda w: w.vector[index]
    if op.kind == "a":
        return lambda w: w.accumulators[index]
    if op.kind == "s":
        return lambda w: w.scalar_lanes(index)
    if op.kind in ("constant", "float"):
        constant = U32(index & LOW32)
        return lambda w: constant
    raise _unreadable(op)


def bits64(op: Operand) -> ReadLanes:
    """uint64 of each lane, or one for all."""
    if op.kind in ("v", "a"):
        low, high = bits32(op.part(0)), bits32(op.part(1))

        def both(w: Wave) -> Lanes:
            words = np.empty(2 * w.lanes, U32)
            words[0::2], words[1::2] = low(w), high(w)
            return words.view(U64)

        return both
    read = scalar64(op)
    return lambda w: w.scalar_lanes64(read)


def float32(op: Operand, read: ReadLanes | None = None) -> ReadLanes:
    """fp32 of each lane, with the operand's sign and magnitude modifiers."""
    bits = read or bits32(op)
    if not (op.negative or op.absolute):
        return lambda w: bits(w).view(F32)

    def modified(w: Wave) -> Any:
        value = bits(w)
        value = value & _MAGNITUDE if op.absolute else value
        return (value ^ _SIGN if op.negative else value).view(F32)

    return modified


def half(op: Operand, read: ReadLanes | None = None, shift: int = 0) -> ReadLanes:
    """fp16 of the low half of a register, or of the half above ``shift`` bits; constants are fp16 themselves."""
    if op.kind == "float":
        constant = np.full(1, -op.number if op.negative else op.number, F16)
        return lambda w: constant
    bits = read or bits32(op)

    def value(w: Wave) -> Lanes:
        found: Lanes = (spread(bits(w)) >> U32(shift) & U32(0xFFFF)).astype(np.uint16).view(F16)
        found = np.abs(found) if op.absolute else found
        return -found if op.negative else found

    return value


def integer32(op: Operand, read: ReadLanes | None = None) -> ReadLanes:
    """int32 [lanes], or [1] for all."""
    bits = read or bits32(op)
    return lambda w: spread(bits(w)).view(I32)


def set_lanes(op: Operand) -> WriteLanes:
    """Writes uint32 to the active lanes of a register."""
    index, accumulation = op.index, op.kind == "a"
    if op.kind not in ("v", "a"):
        raise _unreadable(op)

    def write(w: Wave, value: Any) -> None:
        row = (w.accumulators if accumulation else w.vector)[index]
        if w.full:
            row[:] = value
        else:
            np.copyto(row, value, where=w.active)

    return write


def set_lanes64(op: Operand) -> WriteLanes:
    """Writes uint64 to the active lanes of two registers."""
    low, high = set_lanes(op.part(0)), set_lanes(op.part(1))

    def write(w: Wave, value: Any) -> None:
        words = spread(value).view(U32)
        low(w, words[0::2])
        high(w, words[1::2])

    return write


def half_bits(values: Lanes) -> Lanes:
    """fp16 or uint16 as uint32."""
    return values.view(np.uint16).astype(U32)
