"""PTX text as a list of instructions: opcodes in parts, operands as trees, branch targets as positions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import count
from typing import Final

_WIDTHS: Final = {"pred": 1, "b8": 8, "b16": 16, "f16": 16, "b32": 32, "f32": 32, "b64": 64, "f64": 64}
_ENTRY: Final = re.compile(r"\.visible \.entry (\w+)\((.*?)\)", re.S)
_TABLE: Final = re.compile(r"\.branchtargets[^;]*;")
_LOC: Final = re.compile(r"\.loc\s+(\d+)\s+(\d+)")
_FILE: Final = re.compile(r'\.file\s+(\d+)\s+"([^"]*)"')
_REG: Final = re.compile(r"\.reg \.(\w+)\s+(.*)")
_PIECE: Final = re.compile(
    r"\.(?:loc|file)[^\n]*\n"  # no semicolon ends it
    r"|[$\w]+:(?=\s)"
    r"|[^;{}\s][^;{}\n]*(?:\{[^{};]*\}[^;{}]*)*;"  # operands may be in braces
    r"|[{};]"
)


@dataclass(frozen=True, slots=True)
class Register:
    name: str


@dataclass(frozen=True, slots=True)
class Number:
    """An immediate: an integer, or the bits of a float."""

    value: int


@dataclass(frozen=True, slots=True)
class Address:
    """``coordinates`` are those of a box of the copy engine, innermost first."""

    base: Register | Number
    offset: int
    coordinates: tuple[Operand | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Many:
    """Operands in braces; None is a place that is not wanted."""

    parts: tuple[Operand | None, ...]


Operand = Register | Number | Address | Many


@dataclass(slots=True)
class Instruction:
    opcode: str
    parts: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | None
    negated: bool
    #: positions that a branch leads to: one, or those of a table
    targets: tuple[int, ...]
    where: str

    def __str__(self) -> str:
        return f"{self.opcode} ({self.where})"


@dataclass(slots=True)
class Program:
    """A kernel: instructions, widths of registers in bits, its threads, and its bytes of shared memory."""

    name: str
    instructions: list[Instruction]
    widths: dict[str, int]
    threads: int
    shared: int


def parse(ptx: str, shared: int) -> Program:
    """The one kernel of ``ptx``, which was given ``shared`` bytes of shared memory."""
    entry = _ENTRY.search(ptx)
    assert entry is not None, "no kernel"
    threads = re.search(r"\.(?:reqntid|maxntid) (\d+)", ptx)
    assert threads is not None, "no number of threads"
    reader = _Reader(dict(_FILE.findall(ptx)))
    body = ptx[ptx.index("{", entry.end()) + 1 : ptx.index("// -- End function")]
    body = re.sub(r"//[^\n]*", "", body)
    reader.read(_TABLE.sub(lambda table: table[0].replace("\n", " "), body))
    return Program(entry[1], reader.finished(), reader.widths, int(threads[1]), shared)


class _Reader:
    """Collects instructions; braces open scopes with registers of their own."""

    def __init__(self, files: dict[str, str]) -> None:
        self.files = files
        self.instructions: list[Instruction] = []
        self.widths: dict[str, int] = {"%tid.x": 32, "%ctaid.x": 32, "%ctaid.y": 32, "%nctaid.x": 32}
        #: by scope and name: inline assembly has labels of its own
        self._labels: dict[tuple[int, str], int] = {}
        self._jumps: list[tuple[Instruction, str, tuple[int, ...]]] = []
        self._path = [0]
        self._tables: dict[str, list[str]] = {}
        self._label = ""
        self._scopes: list[dict[str, str]] = [{}]
        self._fresh = count()
        self._where = ""

    def read(self, body: str) -> None:
        for found in _PIECE.finditer(body):
            piece = found[0].strip()
            if piece == "{":
                self._scopes.append({})
                self._path.append(next(self._fresh) + 1)
            elif piece == "}":
                self._scopes.pop()
                self._path.pop()
            elif piece.endswith(":"):
                self._label = piece[:-1]
                self._labels[self._path[-1], self._label] = len(self.instructions)
            elif piece.startswith("."):
                self._directive(piece)
            elif piece != ";":
                self._instruction(piece.rstrip(";").strip())

    def finished(self) -> list[Instruction]:
        for instruction, label, path in self._jumps:
            table = self._tables.get(label, [label])
            instruction.targets = tuple(self._position(one, path) for one in table)
        return self.instructions

    def _position(self, label: str, path: tuple[int, ...]) -> int:
        return next(self._labels[scope, label] for scope in reversed(path) if (scope, label) in self._labels)

    def _directive(self, piece: str) -> None:
        if loc := _LOC.match(piece):
            self._where = f"{self.files.get(loc[1], loc[1]).rpartition('/')[2]}:{loc[2]}"
        elif reg := _REG.match(piece.rstrip(";")):
            for name in reg[2].split(","):
                self._declare(name.strip(), _WIDTHS[reg[1]])
        elif piece.startswith(".branchtargets"):
            self._tables[self._label] = split(piece.removeprefix(".branchtargets").rstrip(";"))

    def _declare(self, name: str, width: int) -> None:
        ranged = re.match(r"(.+)<(\d+)>", name)
        names = [name] if ranged is None else [f"{ranged[1]}{i}" for i in range(int(ranged[2]))]
        for one in names:
            own = one if len(self._scopes) == 1 else f"{one}@{next(self._fresh)}"
            self._scopes[-1][one] = own
            self.widths[own] = width

    def _scoped(self, name: str) -> str:
        for scope in reversed(self._scopes):
            if name in scope:
                return scope[name]
        return name

    def _instruction(self, text: str) -> None:
        guard, negated = None, False
        if text.startswith("@"):
            given, text = text[1:].split(None, 1)
            negated = given.startswith("!")
            guard = Register(self._scoped(given.lstrip("!")))
        opcode, _, rest = text.partition(" ")
        opcode, _, more = opcode.partition("\t")
        rest = f"{more} {rest}"
        instruction = Instruction(opcode, tuple(opcode.split(".")), (), guard, negated, (), self._where)
        if instruction.parts[0] == "bra":
            self._jumps.append((instruction, rest.strip(), tuple(self._path)))
        elif instruction.parts[0] == "brx":
            index, table = split(rest)
            instruction.operands = (self._operand(index),)
            self._jumps.append((instruction, table, tuple(self._path)))
        else:
            instruction.operands = tuple(self._operand(part) for part in split(rest))
        self.instructions.append(instruction)

    def _operand(self, text: str) -> Operand:
        if text.startswith("{"):
            return Many(tuple(None if part == "_" else self._operand(part) for part in split(text[1:-1])))
        if text.startswith("["):
            inside = split(text[1:-1])
            base, plus, offset = inside[0].partition("+")
            at = self._operand(base.strip())
            assert isinstance(at, Register | Number)
            box = self._operand(inside[1]) if len(inside) > 1 else Many(())
            assert isinstance(box, Many)
            return Address(at, int(offset, 0) if plus else 0, box.parts)
        if "|" in text:  # two results of one instruction
            return Many(tuple(self._operand(part) for part in text.split("|")))
        if re.match(r"0f[0-9A-Fa-f]{8}$", text):
            return Number(int(text[2:], 16))
        if re.match(r"-?(0x)?[0-9A-Fa-f]+U?$", text) and (text[0] in "-0123456789"):
            return Number(int(text.rstrip("U"), 0))
        return Register(self._scoped(text))


def split(text: str) -> list[str]:
    """Operands of a list, which commas part outside of braces and brackets."""
    parts, depth, begun = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[") - (c in "}]")
        if c == "," and not depth:
            parts.append(text[begun:i].strip())
            begun = i + 1
    last = text[begun:].strip()
    return [*parts, last] if last else parts
