"""A code object: the ELF file of one kernel, its descriptor, and its instructions as llvm-objdump spells them."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Final

import numpy as np
from attn_core.errors import PluginLoadError
from numpy.typing import NDArray

from attn_wave.emulator.control import control
from attn_wave.emulator.faults import EmulationError
from attn_wave.emulator.instructions import Instruction, parse_line
from attn_wave.emulator.lanes import permute
from attn_wave.emulator.listing import listed
from attn_wave.emulator.matrix import matrix
from attn_wave.emulator.memory_access import memory_access
from attn_wave.emulator.packed import packed
from attn_wave.emulator.scalar import scalar
from attn_wave.emulator.vector import vector
from attn_wave.emulator.wave import Action

#: The low byte of e_flags, LLVM's "User guide for AMDGPU backend", section "ELF header".
ARCHITECTURES: Final = {0x4C: "gfx942", 0x4F: "gfx950"}
#: The first LLVM that knows an architecture, and the newest that was tried.
_FIRST_LLVM: Final = {"gfx942": 17, "gfx950": 20}
_LAST_LLVM: Final = 23
_OF_VECTORS: Final = ("v_", "ds_", "global_", "flat_", "buffer_")
#: Vector instructions that read or write one lane of a wave.
_OF_A_LANE: Final = frozenset(("v_readfirstlane_b32", "v_readlane_b32", "v_writelane_b32"))
_LOADED: Final = 1
_SYMBOLS: Final = (2, 11)


@dataclass(frozen=True, eq=False)
class CodeObject:
    """One kernel. ``image`` is the loaded ELF; sizes in bytes."""

    name: str
    arch: str
    image: NDArray[np.uint8]
    entry: int
    lds_size: int
    #: of each lane, where registers are spilled to
    scratch_size: int
    argument_size: int
    #: rsrc2 of the kernel descriptor: how many scalar registers are set up, and with which workgroup ids
    setup: int
    #: rounding and denormals of rsrc1, two bits each: fp32, fp16 and fp64, then whose denormals are kept
    float_mode: int
    blob: bytes = field(repr=False)
    metadata: str = field(repr=False, default="")

    @classmethod
    def parse(cls, blob: bytes) -> CodeObject:
        """From the bytes of an .hsaco with one kernel. Raises EmulationError for what is none."""
        if blob[:4] != b"\x7fELF":
            raise EmulationError("a code object that is no ELF file", accepted="an .hsaco")
        arch = ARCHITECTURES.get(blob[0x30])
        if arch is None:
            raise EmulationError(f"architecture {blob[0x30]:#x}", given=blob[0x30], accepted=ARCHITECTURES.values())
        image = _image(blob)
        kernels = {name: address for name, address in _symbols(blob) if name.endswith(".kd")}
        if len(kernels) != 1:
            raise EmulationError(f"a code object with kernels {sorted(kernels)}", accepted="one kernel")
        ((name, descriptor),) = kernels.items()
        raw = image[descriptor : descriptor + 64].tobytes()
        lds, scratch, arguments = struct.unpack_from("<III", raw)
        return cls(
            name=name.removesuffix(".kd"),
            arch=arch,
            image=image,
            entry=descriptor + struct.unpack_from("<q", raw, 16)[0],
            lds_size=lds,
            scratch_size=scratch,
            argument_size=arguments,
            setup=struct.unpack_from("<I", raw, 52)[0],
            float_mode=struct.unpack_from("<I", raw, 48)[0] >> 12 & 0xFF,
            blob=blob,
        )

    @cached_property
    def instructions(self) -> tuple[Instruction, ...]:
        """In the order of their addresses: as listed, else disassembled, which raises PluginLoadError without LLVM."""
        return listed(self.blob, self.arch) or tuple(disassemble(self.blob, self.arch))

    @cached_property
    def places(self) -> dict[int, int]:
        """address -> index in ``instructions``"""
        return {instruction.address: i for i, instruction in enumerate(self.instructions)}

    @cached_property
    def actions(self) -> list[Action | None]:
        """What each instruction does, made when it is first reached."""
        return [None] * len(self.instructions)

    @cached_property
    def in_step(self) -> list[bool]:
        """Whether waves in step do each instruction at once: those of vectors, but for those of a single lane."""
        return [
            i.name.startswith(_OF_VECTORS) and i.base not in _OF_A_LANE and not switches
            for i, switches in zip(self.instructions, self.switches_lanes, strict=True)
        ]

    @cached_property
    def switches_lanes(self) -> list[bool]:
        """Whether each instruction may change which lanes are active."""
        return ["exec" in i.text or i.name.startswith("v_cmpx") for i in self.instructions]

    @cached_property
    def rows(self) -> tuple[int, int]:
        """How many vector and accumulation registers its instructions name."""
        ends = {"v": 1, "a": 1}
        for instruction in self.instructions:
            for op in instruction.operands:
                if op.kind in ends:
                    ends[op.kind] = max(ends[op.kind], op.index + max(op.count, 4))
        return ends["v"], ends["a"]

    def action(self, place: int) -> Action:
        """The action at ``place``. Raises EmulationError for an instruction that is not modelled."""
        made = self.actions[place]
        if made is None:
            made = self.actions[place] = action_of(self.instructions[place], self.places)
        return made


def action_of(instruction: Instruction, places: dict[int, int] | None = None) -> Action:
    """What ``instruction`` does. Raises EmulationError for one that is not modelled."""
    try:
        found = control(instruction, places or {}) or permute(instruction) or _by_kind(instruction)
    except (ValueError, KeyError, IndexError) as error:
        raise EmulationError(f"{instruction.text}: its operands are not modelled: {error!r}") from error
    if found is None:
        raise EmulationError(f"{instruction.text} at {instruction.address:#x} is not modelled", given=instruction.name)
    return found


def _by_kind(instruction: Instruction) -> Action | None:
    name = instruction.name
    if name.startswith("s_"):
        return scalar(instruction)
    if name.startswith(("global_", "flat_", "buffer_", "ds_", "scratch_")):
        return memory_access(instruction)
    if name.startswith("v_mfma"):
        return matrix(instruction)
    return packed(instruction) or vector(instruction)


def disassembler(arch: str) -> str:
    """The program that knows ``arch``. Raises PluginLoadError."""
    first = _FIRST_LLVM[arch]
    for version in range(first, _LAST_LLVM + 1):
        found = shutil.which(f"llvm-objdump-{version}")
        if found is not None:
            return found
    found = shutil.which("llvm-objdump")
    if found is not None and _llvm_version(found) >= first:
        return found
    raise PluginLoadError(
        f"no disassembler for {arch}",
        accepted=f"llvm-objdump of LLVM {first} or newer, or a code object that attn-wave ships",
        hint="apt-get install llvm-19",
    )


@cache
def _llvm_version(program: str) -> int:
    ran = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    match = re.search(r"LLVM version (\d+)", ran.stdout)
    return int(match[1]) if match else 0


def disassemble(blob: bytes, arch: str) -> Iterator[Instruction]:
    """The instructions of a code object."""
    command = [disassembler(arch), "-d", f"--mcpu={arch}", "-"]
    ran = subprocess.run(command, input=blob, capture_output=True, check=False)
    if ran.returncode:
        raise EmulationError(f"{' '.join(command)} failed: {ran.stderr.decode(errors='replace').strip()[:300]}")
    for line in ran.stdout.decode().splitlines():
        instruction = parse_line(line)
        if instruction is not None:
            yield instruction


def _image(blob: bytes) -> NDArray[np.uint8]:
    (start,) = struct.unpack_from("<Q", blob, 0x20)
    size, count = struct.unpack_from("<HH", blob, 0x36)
    segments = [struct.unpack_from("<IIQQQQQQ", blob, start + i * size) for i in range(count)]
    loaded = [segment for segment in segments if segment[0] == _LOADED]
    image = np.zeros(max(address + memory for _, _, _, address, _, _, memory, _ in loaded), np.uint8)
    for _, _, offset, address, _, in_file, _, _ in loaded:
        image[address : address + in_file] = np.frombuffer(blob, np.uint8, in_file, offset)
    return image


def _symbols(blob: bytes) -> Iterator[tuple[str, int]]:
    """(name, address) of every symbol."""
    (start,) = struct.unpack_from("<Q", blob, 0x28)
    size, count = struct.unpack_from("<HH", blob, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", blob, start + i * size) for i in range(count)]
    for _, kind, _, _, offset, length, link, *_ in sections:
        if kind in _SYMBOLS:
            names = sections[link][4]
            for at in range(offset, offset + length, 24):
                name, _, _, _, value, _ = struct.unpack_from("<IBBHQQ", blob, at)
                yield blob[names + name : blob.index(b"\0", names + name)].decode(), value


def registers(blob: bytes) -> dict[str, int]:
    """Vector, accumulation and scalar registers and LDS bytes that the code object's own metadata states."""
    found = {}
    for key in ("vgpr_count", "agpr_count", "sgpr_count", "group_segment_fixed_size", "vgpr_spill_count"):
        match = re.search(b"\\." + key.encode() + rb"([\x00-\x7f]|\xcc.|\xcd..|\xce....)", blob, re.DOTALL)
        if match is not None:
            raw = match[1]
            found[key] = raw[0] if len(raw) == 1 else int.from_bytes(raw[1:], "big")
    return found
