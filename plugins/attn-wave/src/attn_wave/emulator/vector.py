"""Vector instructions: operands read with their modifiers, the function of `arithmetic`, the result written."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from attn_wave.emulator import arithmetic
from attn_wave.emulator.instructions import Instruction, Operand, operand
from attn_wave.emulator.lanes import LaneReads
from attn_wave.emulator.operands import (
    bits32,
    bits64,
    float32,
    half,
    half_bits,
    integer32,
    scalar64,
    set_lanes,
    set_lanes64,
    set_mask,
    set_scalar64,
)
from attn_wave.emulator.wave import F16, F32, F64, I64, LOW32, U32, U64, Action, Lanes, Wave, spread

_COMPARISON: Final = re.compile(r"v_cmp_([a-z]+)_(f32|f16|[ui]16|[ui]32|[ui]64)")
_CARRY: Final = re.compile(r"v_(add|sub|subrev|addc|subb|subbrev)_co_u32")
#: for each lane the bits of those below it, of the first 32 and of the others
_LANES_BELOW: Final = [
    np.array([(1 << min(32, max(0, n - first))) - 1 for n in range(64)], U64).astype(U32) for first in (0, 32)
]


def vector(instruction: Instruction) -> Action | None:
    """The action of a vector instruction; None for one that is not modelled."""
    base = instruction.base
    for table, build in _TABLES:
        if base in table:
            return build(instruction, table[base])
    if base in _SPECIAL:
        return _SPECIAL[base](instruction)
    comparison, carry = _COMPARISON.fullmatch(base), _CARRY.fullmatch(base)
    if comparison is not None and comparison[1] in arithmetic.COMPARE:
        return _compare(instruction, arithmetic.COMPARE[comparison[1]], comparison[2])
    return _carry(instruction, carry[1]) if carry is not None else None


def _float(instruction: Instruction, function: arithmetic.Function) -> Action:
    lanes = LaneReads(instruction)
    into, *sources = instruction.operands
    write = lanes.write(into)
    reads = [float32(op, lanes.read(op, i)) for i, op in enumerate(sources)]
    finish = _finish(instruction)
    if finish is None and len(reads) == 2:
        left, right = reads
        return lambda w: write(w, function(left(w), right(w)).view(U32))
    if finish is None:
        return lambda w: write(w, function(*[read(w) for read in reads]).view(U32))
    return lambda w: write(w, np.asarray(finish(function(*[read(w) for read in reads])), F32).view(U32))


def _finish(instruction: Instruction) -> Callable[[Any], Any] | None:
    """What the output modifiers do: a factor of 2, 4 or a half, and a clamp to 0..1."""
    modifiers = instruction.modifiers
    factor = F32(modifiers.get("mul", "1")) / F32(modifiers.get("div", "1"))
    if "clamp" in modifiers:
        return lambda x: np.clip(x * factor, F32(0), F32(1))
    return None if factor == 1 else (lambda x: x * factor)


def _integer(instruction: Instruction, function: arithmetic.Function) -> Action:
    lanes = LaneReads(instruction)
    into, *sources = instruction.operands
    write, reads = lanes.write(into), [lanes.read(op, i) for i, op in enumerate(sources)]
    if len(reads) == 2:
        left, right = reads
        return lambda w: write(w, function(left(w), right(w)))
    return lambda w: write(w, function(*[read(w) for read in reads]))


def _convert(instruction: Instruction, function: arithmetic.Function) -> Action:
    lanes = LaneReads(instruction)
    into, source = instruction.operands
    write, read = lanes.write(into), float32(source, lanes.read(source, 0))
    return lambda w: write(w, function(read(w)))


def _half(instruction: Instruction, function: arithmetic.Function) -> Action:
    lanes = LaneReads(instruction)
    into, *sources = instruction.operands
    write, reads = lanes.write(into), [half(op, lanes.read(op, i)) for i, op in enumerate(sources)]
    return lambda w: write(w, half_bits(function(*[read(w) for read in reads]).astype(F16)))


def _wide(instruction: Instruction, function: arithmetic.Function) -> Action:
    into, places, source = instruction.operands
    write, by, read = set_lanes64(into), bits32(places), bits64(source)
    return lambda w: write(w, function(by(w), read(w)))


def _compare(instruction: Instruction, function: arithmetic.Function, kind: str) -> Action:
    lanes = LaneReads(instruction)
    write = set_mask(instruction.operands[0])
    left, right = (_comparable(op, i, kind, lanes) for i, op in enumerate(instruction.operands[1:3]))
    return lambda w: write(w, function(left(w), right(w)))


def _comparable(op: Operand, position: int, kind: str, lanes: LaneReads) -> Callable[[Wave], Any]:
    if kind.endswith("64"):
        wide = bits64(op)
        return wide if kind == "u64" else lambda w: spread(wide(w)).view(I64)
    bits = lanes.read(op, position)
    if kind == "f32":
        return float32(op, bits)
    if kind == "f16":
        return half(op, bits)
    if kind == "i32":
        return integer32(op, bits)
    if kind == "u32":
        return bits
    dtype = np.uint16 if kind == "u16" else np.int16
    return lambda w: (spread(bits(w)) & U32(0xFFFF)).astype(np.uint16).view(dtype)


def _carry(instruction: Instruction, name: str) -> Action:
    lanes = LaneReads(instruction)
    into, carry_out, left, right, *carry_in = instruction.operands
    write, flag, a, b = lanes.write(into), set_mask(carry_out), lanes.read(left, 0), lanes.read(right, 1)
    before = scalar64(carry_in[0]) if carry_in else None

    def act(w: Wave) -> None:
        x, y = spread(a(w)).astype(I64), spread(b(w)).astype(I64)
        more = w.masks(before).astype(I64) if before else 0
        result = x + y + more if name.startswith("add") else (y - x if name.endswith("rev") else x - y) - more
        write(w, (result & LOW32).astype(U32))
        flag(w, (result > LOW32) | (result < 0))

    return act


# -- instructions with a form of their own


def _select(instruction: Instruction) -> Action:
    lanes = LaneReads(instruction)
    into, no, yes, *mask = instruction.operands
    write, chosen = lanes.write(into), scalar64(mask[0] if mask else operand("vcc"))
    reads = [float32(op, lanes.read(op, i)) for i, op in enumerate((no, yes))]
    return lambda w: write(w, np.where(w.masks(chosen), reads[1](w).view(U32), reads[0](w).view(U32)))


def _accumulate(instruction: Instruction) -> Action:
    lanes = LaneReads(instruction)
    into, left, right = instruction.operands
    write, a, b, c = lanes.write(into), float32(left, lanes.read(left, 0)), float32(right), float32(into)
    return lambda w: write(w, arithmetic.fused(a(w), b(w), c(w)).view(U32))


def _with_literal(instruction: Instruction) -> Action:
    """v_fmamk (a * K + b) and v_fmaak (a * b + K): in this order the operands are those of a fused multiply-add."""
    lanes = LaneReads(instruction)
    write, (a, b, c) = lanes.write(instruction.operands[0]), map(float32, instruction.operands[1:])
    return lambda w: write(w, np.asarray(arithmetic.fused(a(w), b(w), c(w)), F32).view(U32))


def _scale_exponent(instruction: Instruction) -> Action:
    lanes = LaneReads(instruction)
    into, source, power = instruction.operands
    write, a, b = lanes.write(into), float32(source), integer32(power)
    return lambda w: write(w, np.ldexp(spread(a(w)), b(w)).astype(F32).view(U32))


def _divide_scale(instruction: Instruction) -> Action:
    """The first step of a division, without its scaling: it only keeps the range, which fp64 does not need."""
    into, flag, source = instruction.operands[:3]
    lanes = LaneReads(instruction)
    write, clear, read = lanes.write(into), set_scalar64(flag), float32(source)

    def act(w: Wave) -> None:
        write(w, read(w).view(U32))
        for wave in w.waves:
            clear(wave, 0)

    return act


def _widen_half(instruction: Instruction) -> Action:
    lanes = LaneReads(instruction)
    into, source = instruction.operands
    write, read = lanes.write(into), half(source, lanes.read(source, 0))
    return lambda w: write(w, read(w).astype(F32).view(U32))


def _round_toward_zero(instruction: Instruction) -> Action:
    lanes = LaneReads(instruction)
    write, (a, b) = lanes.write(instruction.operands[0]), map(float32, instruction.operands[1:])

    def truncated(x: Any) -> Lanes:
        value = spread(x)
        near = value.astype(F16)
        bits = near.view(np.uint16).copy()
        bits[(np.abs(near.astype(F32)) > np.abs(value)) & np.isfinite(value)] -= 1
        return bits.astype(U32)

    return lambda w: write(w, truncated(a(w)) | truncated(b(w)) << U32(16))


def _fused_mixed(instruction: Instruction) -> Action:
    """A fused multiply-add of fp32 and fp16 operands (those of ``op_sel_hi``), rounded to one half of a register."""
    into, *sources = instruction.operands
    wide, upper = instruction.bits("op_sel_hi", 0, 3), instruction.bits("op_sel", 0, 3)
    reads = [half(op, shift=16 * upper[i]) if wide[i] else float32(op) for i, op in enumerate(sources)]
    write, shift = set_lanes(into), U32(16 if instruction.base.endswith("mixhi_f16") else 0)
    kept = U32(LOW32) ^ U32(0xFFFF) << shift

    def act(w: Wave) -> None:
        a, b, c = (np.asarray(read(w)).astype(F64) for read in reads)
        result = half_bits(spread((a * b + c).astype(F16)))
        write(w, w.vector[into.index] & kept | result << shift)

    return act


def _multiply_add_signed(instruction: Instruction) -> Action:
    """Without its carry, which nobody reads: of a signed sum the manual does not say what it is."""
    into, _, left, right, plus = instruction.operands
    write, a, b, c = set_lanes64(into), integer32(left), integer32(right), bits64(plus)
    return lambda w: write(w, (a(w).astype(I64) * b(w).astype(I64)).astype(U64) + c(w))


def _multiply_add_wide(instruction: Instruction) -> Action:
    into, flag, left, right, plus = instruction.operands
    write, carry, a, b, c = set_lanes64(into), set_mask(flag), bits32(left), bits32(right), bits64(plus)

    def act(w: Wave) -> None:
        product = spread(a(w)).astype(U64) * spread(b(w)).astype(U64)
        result = product + c(w)
        write(w, result)
        carry(w, result < product)

    return act


def _shift_add_wide(instruction: Instruction) -> Action:
    into, source, places, plus = instruction.operands
    write, a, by, c = set_lanes64(into), bits64(source), bits32(places), bits64(plus)
    return lambda w: write(w, spread((a(w) << (by(w) & U32(7)).astype(U64)) + c(w)))


def _count_below(instruction: Instruction) -> Action:
    """v_mbcnt: how many bits of a mask are those of lanes below one's own, of the first 32 lanes or of the others."""
    into, mask, plus = instruction.operands
    write, a, b = set_lanes(into), bits32(mask), bits32(plus)
    below = _LANES_BELOW["_hi_" in instruction.base]
    return lambda w: write(w, b(w) + arithmetic.count_bits(a(w) & w.each(below)))


def _move_wide(instruction: Instruction) -> Action:
    into, source = instruction.operands
    write, read = set_lanes64(into), bits64(source)
    return lambda w: write(w, spread(read(w)))


_TABLES: Final = (
    (arithmetic.FLOAT, _float),
    (arithmetic.INTEGER, _integer),
    (arithmetic.CONVERT, _convert),
    (arithmetic.HALF, _half),
    (arithmetic.WIDE, _wide),
)
_SPECIAL: Final[dict[str, Callable[[Instruction], Action]]] = {
    "v_cndmask_b32": _select,
    "v_fmac_f32": _accumulate,
    "v_fmamk_f32": _with_literal,
    "v_fmaak_f32": _with_literal,
    "v_ldexp_f32": _scale_exponent,
    "v_div_scale_f32": _divide_scale,
    "v_cvt_f32_f16": _widen_half,
    "v_cvt_pkrtz_f16_f32": _round_toward_zero,
    "v_mad_u64_u32": _multiply_add_wide,
    "v_mad_i64_i32": _multiply_add_signed,
    "v_fma_mixlo_f16": _fused_mixed,
    "v_fma_mixhi_f16": _fused_mixed,
    "v_lshl_add_u64": _shift_add_wide,
    "v_mov_b64": _move_wide,
    "v_mbcnt_lo_u32_b32": _count_below,
    "v_mbcnt_hi_u32_b32": _count_below,
}
