"""The text of one disassembled instruction as data: its name, operands and modifiers."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field
from typing import Final, Literal

from attn_core.errors import AttnError

OperandKind = Literal["v", "a", "s", "constant", "float", "scc", "off", "word"]

#: Scalar registers that have names, by number.
_NAMED: Final = {
    "flat_scratch_lo": 102,
    "flat_scratch_hi": 103,
    "vcc_lo": 106,
    "vcc_hi": 107,
    "m0": 124,
    "exec_lo": 126,
    "exec_hi": 127,
}
_NAMED_PAIRS: Final = {"flat_scratch": 102, "vcc": 106, "exec": 126}
_FLAGS: Final = frozenset(("offen", "idxen", "sc0", "sc1", "nt", "clamp", "gds", "lds"))
_BARE_MODIFIERS: Final = frozenset(("row_mirror", "row_half_mirror"))
_MODIFIER: Final = re.compile(r"\s(\w+):(\[[^\]]*\]|swizzle\([^)]*\)|\S+)")
_LINE: Final = re.compile(r"^\s+(\S.*?)\s*// ([0-9A-F]+): ((?:[0-9A-F]{8} ?)+)")


@dataclass(frozen=True, slots=True)
class Operand:
    """Registers from ``index`` on, or a constant (``index`` holds its bits, ``number`` a float's value)."""

    kind: OperandKind
    index: int
    count: int = 1
    negative: bool = False
    absolute: bool = False
    number: float = 0.0
    text: str = ""

    @property
    def is_register(self) -> bool:
        return self.kind in ("v", "a", "s")

    def part(self, which: int) -> Operand:
        """The ``which``-th register of several; of a constant its low or high half (a float has its bits in the high
        half of 64, and integers are extended by their sign)."""
        if self.is_register:
            return Operand(self.kind, self.index + which, 1, text=self.text)
        if self.kind == "constant":
            return Operand("constant", (self.index >> (32 * which)) & 0xFFFFFFFF, text=self.text)
        return self


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction at ``address`` of ``size`` bytes."""

    address: int
    size: int
    text: str
    name: str
    operands: tuple[Operand, ...]
    modifiers: dict[str, str] = field(default_factory=dict)

    @property
    def base(self) -> str:
        """The name without the encoding's suffix."""
        return re.sub(r"_(e32|e64|sdwa|dpp)$", "", self.name)

    def integer(self, modifier: str) -> int:
        """The value of an offset, 0 if it is not there."""
        return int(self.modifiers.get(modifier, "0"), 0)

    def bits(self, modifier: str, default: int, count: int) -> list[int]:
        """``op_sel:[0,1]`` and its like, one bit an operand."""
        text = self.modifiers.get(modifier)
        found = [int(part) for part in text.strip("[]").split(",")] if text else [default] * count
        return found + [default] * (count - len(found))


def parse_line(line: str) -> Instruction | None:
    """The instruction of one line of llvm-objdump's, None for a line that holds none."""
    match = _LINE.match(line)
    return None if match is None else parse(match[1].strip(), int(match[2], 16), 4 * len(match[3].split()))


def parse(text: str, address: int = 0, size: int = 4) -> Instruction:
    """The instruction that ``text`` spells in AMD's assembler. Raises AttnError for text without a name."""
    name, _, rest = text.strip().partition(" ")
    if not name:
        raise AttnError("an empty instruction", accepted="AMD assembler, such as v_add_f32_e32 v0, v1, v2")
    rest = " " + rest
    modifiers = dict(_MODIFIER.findall(rest))
    operands: list[Operand] = []
    for piece in _split(_MODIFIER.sub("", rest)):
        for word in piece.split():
            if word in _FLAGS or word in _BARE_MODIFIERS:
                modifiers[word] = "1"
            else:
                operands.append(operand(word))
    return Instruction(address, size, text, name, tuple(operands), modifiers)


def _split(text: str) -> list[str]:
    """At commas that stand in no bracket."""
    return re.split(r",(?![^\[(]*[\])])", text)


def operand(text: str) -> Operand:
    """The operand that ``text`` spells; what is no register and no number becomes a word."""
    rest, negative, absolute = text, False, False
    if re.match(r"-[|vsa]", rest):
        negative, rest = True, rest[1:]
    if rest.startswith("|"):
        absolute, rest = True, rest.strip("|")
    single = re.fullmatch(r"([vsa])(\d+)", rest)
    several = re.fullmatch(r"([vsa])\[(\d+):(\d+)\]", rest)
    if single or several:
        kind, first = (single or several).groups()[:2]  # type: ignore[union-attr]
        last = int(several[3]) if several else int(first)
        return Operand(kind, int(first), last - int(first) + 1, negative, absolute, text=text)  # type: ignore[arg-type]
    if rest in _NAMED:
        return Operand("s", _NAMED[rest], 1, negative, absolute, text=text)
    if rest in _NAMED_PAIRS:
        return Operand("s", _NAMED_PAIRS[rest], 2, negative, absolute, text=text)
    if rest == "scc":
        return Operand("scc", 0, text=text)
    if rest in ("off", "null"):
        return Operand("off", 0, text=text)
    if re.fullmatch(r"-?\d+\.\d+", rest):
        bits = struct.unpack("<I", struct.pack("<f", float(rest)))[0]
        return Operand("float", bits, number=float(rest), text=text)
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", rest):
        return Operand("constant", int(rest, 0), text=text)
    return Operand("word", 0, text=text)
