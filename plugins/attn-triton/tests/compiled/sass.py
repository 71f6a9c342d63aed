"""NVIDIA's machine code, as far as one question needs it: which uniform registers an instruction reads and writes.

ptxas 12.8 reads uniform registers that nothing has written where it makes the descriptor of a tensor-core instruction.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import triton

_TOOLS: Final = Path(triton.__file__).parent / "backends/nvidia/bin"
_LABEL: Final = re.compile(r"\s*(\.L_x_\d+):")
_LINE: Final = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?(U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;")
_UNIFORM: Final = re.compile(r"(g?desc)\[UR(\d+)\]|UR(\d+)(\.64)?")
_TARGET: Final = re.compile(r"(\.L_x_\d+)")
#: Instructions that begin with U and write no uniform register, and others that write one.
_NO_RESULT: Final = (
    "UTMALDG",
    "UTMASTG",
    "UBLKCP",
    "UTMACMDFLUSH",
    "UTMAPF",
    "UTMACCTL",
    "UCGABAR_ARV",
    "UCGABAR_WAIT",
)
_RESULT: Final = ("R2UR", "S2UR", "REDUX", "VOTEU", "CS2UR", "LDCU")


@dataclass(frozen=True, slots=True)
class Line:
    """One instruction: where it is, its text, what it reads and writes, and which lines may come next."""

    at: str
    text: str
    reads: frozenset[int]
    writes: frozenset[int]
    opcode: str
    target: str | None
    falls_through: bool


def ptxas_version() -> str:
    """The release of the ptxas that Triton brings: 12.8."""
    said = subprocess.run([_TOOLS / "ptxas", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", said)
    assert found is not None, said
    return found[1]


def unwritten_reads(cubin: bytes, folder: Path) -> list[str]:
    """The instructions of a kernel that read a uniform register which nothing on any way to them has written."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    said = subprocess.run([_TOOLS / "nvdisasm", "-c", path], capture_output=True, text=True, check=True).stdout
    return [f"/*{line.at}*/ {line.text}" for line in find_unwritten(said)]


def find_unwritten(listing: str) -> list[Line]:
    """The same in a listing of nvdisasm: registers that may have been written are followed along all branches."""
    lines, labels = _parsed(listing)
    following = [list(_next(lines, labels, i)) for i in range(len(lines))]
    before: dict[int, frozenset[int]] = {0: frozenset()}
    waiting = [0]
    while waiting:
        i = waiting.pop()
        after = before[i] | lines[i].writes
        for j in following[i]:
            if j not in before or not after <= before[j]:
                before[j] = before.get(j, frozenset()) | after
                waiting.append(j)
    return [lines[i] for i in sorted(before) if not lines[i].reads <= before[i]]


def _parsed(listing: str) -> tuple[list[Line], dict[str, int]]:
    lines: list[Line] = []
    labels: dict[str, int] = {}
    for text in listing.splitlines():
        if label := _LABEL.match(text):
            labels[label[1]] = len(lines)
        elif found := _LINE.search(text):
            lines.append(_line(*found.groups()))
    return lines, labels


def _line(at: str, guard: str | None, name: str, rest: str) -> Line:
    opcode = name.partition(".")[0]
    operands = _split(rest)
    if opcode == "R2UR" and operands and not operands[0].startswith("UR"):
        operands = operands[1:]  # a predicate
    writes: set[int] = set()
    uniform = (opcode.startswith("U") and opcode not in _NO_RESULT) or opcode in _RESULT
    if uniform and operands and (own := re.match(r"UR(\d+)", operands[0])):
        wide = 4 if ".128" in name else 2 if ".64" in name or ".WIDE" in name else 1
        writes = set(range(int(own[1]), int(own[1]) + wide))
    sources = operands[1:] if uniform else operands
    reads = {r for i, _ in enumerate(sources) for r in _reads(opcode, name, sources, i)}
    target = _TARGET.search(rest)
    conditional = guard is not None or (opcode == "BRA" and len(operands) > 1)
    ends = opcode in ("BRA", "EXIT", "RET") and not conditional
    return Line(
        at, f"{name} {rest}", frozenset(reads), frozenset(writes), opcode, target[1] if target else None, not ends
    )


def _reads(opcode: str, name: str, sources: list[str], i: int) -> Iterator[int]:
    for found in _UNIFORM.finditer(sources[i]):
        first = int(found[2] or found[3])
        if found[1] == "gdesc":  # of both operands; of the right one alone if the left one is in registers
            left_in_registers = i >= 2 and re.match(r"R\d+", sources[i - 1]) is not None
            yield from range(first + (2 if left_in_registers else 0), first + 4)
        elif found[1] == "desc" or found[4] or (opcode in ("UIADD3", "UMOV") and name.endswith(".64")):
            yield from (first, first + 1)
        else:
            yield first


def _next(lines: list[Line], labels: dict[str, int], i: int) -> Iterator[int]:
    line = lines[i]
    if line.target is not None and line.opcode in ("BRA", "CALL", "BRX", "BSSY"):
        yield labels[line.target]
    if line.falls_through and i + 1 < len(lines):
        yield i + 1


def _split(text: str) -> list[str]:
    """Operands of a list, which commas part outside of brackets."""
    parts, depth, begun = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "[({") - (c in "])}")
        if c == "," and not depth:
            parts.append(text[begun:i].strip())
            begun = i + 1
    last = text[begun:].strip()
    return [*parts, last] if last else parts
