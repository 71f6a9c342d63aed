"""The code objects that the package ships, as the tests look at them."""

from __future__ import annotations

import lzma
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import attn_wave
from attn_wave.emulator.code_object import CodeObject
from attn_wave.emulator.instructions import Instruction

ARCH = "gfx942"
SHIPPED = Path(attn_wave.__file__).parent / "shipped" / ARCH


@cache
def code_objects() -> dict[str, CodeObject]:
    """By the key of their variant."""
    return {
        path.name.removesuffix(".hsaco.xz"): CodeObject.parse(lzma.decompress(path.read_bytes()))
        for path in sorted(SHIPPED.glob("*.hsaco.xz"))
    }


def all_instructions() -> Iterator[Instruction]:
    """Of every shipped code object."""
    for code in code_objects().values():
        yield from code.instructions
