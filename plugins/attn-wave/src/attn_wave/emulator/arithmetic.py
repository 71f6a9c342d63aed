"""What vector instructions compute, by name: functions of lanes, free of registers and modifiers.

fp32 of numpy: transcendentals, reciprocals and roots are its own, not the chip's approximations.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Final

import numpy as np

from attn_wave.emulator.wave import F16, F32, F64, I32, I64, U32, U64, spread

Function = Callable[..., Any]
#: Beyond these an instruction of a division scales its operands.
_SMALL, _LARGE = F32(2.0**-96), F32(2.0**96)


def fused(a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once to fp32 (the product of two fp32 is exact in fp64)."""
    return (a.astype(F64) * b.astype(F64) + c.astype(F64)).astype(F32)


def int32(x: Any) -> Any:
    """The same bits as int32 [64]."""
    return spread(x).astype(U32, copy=False).view(I32)


def _places(x: Any) -> Any:
    return x & U32(31)


def _int24(x: Any) -> Any:
    low = np.asarray(x).astype(I64) & 0xFFFFFF
    return low - ((low & 0x800000) << 1)


def count_bits(x: Any) -> Any:
    bits = np.unpackbits(spread(x).view(np.uint8).reshape(-1, 4), axis=1)
    return bits.sum(1).astype(U32)


def _reverse(x: Any) -> Any:
    bits = np.unpackbits(spread(x).view(np.uint8).reshape(-1, 4), axis=1, bitorder="little")[:, ::-1]
    return np.packbits(np.ascontiguousarray(bits), axis=1, bitorder="little").view(U32)[:, 0]


def _bytes(a: Any, b: Any, choice: Any) -> Any:
    """v_perm_b32: bytes of b (0 to 3) and a (4 to 7); 12 is 0, 13 and more 0xff; 8 to 11 spread a sign."""
    if not np.ndim(choice):
        plan = _moves(int(choice))
        if plan is not None:
            ones, moves = plan
            result: Any = ones
            for of_a, left, mask in moves:
                source = a if of_a else b
                moved = source << U32(left) if left >= 0 else source >> U32(-left)
                result = result | moved & mask
            return result
    low, high, choices = np.broadcast_arrays(spread(b), spread(a), spread(choice))
    source = np.stack([low, high], 1).view(np.uint8)
    chosen = np.ascontiguousarray(choices).view(np.uint8).reshape(-1, 4)
    result = np.where(chosen < 8, np.take_along_axis(source, np.minimum(chosen, 7).astype(I64), 1), 0)
    for code, byte in ((8, 1), (9, 3), (10, 5), (11, 7)):
        sign = np.where(source[:, byte : byte + 1] & 0x80, 0xFF, 0)
        result = np.where(chosen == code, sign, result)
    return np.where(chosen >= 13, 0xFF, result).astype(np.uint8).view(U32)[:, 0]


@lru_cache(256)
def _moves(choice: int) -> tuple[np.uint32, tuple[tuple[bool, int, np.uint32], ...]] | None:
    """What v_perm_b32 does for one choice of all lanes: bits that are 1, and (of a, places to the left, which bits).

    None if a sign is among it.
    """
    ones, masks = 0, dict[tuple[bool, int], int]()
    for place in range(4):
        code = choice >> 8 * place & 0xFF
        byte = 0xFF << 8 * place
        if 8 <= code < 12:
            return None
        if code >= 13:
            ones |= byte
        elif code < 8:
            move = code >= 4, 8 * (place - code % 4)
            masks[move] = masks.get(move, 0) | byte
    return U32(ones), tuple((of_a, left, U32(mask)) for (of_a, left), mask in masks.items())


def _field(a: Any, start: Any, width: Any) -> Any:
    places = _places(width).astype(U64)
    return ((a.astype(U64) >> _places(start).astype(U64)) & ((U64(1) << places) - U64(1))).astype(U32)


def _signed_field(a: Any, start: Any, width: Any) -> Any:
    value, bits = _field(a, start, width).astype(I64), _places(width).astype(I64)
    negative = (bits > 0) & (value >> np.maximum(bits - 1, 0) & 1).astype(bool)
    return (value - np.where(negative, I64(1) << bits, 0)).astype(U32)


def _align(a: Any, b: Any, places: Any) -> Any:
    return ((a.astype(U64) << U64(32) | b.astype(U64)) >> (places & U32(31)).astype(U64)).astype(U32)


def _to_integer(low: int, high: int) -> Function:
    def convert(x: Any) -> Any:
        whole = np.nan_to_num(np.trunc(spread(x).astype(F64)), nan=0.0, posinf=high, neginf=low)
        return np.clip(whole, low, high).astype(I64).astype(U32)

    return convert


def _within(x: Any) -> Any:
    return (np.abs(x) > _SMALL) & (np.abs(x) < _LARGE)


def _fixed_up(quotient: Any, divisor: Any, dividend: Any) -> Any:
    """The last step of a division: what the steps before it made of the quotient, with the sign of the operands.

    They go without the scaling that keeps extreme operands in range, so that for those the quotient is taken itself,
    as for zeros, infinities and NaN.
    """
    exact = dividend / divisor
    plain = _within(dividend) & _within(divisor) & _within(exact)
    return np.where(plain, np.copysign(np.abs(quotient), exact), exact)


#: fp32 operands to an fp32 result
FLOAT: Final[Mapping[str, Function]] = {
    "v_add_f32": operator.add,
    "v_sub_f32": operator.sub,
    "v_subrev_f32": lambda a, b: b - a,
    "v_mul_f32": operator.mul,
    "v_max_f32": np.fmax,
    "v_min_f32": np.fmin,
    "v_max3_f32": lambda a, b, c: np.fmax(np.fmax(a, b), c),
    "v_fma_f32": fused,
    "v_exp_f32": np.exp2,
    "v_log_f32": np.log2,
    "v_rcp_f32": lambda a: F32(1) / a,
    "v_rcp_iflag_f32": lambda a: F32(1) / a,
    "v_rsq_f32": lambda a: F32(1) / np.sqrt(a),
    "v_sqrt_f32": np.sqrt,
    "v_trunc_f32": np.trunc,
    "v_rndne_f32": np.rint,
    "v_floor_f32": np.floor,
    "v_ceil_f32": np.ceil,
    "v_div_fmas_f32": fused,
    "v_div_fixup_f32": _fixed_up,
}
#: uint32 operands to a uint32 result
INTEGER: Final[Mapping[str, Function]] = {
    "v_mov_b32": lambda a: a,
    "v_accvgpr_read_b32": lambda a: a,
    "v_accvgpr_write_b32": lambda a: a,
    "v_accvgpr_mov_b32": lambda a: a,
    "v_not_b32": operator.invert,
    "v_bfrev_b32": _reverse,
    "v_add_u32": operator.add,
    "v_sub_u32": operator.sub,
    "v_subrev_u32": lambda a, b: b - a,
    "v_and_b32": operator.and_,
    "v_or_b32": operator.or_,
    "v_xor_b32": operator.xor,
    "v_lshlrev_b32": lambda a, b: b << _places(a),
    "v_lshrrev_b32": lambda a, b: b >> _places(a),
    "v_ashrrev_i32": lambda a, b: (int32(b) >> _places(a).astype(I32)).view(U32),
    "v_min_u32": np.minimum,
    "v_max_u32": np.maximum,
    "v_min_i32": lambda a, b: np.minimum(int32(a), int32(b)).view(U32),
    "v_max_i32": lambda a, b: np.maximum(int32(a), int32(b)).view(U32),
    "v_mul_u32_u24": lambda a, b: (a & U32(0xFFFFFF)) * (b & U32(0xFFFFFF)),
    "v_mul_i32_i24": lambda a, b: (_int24(a) * _int24(b)).astype(U32),
    "v_mad_u32_u24": lambda a, b, c: (a & U32(0xFFFFFF)) * (b & U32(0xFFFFFF)) + c,
    "v_mad_i32_i24": lambda a, b, c: (_int24(a) * _int24(b) + c.astype(I64)).astype(U32),
    "v_mul_lo_u32": operator.mul,
    "v_max3_i32": lambda a, b, c: np.maximum(np.maximum(int32(a), int32(b)), int32(c)).view(U32),
    "v_min3_i32": lambda a, b, c: np.minimum(np.minimum(int32(a), int32(b)), int32(c)).view(U32),
    "v_mul_hi_i32": lambda a, b: (int32(a).astype(I64) * int32(b).astype(I64) >> 32).astype(U32),
    "v_mul_hi_u32": lambda a, b: (a.astype(U64) * b.astype(U64) >> U64(32)).astype(U32),
    "v_or3_b32": lambda a, b, c: a | b | c,
    "v_add3_u32": lambda a, b, c: a + b + c,
    "v_lshl_add_u32": lambda a, b, c: (a << _places(b)) + c,
    "v_add_lshl_u32": lambda a, b, c: (a + b) << _places(c),
    "v_lshl_or_b32": lambda a, b, c: a << _places(b) | c,
    "v_and_or_b32": lambda a, b, c: a & b | c,
    "v_xad_u32": lambda a, b, c: (a ^ b) + c,
    "v_bfi_b32": lambda a, b, c: a & b | ~a & c,
    "v_bfe_u32": _field,
    "v_bfe_i32": _signed_field,
    "v_alignbit_b32": _align,
    "v_alignbyte_b32": lambda a, b, c: _align(a, b, (c & U32(3)) * U32(8)),
    "v_perm_b32": _bytes,
    "v_cvt_f32_u32": lambda a: a.astype(F32).view(U32),
    "v_cvt_f32_i32": lambda a: int32(a).astype(F32).view(U32),
    "v_add_u16": lambda a, b: (a + b) & U32(0xFFFF),
    "v_sub_u16": lambda a, b: (a - b) & U32(0xFFFF),
    "v_mul_lo_u16": lambda a, b: (a * b) & U32(0xFFFF),
    "v_lshlrev_b16": lambda a, b: b << (a & U32(15)) & U32(0xFFFF),
    "v_lshrrev_b16": lambda a, b: (b & U32(0xFFFF)) >> (a & U32(15)),
    "v_mad_legacy_u16": lambda a, b, c: (a * b + c) & U32(0xFFFF),
}
#: fp32 operand to a uint32 result
CONVERT: Final[Mapping[str, Function]] = {
    "v_cvt_u32_f32": _to_integer(0, 2**32 - 1),
    "v_cvt_i32_f32": _to_integer(-(2**31), 2**31 - 1),
    "v_cvt_f16_f32": lambda a: spread(a).astype(F16).view(np.uint16).astype(U32),
}
#: fp16 operands to an fp16 result
HALF: Final[Mapping[str, Function]] = {
    "v_add_f16": operator.add,
    "v_sub_f16": operator.sub,
    "v_mul_f16": operator.mul,
    "v_max_f16": np.fmax,
    "v_min_f16": np.fmin,
    "v_fma_f16": lambda a, b, c: (a.astype(F64) * b.astype(F64) + c.astype(F64)).astype(F16),
}
#: uint16 operands to a uint16 result
SHORT: Final[Mapping[str, Function]] = {
    "v_mul_lo_u16": operator.mul,
    "v_add_u16": operator.add,
    "v_sub_u16": operator.sub,
    "v_sub_i16": operator.sub,
    "v_lshlrev_b16": lambda a, b: b << (a & np.uint16(15)),
    "v_lshrrev_b16": lambda a, b: b >> (a & np.uint16(15)),
}
#: two uint64, or a shift and a uint64, to a uint64
WIDE: Final[Mapping[str, Function]] = {
    "v_lshlrev_b64": lambda a, b: b << (a & U32(63)).astype(U64),
    "v_lshrrev_b64": lambda a, b: b >> (a & U32(63)).astype(U64),
    "v_ashrrev_i64": lambda a, b: (spread(b).view(I64) >> (a & U32(63)).astype(I64)).view(U64),
}
COMPARE: Final[Mapping[str, Function]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lg": lambda a, b: (a < b) | (a > b),
    "gt": operator.gt,
    "ge": operator.ge,
    "lt": operator.lt,
    "le": operator.le,
    "o": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "u": lambda a, b: np.isnan(a) | np.isnan(b),
    "neq": lambda a, b: ~(a == b),
    "nlt": lambda a, b: ~(a < b),
    "nle": lambda a, b: ~(a <= b),
    "ngt": lambda a, b: ~(a > b),
    "nge": lambda a, b: ~(a >= b),
    "nlg": lambda a, b: ~((a < b) | (a > b)),
}
