"""Code objects made in tests: of lines of assembler, and shipped ones with an instruction changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from attn_wave.emulator.code_object import CodeObject
from attn_wave.emulator.instructions import Instruction, parse


def program(lines: str, *, lds: int = 0, argument_size: int = 0) -> CodeObject:
    """A kernel of these lines, each of 4 bytes, with the address of its arguments in s[0:1] and of its group in s2."""
    instructions = tuple(parse(line.strip(), 4 * i) for i, line in enumerate(lines.strip().splitlines()))
    code = CodeObject(
        "program",
        "gfx942",
        np.zeros(4, np.uint8),
        0,
        lds,
        0,
        argument_size,
        setup=0x80 | 2 << 1,
        float_mode=0xF0,
        blob=b"",
    )
    return with_instructions(code, instructions)


def with_instructions(code: CodeObject, instructions: Sequence[Instruction]) -> CodeObject:
    """The same kernel with other instructions."""
    made = replace(code)
    made.__dict__["instructions"] = tuple(instructions)
    return made


def changed(code: CodeObject, change: Callable[[str], str | None], *, which: int = 0) -> CodeObject:
    """``code`` with the ``which``-th instruction for which ``change`` gives a text replaced by that text."""
    hits = [(i, text) for i, old in enumerate(code.instructions) if (text := change(old.text)) is not None]
    place, text = hits[which]
    old = code.instructions[place]
    instructions = list(code.instructions)
    instructions[place] = parse(text, old.address, old.size)
    return with_instructions(code, instructions)


def dropped(code: CodeObject, place: int) -> CodeObject:
    """``code`` with the instruction at ``place`` doing nothing."""
    instructions = list(code.instructions)
    old = instructions[place]
    instructions[place] = parse("s_nop 0", old.address, old.size)
    return with_instructions(code, instructions)
