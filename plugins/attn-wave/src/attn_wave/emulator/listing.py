"""Disassembly that ships beside code objects, so that these run in the emulator without LLVM.

One text for each architecture: for each code object a line ``# sha256 address``, then its instructions in order, each
with its length in words. A test makes them anew wherever a disassembler is.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from hashlib import sha256
from importlib.resources import files

from attn_wave.emulator.instructions import Instruction, parse


def shipped_path(arch: str) -> str:
    """Where the listings of ``arch`` lie, below the package."""
    return f"shipped/{arch}/listings.xz"


def listed(blob: bytes, arch: str) -> tuple[Instruction, ...] | None:
    """The instructions of the code object ``blob``, None for one that no listing is of."""
    text = _texts(arch).get(sha256(blob).hexdigest())
    return None if text is None else tuple(parsed(text))


def listing_of(blob: bytes, instructions: Sequence[Instruction]) -> str:
    """The listing of one code object."""
    lines = [f"# {sha256(blob).hexdigest()} {instructions[0].address:x}"]
    lines += [f"{instruction.size // 4} {instruction.text}" for instruction in instructions]
    return "\n".join(lines) + "\n"


def packed(listings: Iterable[str]) -> bytes:
    """The file of an architecture."""
    return lzma.compress("".join(listings).encode(), preset=9 | lzma.PRESET_EXTREME)


@cache
def _texts(arch: str) -> dict[str, str]:
    path = files("attn_wave") / shipped_path(arch)
    return unpacked(path.read_bytes()) if path.is_file() else {}


def unpacked(file: bytes) -> dict[str, str]:
    """Listings by the hash of their code object."""
    texts = lzma.decompress(file).decode().split("# ")[1:]
    return {text[:64]: text[65:] for text in texts}


def parsed(text: str) -> Iterator[Instruction]:
    """The instructions of one listing, without its hash."""
    first, *lines = text.splitlines()
    address = int(first, 16)
    for line in lines:
        words, _, spelled = line.partition(" ")
        yield parse(spelled, address, 4 * int(words))
        address += 4 * int(words)
