"""Matrix instructions: v_mfma of fp16, bf16 and fp32 into fp32, each operand gathered from lanes and put back.

Layouts: CDNA3 instruction set architecture, section "Matrix arithmetic instructions". Lane ``l`` of an MxMxK product
holds row ``l % M`` of A (of B likewise), K values from ``(l // M) * K / (64 / M)`` on.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

import numpy as np

from attn_wave.emulator.faults import EmulationError
from attn_wave.emulator.instructions import Instruction, Operand
from attn_wave.emulator.wave import F16, F32, U32, Action, Lanes, Wave

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
    left, right, add = _rows_of(a, side, depth, dtype), _rows_of(b, side, depth, dtype), _addend(c)
    groups, blocks = 64 // side, side * side // 256
    accumulation = into.kind == "a"

    def act(w: Wave) -> None:
        product = left(w) @ right(w).transpose(0, 2, 1)
        # register 4 * m + n of a lane in group g holds row 4 * (groups * m + g) + n of the product
        blocked = product.reshape(-1, blocks, groups, 4, side).transpose(1, 3, 0, 2, 4).reshape(4 * blocks, -1)
        registers = w.accumulators if accumulation else w.vector
        registers[into.index : into.index + 4 * blocks] = (blocked + add(w)).view(U32)

    return act


def _rows_of(op: Operand, side: int, depth: int, dtype: str) -> Callable[[Wave], Lanes]:
    """[waves, side, depth] fp32, from registers of two halves or one fp32 each."""
    groups, halves = 64 // side, 1 if dtype == "f32" else 2
    registers = depth // groups // halves
    block = _block(op, registers)

    def read(w: Wave) -> Lanes:
        raw = block(w)
        if dtype == "f32":
            values = raw.view(F32)
        elif dtype == "f16":
            values = raw.view(F16).astype(F32)
        else:
            values = (raw.view(np.uint16).astype(U32) << U32(16)).view(F32)
        return values.reshape(registers, -1, groups, side, halves).transpose(1, 3, 2, 0, 4).reshape(-1, side, depth)

    return read


def _block(op: Operand, count: int) -> Callable[[Wave], Lanes]:
    """[count, lanes] uint32: the registers themselves, not a copy."""
    first, last = op.index, op.index + count
    if op.kind == "v":
        return lambda w: w.vector[first:last]
    if op.kind == "a":
        return lambda w: w.accumulators[first:last]
    raise EmulationError(f"operand {op.text!r} of a matrix instruction", given=op.text, accepted="vector registers")


def _addend(op: Operand) -> Callable[[Wave], Lanes]:
    if not op.is_register:
        constant = np.full(1, op.index & 0xFFFFFFFF, U32).view(F32)
        return lambda w: constant
    block = _block(op, op.count)
    return lambda w: block(w).view(F32)
