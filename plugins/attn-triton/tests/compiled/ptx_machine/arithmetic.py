"""What instructions on registers compute, for all threads at once: numpy arrays in, a numpy array out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

Values = NDArray[Any]
Operation = Callable[..., Values]

TYPES: Final = {
    "u8": np.uint8, "s8": np.int8, "b8": np.uint8, "u16": np.uint16, "s16": np.int16, "b16": np.uint16,
    "f16": np.float16,
    "bf16": np.uint16, "u32": np.uint32, "s32": np.int32, "b32": np.uint32, "f32": np.float32, "u64": np.uint64,
    "s64": np.int64, "b64": np.uint64, "pred": np.bool_, "f16x2": np.uint32, "bf16x2": np.uint32, "e4m3x2": np.uint16,
    "e5m2x2": np.uint16,
}  # fmt: skip
_WIDE: Final = {"s32": np.int64, "u32": np.uint64, "s16": np.int32, "u16": np.uint32}
_COMPARE: Final = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}
_FP8: Final = {"e4m3x2": torch.float8_e4m3fn, "e5m2x2": torch.float8_e5m2}
_LOGIC: Final = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def operation(parts: tuple[str, ...]) -> tuple[Operation, tuple[str, ...], str]:
    """What an opcode computes, the types of its sources, and the type of its result. Raises KeyError for an unknown
    one.
    """
    name, kind = parts[0], parts[-1]
    if name in ("add", "sub", "max", "min", "and", "or", "xor", "shl", "shr", "div", "rem"):
        shift = name in ("shl", "shr")
        return _binary(parts), (kind, "u32" if shift else kind), kind
    if name == "mul":
        return _multiply(parts)
    if name in ("mad", "fma"):
        multiplied, _, result = _multiply(parts) if name == "mad" else (np.multiply, (), kind)
        return _added(multiplied, kind if name == "fma" else None), (kind, kind, result), result
    if name == "setp":
        return _COMPARE[parts[1]], (kind, kind), "pred"
    if name == "selp":
        return _chosen, (kind, kind, "pred"), kind
    if name == "cvt":
        return _conversion(parts)
    return _OTHERS[name](kind)


def _binary(parts: tuple[str, ...]) -> Operation:
    name, kind = parts[0], parts[-1]
    if name in _LOGIC:
        return _LOGIC[name]
    if name == "shl":
        bits = TYPES[kind](0).nbytes * 8
        return lambda a, n: np.where(n < bits, a << np.minimum(n, bits - 1).astype(a.dtype), a.dtype.type(0))
    if name == "shr":
        bits = TYPES[kind](0).nbytes * 8
        if kind.startswith("s"):
            return lambda a, n: a >> np.minimum(n, bits - 1).astype(a.dtype)
        return lambda a, n: np.where(n < bits, a >> np.minimum(n, bits - 1).astype(a.dtype), a.dtype.type(0))
    if name == "div":
        return np.divide if kind == "f32" else _truncated
    if name == "rem":
        return lambda a, b: (a - _truncated(a, b) * b).astype(a.dtype)
    if name in ("max", "min"):
        return _extreme(name, parts)
    return {"add": np.add, "sub": np.subtract}[name]


def _chosen(a: Values, b: Values, first: Values) -> Values:
    return np.asarray(np.where(first, a, b))


def _extreme(name: str, parts: tuple[str, ...]) -> Operation:
    if "xorsign" in parts:
        assert parts == ("min", "NaN", "xorsign", "abs", "f32")

        def smaller(a: Values, b: Values) -> Values:
            return np.asarray(np.copysign(np.minimum(np.abs(a), np.abs(b)), np.sign(a) * np.sign(b)))

        return smaller
    if parts[-1] == "f32":
        plain = {("max", True): np.maximum, ("max", False): np.fmax, ("min", True): np.minimum, ("min", False): np.fmin}
        return plain[name, "NaN" in parts]
    chosen = np.maximum if name == "max" else np.minimum
    return (lambda a, b: np.maximum(chosen(a, b), 0)) if "relu" in parts else chosen


def _truncated(a: Values, b: Values) -> Values:
    """Division of integers towards zero; by zero it gives anything."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // safe
    if a.dtype.kind == "i":
        quotient = quotient + ((a % safe != 0) & ((a < 0) != (safe < 0)))
    return quotient.astype(a.dtype)


def _multiply(parts: tuple[str, ...]) -> tuple[Operation, tuple[str, ...], str]:
    kind = parts[-1]
    if "wide" in parts:
        wide = _WIDE[kind]
        return (lambda a, b: a.astype(wide) * b.astype(wide)), (kind, kind), kind[0] + str(np.dtype(wide).itemsize * 8)
    if "hi" in parts and kind in ("s64", "u64"):  # wider than numpy's widest: by Python's own numbers
        return (lambda a, b: ((a.astype(object) * b.astype(object)) >> 64).astype(a.dtype)), (kind, kind), kind
    if "hi" in parts:
        wide, bits = _WIDE[kind], np.dtype(TYPES[kind]).itemsize * 8
        return (lambda a, b: ((a.astype(wide) * b.astype(wide)) >> wide(bits)).astype(a.dtype)), (kind, kind), kind
    if kind == "bf16x2":
        return _bf16_pairs(np.multiply), (kind, kind), kind
    return np.multiply, (kind, kind), kind


def _added(multiply: Operation, exact: str | None) -> Operation:
    """``exact``: one rounding, as a fused multiply-add has."""
    if exact == "f32":
        return lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32)
    return lambda a, b, c: multiply(a, b) + c


def _conversion(parts: tuple[str, ...]) -> tuple[Operation, tuple[str, ...], str]:
    to, source = parts[-2], parts[-1]
    if to == "bf16x2" and source == "f32":
        return (lambda high, low: pair(to_bf16(high), to_bf16(low))), ("f32", "f32"), to
    if to == "f16x2" and source == "f32":
        return (lambda high, low: pair(_half(high), _half(low))), ("f32", "f32"), to
    if to == "f16x2":
        table = fp8_table(source)
        return (lambda x: pair(table[x >> 8], table[x & 255])), (source,), to
    if to in _FP8:
        return (lambda high, low: ((to_fp8(high, to) << 8) | to_fp8(low, to)).astype(np.uint16)), ("f32", "f32"), to
    if to == "bf16":
        return (lambda x: to_bf16(x.astype(np.float32))), (source,), to
    if source == "bf16":
        return (lambda x: from_bf16(x).astype(TYPES[to])), (source,), to
    if to.startswith("f") or source.startswith("f"):
        assert source[0] != "f" or to[0] == "f", f"{parts}: floats to integers"
    kind = TYPES[to]
    return (lambda x: x.astype(kind)), (source,), to


def to_bf16(x: Values) -> Values:
    """float32 to the nearest bfloat16, as bits."""
    bits = x.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def from_bf16(bits: Values) -> Values:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def pair(high: Values, low: Values) -> Values:
    return (high.astype(np.uint32) << 16) | low.astype(np.uint32)


def _half(x: Values) -> Values:
    return x.astype(np.float16).view(np.uint16)


@functools.cache
def fp8_table(kind: str) -> Values:
    """The float16 bits of every fp8 number of ``kind``."""
    numbers = torch.arange(256, dtype=torch.uint8).view(_FP8[kind]).to(torch.float16)
    return np.asarray(numbers.view(torch.int16).numpy().view(np.uint16))


def to_fp8(x: Values, kind: str) -> Values:
    """float32 to the nearest fp8 number, what is too large to the largest."""
    dtype = _FP8[kind]
    most = torch.finfo(dtype).max
    held = torch.from_numpy(np.ascontiguousarray(x)).clamp(-most, most)
    return np.asarray(held.to(dtype).view(torch.uint8).numpy()).astype(np.uint16)


def _bf16_pairs(apply: Operation) -> Operation:
    def both(a: Values, b: Values) -> Values:
        high = apply(from_bf16(a >> 16), from_bf16(b >> 16))
        low = apply(from_bf16(a & 0xFFFF), from_bf16(b & 0xFFFF))
        return pair(to_bf16(high), to_bf16(low))

    return both


def _lop3(a: Values, b: Values, c: Values, table: Values) -> Values:
    """Every bit by the truth table of the three bits."""
    result = np.zeros_like(a | b | c)
    for i in range(8):
        if int(table) >> i & 1:
            terms = [x if i & bit else ~x for x, bit in ((a, 4), (b, 2), (c, 1))]
            result = result | (terms[0] & terms[1] & terms[2])
    return result


def _prmt(a: Values, b: Values, selector: Values) -> Values:
    """Four of the eight bytes of b:a."""
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.zeros(np.broadcast(a, b, selector).shape, np.uint32)
    for i in range(4):
        which = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = ((both >> ((which & 7).astype(np.uint64) * np.uint64(8))) & np.uint64(255)).astype(np.uint32)
        sign = np.where(byte & 128, np.uint32(255), np.uint32(0))
        result = result | (np.where(which & 8, sign, byte) << np.uint32(8 * i))
    return result


def _bfe(kind: str) -> Operation:
    def field(a: Values, position: Values, length: Values) -> Values:
        moved = a >> position.astype(a.dtype)
        rest = (32 - length).astype(a.dtype)
        return np.asarray((moved << rest) >> rest)

    return field


def _ex2(x: Values) -> Values:
    held = np.where(np.abs(x) < np.float32(1.17549435e-38), np.float32(0), x)
    y = np.exp2(held)
    return np.where(np.abs(y) < np.float32(1.17549435e-38), np.float32(0), y).astype(np.float32)


_OTHERS: Final[dict[str, Callable[[str], tuple[Operation, tuple[str, ...], str]]]] = {
    "abs": lambda kind: (np.abs, (kind,), kind),
    "neg": lambda kind: (np.negative, (kind,), kind),
    "not": lambda kind: (np.logical_not if kind == "pred" else np.invert, (kind,), kind),
    "ex2": lambda kind: (_ex2, (kind,), kind),
    "lg2": lambda kind: (np.log2, (kind,), kind),
    "rcp": lambda kind: ((lambda x: np.float32(1) / x), (kind,), kind),
    "lop3": lambda kind: (_lop3, ("b32", "b32", "b32", "b32"), "b32"),
    "prmt": lambda kind: (_prmt, ("b32", "b32", "b32"), "b32"),
    "bfe": lambda kind: (_bfe(kind), (kind, "u32", "u32"), kind),
}  # fmt: skip
