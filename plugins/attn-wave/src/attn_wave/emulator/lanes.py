"""Which lane reads from which: data-parallel primitives (dpp), selections of bytes (sdwa), swizzles and permutes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from attn_wave.emulator.faults import EmulationError
from attn_wave.emulator.instructions import Instruction, Operand, operand
from attn_wave.emulator.operands import ReadLanes, WriteLanes, bits32, set_lanes, set_scalar32
from attn_wave.emulator.wave import I32, I64, LANE, U32, Action, Lanes, Wave, spread

Index = NDArray[Any]
_ALL: Final = np.ones(64, bool)
_ROW: Final = LANE & ~15
_COLUMN: Final = LANE & 15


def _shifted(by: int) -> tuple[Index, Index]:
    return LANE + by, (_COLUMN + by >= 0) & (_COLUMN + by < 16)


def _quad(text: str) -> tuple[Index, Index]:
    return (LANE & ~3) + np.array([int(n) for n in text.strip("[]").split(",")])[LANE & 3], _ALL


def _broadcast_row(text: str) -> tuple[Index, Index]:
    if text == "15":
        return _ROW - 1, (LANE // 16) % 2 == 1
    return np.full(64, 31), LANE >= 32


_DPP: Final[Mapping[str, Callable[[str], tuple[Index, Index]]]] = {
    "quad_perm": _quad,
    "row_shl": lambda text: _shifted(int(text)),
    "row_shr": lambda text: _shifted(-int(text)),
    "row_ror": lambda text: (_ROW + ((_COLUMN - int(text)) & 15), _ALL),
    "row_newbcast": lambda text: (_ROW + int(text), _ALL),
    "row_bcast": _broadcast_row,
    "row_half_mirror": lambda text: ((LANE & ~7) + 7 - (LANE & 7), _ALL),
    "row_mirror": lambda text: (_ROW + 15 - _COLUMN, _ALL),
}


class LaneReads:
    """How an instruction reads its first operands and writes its result, with what dpp or sdwa do to them."""

    def __init__(self, instruction: Instruction) -> None:
        modifiers = instruction.modifiers
        self._modifiers = modifiers
        self._sdwa = instruction.name.endswith("_sdwa")
        chosen = [name for name in _DPP if name in modifiers]
        self._dpp = _DPP[chosen[0]](modifiers[chosen[0]]) if chosen else None
        if instruction.name.endswith("_dpp") and self._dpp is None:
            raise EmulationError(f"{instruction.text}: this movement between lanes is not modelled")

    def read(self, op: Operand, position: int) -> ReadLanes:
        """The bits of the source at ``position``."""
        extended = re.fullmatch(r"sext\((.+)\)", op.text) if self._sdwa else None
        bits = bits32(operand(extended[1]) if extended else op)
        if self._sdwa and position < 2:
            how = self._modifiers.get(f"src{position}_sel", "DWORD")
            part = _selected if extended is None else _extended
            return bits if how == "DWORD" else lambda w: part(spread(bits(w)), how)
        if self._dpp is not None and position == 0:
            source, valid = self._dpp
            where = np.clip(source, 0, 63)

            def moved(w: Wave) -> Lanes:
                there = w.across(where)
                return np.where(w.each(valid) & w.active[there], w.spread(bits(w))[there], U32(0))

            return moved
        return bits

    def write(self, op: Operand) -> WriteLanes:
        """The destination."""
        plain = set_lanes(op)
        how = self._modifiers.get("dst_sel", "DWORD")
        if self._sdwa and how != "DWORD":
            return _set_part(op, plain, how, self._modifiers.get("dst_unused", "UNUSED_PAD"))
        if self._dpp is None:
            return plain
        source, valid = self._dpp
        rows, banks = (int(self._modifiers.get(name, "0xf"), 0) for name in ("row_mask", "bank_mask"))
        kept = ((rows >> LANE // 16) & (banks >> _COLUMN // 4) & 1).astype(bool)
        where = np.clip(source, 0, 63)
        bounded = "bound_ctrl" in self._modifiers

        def write(w: Wave, value: Any) -> None:
            lanes = w.each(kept) if bounded else w.each(kept & valid) & w.active[w.across(where)]
            np.copyto(w.vector[op.index], spread(value).astype(U32), where=w.active & lanes)

        return write


def _selected(value: Lanes, how: str) -> Lanes:
    part, _, number = how.partition("_")
    width = {"WORD": 16, "BYTE": 8}[part]
    found: Lanes = value >> U32(width * int(number)) & U32((1 << width) - 1)
    return found


def _extended(value: Lanes, how: str) -> Lanes:
    """The part with its sign in the bits above it."""
    part, _, number = how.partition("_")
    width = {"WORD": 16, "BYTE": 8}[part]
    found: Lanes = ((value << U32(32 - width * (int(number) + 1))).view(I32) >> I32(32 - width)).view(U32)
    return found


def _set_part(op: Operand, plain: WriteLanes, how: str, unused: str) -> WriteLanes:
    part, _, number = how.partition("_")
    width = {"WORD": 16, "BYTE": 8}[part]
    shift, mask = U32(width * int(number)), U32((1 << width) - 1)
    if unused not in ("UNUSED_PAD", "UNUSED_PRESERVE"):
        raise EmulationError(f"dst_unused:{unused} is not modelled")

    def write(w: Wave, value: Any) -> None:
        placed = (spread(value).astype(U32) & mask) << shift
        plain(w, w.vector[op.index] & ~(mask << shift) | placed if unused == "UNUSED_PRESERVE" else placed)

    return write


# -- permutes between lanes


def swizzle_sources(text: str) -> Any:
    """The lane that each lane of ``ds_swizzle_b32 offset:text`` reads."""
    match = re.fullmatch(r"swizzle\((\w+),?(.*)\)", text)
    if match is None:
        code = int(text, 0)
        if code & 0x8000:
            return (LANE & ~3) + np.array([code >> 2 * i & 3 for i in range(4)])[LANE & 3]
        return (LANE & 32) + (((LANE & 31 & (code & 31)) | code >> 5 & 31) ^ code >> 10 & 31)
    kind, arguments = match[1], match[2].strip().strip('"')
    numbers = [int(n) for n in arguments.split(",")] if kind != "BITMASK_PERM" else []
    if kind == "SWAP":
        return LANE ^ numbers[0]
    if kind == "REVERSE":
        return LANE ^ (numbers[0] - 1)
    if kind == "BROADCAST":
        return (LANE & ~(numbers[0] - 1)) + numbers[1]
    if kind == "QUAD_PERM":
        return (LANE & ~3) + np.array(numbers)[LANE & 3]
    if kind == "BITMASK_PERM":
        return _bit_mask_sources(arguments)
    raise EmulationError(f"swizzle {text} is not modelled")


def _bit_mask_sources(mask: str) -> Any:
    """p keeps a bit of the lane's number, i inverts it, 0 and 1 set it; the highest first."""
    low = np.zeros(64, np.int64)
    for place, what in enumerate(reversed(mask)):
        bit = LANE >> place & 1
        low |= {"p": bit, "i": bit ^ 1, "0": bit & 0, "1": bit | 1}[what] << place
    return (LANE & 32) + low


def permute(instruction: Instruction) -> Action | None:
    """``ds_swizzle``, ``ds_bpermute``, ``ds_permute``, ``v_readlane`` and their like; None for others."""
    build = _PERMUTES.get(instruction.base)
    return None if build is None else build(instruction)


def _swizzle(instruction: Instruction) -> Action:
    into, source = instruction.operands
    where, read, write = swizzle_sources(instruction.modifiers["offset"]), bits32(source), set_lanes(into)

    def act(w: Wave) -> None:
        there = w.across(where)
        write(w, np.where(w.active[there], w.spread(read(w))[there], U32(0)))

    return act


def _pull(instruction: Instruction) -> Action:
    into, address, source = instruction.operands
    where, read, write, offset = bits32(address), bits32(source), set_lanes(into), instruction.integer("offset")

    def act(w: Wave) -> None:
        lanes = ((w.spread(where(w)).astype(I64) + offset) >> 2 & 63) + w.first_lanes
        write(w, np.where(w.active[lanes], w.spread(read(w))[lanes], U32(0)))

    return act


def _push(instruction: Instruction) -> Action:
    into, address, source = instruction.operands
    where, read, write = bits32(address), bits32(source), set_lanes(into)

    def act(w: Wave) -> None:
        lanes = (w.spread(where(w)).astype(I64) >> 2 & 63) + w.first_lanes
        result = np.zeros(w.lanes, U32)
        result[lanes[w.active]] = w.spread(read(w))[w.active]
        write(w, result)

    return act


def _read_first(instruction: Instruction) -> Action:
    write, read = set_scalar32(instruction.operands[0]), bits32(instruction.operands[1])
    return lambda w: write(w, int(w.spread(read(w))[int(w.active.argmax())]))


def _read_lane(instruction: Instruction) -> Action:
    write, read, lane = set_scalar32(instruction.operands[0]), *map(bits32, instruction.operands[1:])
    return lambda w: write(w, int(w.spread(read(w))[int(lane(w)) & 63]))


def _write_lane(instruction: Instruction) -> Action:
    index, (read, lane) = instruction.operands[0].index, map(bits32, instruction.operands[1:])

    def act(w: Wave) -> None:
        w.vector[index][int(lane(w)) & 63] = read(w)

    return act


def _swap(instruction: Instruction) -> Action:
    left, right = (op.index for op in instruction.operands)

    def act(w: Wave) -> None:
        before = w.vector[left].copy()
        np.copyto(w.vector[left], w.vector[right], where=w.active)
        np.copyto(w.vector[right], before, where=w.active)

    return act


_PERMUTES: Final[Mapping[str, Callable[[Instruction], Action]]] = {
    "ds_swizzle_b32": _swizzle,
    "ds_bpermute_b32": _pull,
    "ds_permute_b32": _push,
    "v_readfirstlane_b32": _read_first,
    "v_readlane_b32": _read_lane,
    "v_writelane_b32": _write_lane,
    "v_swap_b32": _swap,
}
