"""Packed vector instructions: two fp32, two fp16 or two integers of 16 bits in one operand."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from attn_wave.emulator import arithmetic
from attn_wave.emulator.instructions import Instruction, Operand
from attn_wave.emulator.operands import bits32, half, half_bits, set_lanes
from attn_wave.emulator.wave import F16, F32, U32, Action, Lanes, Wave, spread

_PAIR: Final = re.compile(r"v_pk_(mul|add|fma)_f32|v_pk_(mov)_b32")
_SIGN: Final = U32(0x80000000)


def packed(instruction: Instruction) -> Action | None:
    """The action of a packed instruction; None for one that is not modelled."""
    base = instruction.base
    pair = _PAIR.fullmatch(base)
    if pair is not None:
        return _move_pair(instruction) if pair[2] else _pair(instruction, arithmetic.FLOAT[f"v_{pair[1]}_f32"])
    if base == "v_pack_b32_f16":
        return _pack(instruction)
    plain = base.replace("v_pk_", "v_")
    if not base.startswith("v_pk_"):
        return None
    if plain in arithmetic.HALF:
        return _halves(instruction, _half_function(arithmetic.HALF[plain]), _signed_half)
    return _halves(instruction, arithmetic.SHORT[plain], _short) if plain in arithmetic.SHORT else None


def _component(op: Operand, which: int) -> Callable[[Wave], Any]:
    """The fp32 ``which`` of a pair; a float constant stands in both."""
    return bits32(op.part(which))


def _pair(instruction: Instruction, function: arithmetic.Function) -> Action:
    into, *sources = instruction.operands
    count = len(sources)
    halves = []
    for select, negate, default in (("op_sel", "neg_lo", 0), ("op_sel_hi", "neg_hi", 1)):
        which, signs = instruction.bits(select, default, count), instruction.bits(negate, 0, count)
        halves.append([(_component(op, which[i]), signs[i]) for i, op in enumerate(sources)])
    writes = [set_lanes(into.part(i)) for i in range(2)]

    def act(w: Wave) -> None:
        results = [function(*[_signed(read(w), sign) for read, sign in reads]) for reads in halves]
        for write, result in zip(writes, results, strict=True):
            write(w, np.asarray(result, F32).view(U32))

    return act


def _signed(bits: Any, negative: int) -> Any:
    return (bits ^ _SIGN if negative else bits).view(F32)


def _move_pair(instruction: Instruction) -> Action:
    into, first, second = instruction.operands
    which = instruction.bits("op_sel", 0, 2)
    reads = _component(first, which[0]), _component(second, which[1])
    writes = [set_lanes(into.part(i)) for i in range(2)]

    def act(w: Wave) -> None:
        values = [spread(read(w)).copy() for read in reads]
        for write, value in zip(writes, values, strict=True):
            write(w, value)

    return act


def _pack(instruction: Instruction) -> Action:
    into, low, high = instruction.operands
    which = instruction.bits("op_sel", 0, 3)
    write, a, b = set_lanes(into), half(low, shift=16 * which[0]), half(high, shift=16 * which[1])
    return lambda w: write(w, half_bits(a(w)) | half_bits(b(w)) << U32(16))


Source = Callable[[Operand, int, int], Callable[[Wave], Lanes]]


def _halves(instruction: Instruction, function: arithmetic.Function, source: Source) -> Action:
    into, *sources = instruction.operands
    count = len(sources)
    halves = []
    for select, negate, default in (("op_sel", "neg_lo", 0), ("op_sel_hi", "neg_hi", 1)):
        which, signs = instruction.bits(select, default, count), instruction.bits(negate, 0, count)
        halves.append([source(op, which[i], signs[i]) for i, op in enumerate(sources)])
    write = set_lanes(into)

    def act(w: Wave) -> None:
        results = [half_bits(function(*[read(w) for read in reads])) for reads in halves]
        write(w, results[0] | results[1] << U32(16))

    return act


def _half_function(function: arithmetic.Function) -> arithmetic.Function:
    return lambda *values: function(*values).astype(F16)


def _signed_half(op: Operand, place: int, negative: int) -> Callable[[Wave], Lanes]:
    read = half(op, shift=16 * place)
    return (lambda w: -read(w)) if negative else read


def _short(op: Operand, place: int, negative: int) -> Callable[[Wave], Lanes]:
    """A constant of 16 bits stands in the low half only: the upper half of an integer constant is its sign."""
    bits = bits32(op)
    return lambda w: (spread(bits(w)) >> U32(16 * place) & U32(0xFFFF)).astype(np.uint16)
