"""Scalar instructions: arithmetic of Python integers, with the condition code where the instruction sets one."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

from attn_wave.emulator.instructions import Instruction
from attn_wave.emulator.operands import scalar32, scalar64, set_scalar32, set_scalar64
from attn_wave.emulator.wave import LOW32, LOW64, U32, Action, Wave, signed

Integer2 = Callable[[int, int], int]

_COMPARE: Final[Mapping[str, Callable[[int, int], bool]]] = {
    "eq": operator.eq, "lg": operator.ne, "gt": operator.gt, "ge": operator.ge, "lt": operator.lt, "le": operator.le,
}  # fmt: skip
_BITWISE: Final[Mapping[str, Integer2]] = {
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "andn1": lambda x, y: ~x & y,
    "andn2": lambda x, y: x & ~y,
    "orn2": lambda x, y: x | ~y,
    "nand": lambda x, y: ~(x & y),
    "nor": lambda x, y: ~(x | y),
    "xnor": lambda x, y: ~(x ^ y),
}
_MULTIPLY: Final[Mapping[str, Integer2]] = {
    "s_mul_i32": lambda x, y: x * y,
    "s_mul_hi_u32": lambda x, y: (x * y) >> 32,
    "s_mul_hi_i32": lambda x, y: (signed(x) * signed(y)) >> 32,
}


def scalar(instruction: Instruction) -> Action | None:
    """The action of a scalar instruction, None for one that is not modelled."""
    for pattern, build in _BUILDERS:
        match = pattern.fullmatch(instruction.name)
        if match is not None:
            return build(instruction, *match.groups())
    return None


def _load(instruction: Instruction, count: str) -> Action:
    into, base, offset = instruction.operands
    words, start, read, plus = int(count or 1), into.index, scalar64(base), scalar32(offset)

    def act(w: Wave) -> None:
        address = read(w) + (plus(w) & ~3)
        buffer = w.memory.find(address, 4 * words, instruction.text)
        first = address - buffer.base
        raw = buffer.data[first : first + 4 * words].tobytes()
        w.scalar[start : start + words] = np.frombuffer(raw, U32).tolist()

    return act


def _add(instruction: Instruction, sign: str, kind: str) -> Action:
    write, (left, right) = set_scalar32(instruction.operands[0]), map(scalar32, instruction.operands[1:])
    factor = 1 if sign == "add" else -1
    if kind == "u32":

        def unsigned(w: Wave) -> None:
            result = left(w) + factor * right(w)
            w.scc = int(not 0 <= result <= LOW32)
            write(w, result)

        return unsigned

    def overflowing(w: Wave) -> None:
        result = signed(left(w)) + factor * signed(right(w))
        w.scc = int(not -(2**31) <= result < 2**31)
        write(w, result)

    return overflowing


def _carry(instruction: Instruction, sign: str) -> Action:
    write, (left, right) = set_scalar32(instruction.operands[0]), map(scalar32, instruction.operands[1:])
    factor = 1 if sign == "addc" else -1

    def act(w: Wave) -> None:
        result = left(w) + factor * (right(w) + w.scc)
        w.scc = int(not 0 <= result <= LOW32)
        write(w, result)

    return act


def _bitwise(instruction: Instruction, name: str, width: str) -> Action:
    into, *sources = instruction.operands
    wide = width == "64"
    write, (left, right) = (set_scalar64 if wide else set_scalar32)(into), map(scalar64 if wide else scalar32, sources)
    function, limit = _BITWISE[name], LOW64 if wide else LOW32

    def act(w: Wave) -> None:
        result = function(left(w), right(w)) & limit
        write(w, result)
        w.scc = int(result != 0)

    return act


def _save_exec(instruction: Instruction, name: str) -> Action:
    save, read, function = set_scalar64(instruction.operands[0]), scalar64(instruction.operands[1]), _BITWISE[name]

    def act(w: Wave) -> None:
        before, operand = w.exec_mask, read(w)
        save(w, before)
        w.set_exec(function(operand, before) & LOW64)
        w.scc = int(w.exec_mask != 0)

    return act


def _move(instruction: Instruction, width: str) -> Action:
    into, source = instruction.operands
    write, read = (set_scalar64(into), scalar64(source)) if width == "64" else (set_scalar32(into), scalar32(source))
    return lambda w: write(w, read(w))


def _invert(instruction: Instruction, width: str) -> Action:
    into, source = instruction.operands
    wide = width == "64"
    write, read = (set_scalar64(into), scalar64(source)) if wide else (set_scalar32(into), scalar32(source))
    limit = LOW64 if wide else LOW32

    def act(w: Wave) -> None:
        result = ~read(w) & limit
        write(w, result)
        w.scc = int(result != 0)

    return act


def _immediate(instruction: Instruction, name: str) -> Action:
    write, read = set_scalar32(instruction.operands[0]), scalar32(instruction.operands[0])
    constant = signed(instruction.operands[1].index & 0xFFFF, 16)
    if name == "mov":
        return lambda w: write(w, constant)
    if name == "mul":
        return lambda w: write(w, signed(read(w)) * constant)

    def add(w: Wave) -> None:
        result = signed(read(w)) + constant
        w.scc = int(not -(2**31) <= result < 2**31)
        write(w, result)

    return add


def _shift(instruction: Instruction, name: str, width: str) -> Action:
    into, source, by = instruction.operands
    bits = int(width)
    write, read = (set_scalar64(into), scalar64(source)) if bits == 64 else (set_scalar32(into), scalar32(source))
    amount, limit = scalar32(by), LOW64 if bits == 64 else LOW32

    def act(w: Wave) -> None:
        value, places = read(w), amount(w) & (bits - 1)
        result = value << places if name == "lshl" else (signed(value, bits) if name == "ashr" else value) >> places
        write(w, result & limit)
        w.scc = int(result & limit != 0)

    return act


def _shift_add(instruction: Instruction, places: str) -> Action:
    write, (left, right) = set_scalar32(instruction.operands[0]), map(scalar32, instruction.operands[1:])

    def act(w: Wave) -> None:
        result = (left(w) << int(places)) + right(w)
        w.scc = int(result > LOW32)
        write(w, result)

    return act


def _multiply(instruction: Instruction) -> Action:
    write, (left, right) = set_scalar32(instruction.operands[0]), map(scalar32, instruction.operands[1:])
    function = _MULTIPLY[instruction.name]
    return lambda w: write(w, function(left(w), right(w)))


def _extreme(instruction: Instruction, name: str, kind: str) -> Action:
    write, (left, right) = set_scalar32(instruction.operands[0]), map(scalar32, instruction.operands[1:])
    choose: Callable[[int, int], int] = min if name == "min" else max

    def act(w: Wave) -> None:
        x, y = left(w), right(w)
        if kind == "i":
            x, y = signed(x), signed(y)
        w.scc = int(choose(x, y) == x and x != y)
        write(w, choose(x, y))

    return act


def _select(instruction: Instruction, width: str) -> Action:
    into, *sources = instruction.operands
    wide = width == "64"
    write, (yes, no) = (set_scalar64 if wide else set_scalar32)(into), map(scalar64 if wide else scalar32, sources)
    return lambda w: write(w, yes(w) if w.scc else no(w))


def _compare(instruction: Instruction, name: str, kind: str, width: str) -> Action:
    left, right = map(scalar64 if width == "64" else scalar32, instruction.operands)
    function, bits = _COMPARE[name], int(width)

    def act(w: Wave) -> None:
        x, y = left(w), right(w)
        w.scc = int(function(signed(x, bits), signed(y, bits)) if kind == "i" else function(x, y))

    return act


def _compare_immediate(instruction: Instruction, name: str, kind: str) -> Action:
    read, constant, function = scalar32(instruction.operands[0]), instruction.operands[1].index & 0xFFFF, _COMPARE[name]

    def act(w: Wave) -> None:
        value = read(w)
        w.scc = int(function(signed(value), signed(constant, 16)) if kind == "i" else function(value, constant))

    return act


def _bit_test(instruction: Instruction, wanted: str) -> Action:
    read, place = map(scalar32, instruction.operands)

    def act(w: Wave) -> None:
        w.scc = int((read(w) >> (place(w) & 31) & 1) == int(wanted))

    return act


def _field(instruction: Instruction, kind: str) -> Action:
    write, (read, where) = set_scalar32(instruction.operands[0]), map(scalar32, instruction.operands[1:])

    def act(w: Wave) -> None:
        start, width = where(w) & 31, where(w) >> 16 & 0x7F
        result = read(w) >> start & ((1 << width) - 1)
        result = signed(result, width) if kind == "i" and width else result
        write(w, result)
        w.scc = int(result != 0)

    return act


def _first_bit(instruction: Instruction) -> Action:
    write, read = set_scalar32(instruction.operands[0]), scalar32(instruction.operands[1])
    return lambda w: write(w, (read(w) & -read(w)).bit_length() - 1)


def _reverse(instruction: Instruction) -> Action:
    write, read = set_scalar32(instruction.operands[0]), scalar32(instruction.operands[1])
    return lambda w: write(w, int(f"{read(w):032b}"[::-1], 2))


def _absolute(instruction: Instruction) -> Action:
    write, read = set_scalar32(instruction.operands[0]), scalar32(instruction.operands[1])

    def act(w: Wave) -> None:
        result = abs(signed(read(w)))
        write(w, result)
        w.scc = int(result != 0)

    return act


def _pack(instruction: Instruction, left_half: str, right_half: str) -> Action:
    write, (left, right) = set_scalar32(instruction.operands[0]), map(scalar32, instruction.operands[1:])
    low, high = (16 * (half == "h") for half in (left_half, right_half))
    return lambda w: write(w, (left(w) >> low & 0xFFFF) | (right(w) >> high & 0xFFFF) << 16)


def _extend(instruction: Instruction, width: str) -> Action:
    write, read = set_scalar32(instruction.operands[0]), scalar32(instruction.operands[1])
    return lambda w: write(w, signed(read(w) & ((1 << int(width)) - 1), int(width)))


_BUILDERS: Final[list[tuple[re.Pattern[str], Callable[..., Action]]]] = [
    (re.compile(pattern), build)
    for pattern, build in (
        (r"s_load_dword(?:x(\d+))?", _load),
        (r"s_(add|sub)_(u32|i32)", _add),
        (r"s_(addc|subb)_u32", _carry),
        (r"s_(and|or|xor|andn2|orn2|nand|nor|xnor)_b(32|64)", _bitwise),
        (r"s_(and|or|xor|andn1|andn2|orn2)_saveexec_b64", _save_exec),
        (r"s_mov_b(32|64)", _move),
        (r"s_not_b(32|64)", _invert),
        (r"s_(mov|add|mul)k_i32", _immediate),
        (r"s_(lshl|lshr)_b(32|64)", _shift),
        (r"s_(ashr)_i(32|64)", _shift),
        (r"s_lshl([1234])_add_u32", _shift_add),
        (r"s_mul_i32|s_mul_hi_[ui]32", _multiply),
        (r"s_(min|max)_([ui])32", _extreme),
        (r"s_cselect_b(32|64)", _select),
        (r"s_cmp_(eq|lg|gt|ge|lt|le)_([ui])(32|64)", _compare),
        (r"s_cmpk_(eq|lg|gt|ge|lt|le)_([ui])32", _compare_immediate),
        (r"s_bitcmp([01])_b32", _bit_test),
        (r"s_bfe_([ui])32", _field),
        (r"s_ff1_i32_b32", _first_bit),
        (r"s_brev_b32", _reverse),
        (r"s_abs_i32", _absolute),
        (r"s_pack_(l|h)(l|h)_b32_b16", _pack),
        (r"s_sext_i32_i(8|16)", _extend),
    )
]
