"""Matrix instructions: v_mfma of fp16, bf16 and fp32 into fp32, each operand gathered from lanes and put back.

Layouts: CDNA3 instruction set architecture, section "Matrix arithmetic instructions". Lane ``l`` of an MxMxK product
holds row ``l % M`` of A (of B likewise), K values from ``(l // M) * K / (64 / M)`` on.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from attn_wave.emulator.faults import EmulationError
from attn_wave.emulator.instructions import Instruction, Operand
from attn_wave.emulator.operands import bits32
from attn_wave.emulator.wave import F16, F32, LANE, U32, Action, Lanes, Wave, spread

_NAME: Final = re.compile(r"v_mfma_f32_(16|32)x(?:16|32)x(\d+)_?(f16|bf16|f32)(?:_1k)?")


def matrix(instruction: Instruction) -> Action | None:
    """The action of a matrix instruction; None for one that is not modelled. It works on all lanes, active or not."""
    match = _NAME.fullmatch(instruction.base)
    if match is None:
        return None
    if {"cbsz", "abid", "blgp"} & set(instruction.modifiers):
        raise EmulationError(f"{instruction.text}: broadcasts between blocks are not modelled")
    side, depth, dtype = int(match[1]), int(match[2]), match[3]
    into, a, b, c = instruction.operands
    groups = 64 // side
    each = depth // groups
    row, group = LANE % side, LANE // side
    column = group[:, None] * each + np.arange(each)
    left, right = _values(a, dtype, each), _values(b, dtype, each)
    results = np.arange(side * side // 64)
    out_row = _result_rows(side, group, results)
    out_column = np.broadcast_to(row[:, None], out_row.shape)
    add = _addend(c, len(results))

    def act(w: Wave) -> None:
        one, two = np.zeros((side, depth), F32), np.zeros((side, depth), F32)
        one[row[:, None], column], two[row[:, None], column] = left(w), right(w)
        found = ((one @ two.T)[out_row, out_column] + add(w)).astype(F32).view(U32)
        registers = w.vector if into.kind == "v" else w.accumulators
        registers[into.index : into.index + len(results)] = found.T

    return act


def _result_rows(side: int, group: Lanes, results: Lanes) -> Any:
    if side == 16:
        return 4 * group[:, None] + results[None]
    return 8 * (results[None] // 4) + 4 * group[:, None] + results[None] % 4


def _values(op: Operand, dtype: str, count: int) -> Callable[[Wave], Lanes]:
    """[64, count] fp32, from registers of two halves or one fp32 each."""
    words = [bits32(op.part(i)) for i in range(count if dtype == "f32" else count // 2)]

    def read(w: Wave) -> Lanes:
        raw = np.ascontiguousarray(np.stack([spread(word(w)) for word in words], 1))
        if dtype == "f32":
            return raw.view(F32)
        if dtype == "f16":
            return raw.view(F16).astype(F32)
        return (raw.view(np.uint16).astype(U32) << U32(16)).view(F32)

    return read


def _addend(op: Operand, count: int) -> Callable[[Wave], Lanes]:
    if not op.is_register:
        constant = np.full(1, op.index & 0xFFFFFFFF, U32).view(F32)
        return lambda w: constant
    words = [bits32(op.part(i)) for i in range(count)]
    return lambda w: np.stack([spread(word(w)) for word in words], 1).view(F32)
